"""Strings that tokenizers disagree on: code, emoji, scripts without spaces, runs of spaces, digits, special tokens."""

from __future__ import annotations

import random

PIECES = (
    "the quick brown fox", "don't", "we'll", "I'M", "it\u2019s", "Hello", "WORLD", "naïve café", "Straße", "ﬁnal",
    "def f(x: int) -> int:\n    return x**2\n", "for (int i=0;i<n;++i){a[i]^=~b;}", "<div class='x'>&nbsp;</div>",
    "SELECT * FROM t WHERE a!='b';", "\\frac{1}{2}", "https://example.org/a?b=c#d", "user@host.net", "C:\\temp\\new",
    "0", "7", "42", "3.14159", "1,000,000", "2026-11-24", "0x1F", "1e-5", "١٢٣", "四十二", "½", "Ⅷ",
    "🙂", "👩‍👩‍👧‍👦", "🇫🇷", "👍🏽", "❤️", "日本語のテキスト", "中文字符", "한국어", "Привет", "مرحبا بالعالم", "שלום",
    "हिन्दी", "ไทย", "e\u0301", "\u200d", "\u200b", "\ufeff", "\u2028", "\u00a0", "\u3000", "\U000e0001",
    " ", "  ", "    ", "\t", "\t\t", "\n", "\n\n", "\r\n", " \n ", "\x00", "\x01", "\x7f", "\x0b\x0c",
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>user\n", "<repo_name>", "<|im_", "|>", "<file_sep>",
    "...", "!?", "--", "“quotes”", "(([{}]))", "_", "#", "$", "…", "—",
)  # fmt: skip


def awkward_strings(count: int, *, seed: int) -> list[str]:
    """Return `count` strings, the same for the same seed: every piece alone, then random joins."""
    draw = random.Random(seed)
    strings = ["", *PIECES][:count]
    while len(strings) < count:
        parts = []
        for _ in range(draw.randint(1, 12)):
            if draw.random() < 0.8:
                parts.append(draw.choice(PIECES))
            else:
                parts.append("".join(any_character(draw) for _ in range(draw.randint(1, 8))))
            if draw.random() < 0.3:
                parts.append(" ")
        strings.append("".join(parts))
    return strings


def any_character(draw: random.Random) -> str:
    """Any code point that UTF-8 can carry, low planes more often."""
    limit = draw.choice((0x80, 0x250, 0x3000, 0x10000, 0x110000))
    point = draw.randrange(limit)
    return "\ufffd" if 0xD800 <= point < 0xE000 else chr(point)
