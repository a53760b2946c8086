"""When a completion ends, and which of its text may be shown: end tokens, stop strings, grammar, length, characters.

Everything here is a pure function of the tokens in order, one by one: a resumed completion feeds the tokens that were
delivered again and stands where it stood.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shared.grammar import Grammar
from shared.stream_decoder import StreamDecoder


class StopString:
    """One stop string and how much of it the text's end matches: Knuth, Morris and Pratt 1977."""

    def __init__(self, text: str) -> None:
        assert text, "an empty stop string would stop everything"
        self.text = text
        self.matched = 0
        # For each length of a match, the longest shorter match that is also standing when the next character differs.
        self.shorter = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self.shorter[length - 1]
            length += text[i] == text[length]
            self.shorter[i] = length

    def push(self, character: str) -> bool:
        """Take one more character; True when the text now ends in the whole stop string."""
        while self.matched and character != self.text[self.matched]:
            self.matched = self.shorter[self.matched - 1]
        self.matched += character == self.text[self.matched]
        return self.matched == len(self.text)


class StopStrings:
    """Text in, text out, cut where a stop string begins.

    The first stop string to be complete decides, of several complete at one character the longest. Text is held back
    only while it may still be the beginning of a stop string.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self.strings = [StopString(text) for text in dict.fromkeys(stop)]
        self.held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take more text; return what is certain to stand before any stop string. Sets `found` at the first one."""
        assert self.found is None, "nothing follows a stop string"
        if not self.strings:
            return text
        for i, character in enumerate(text):
            complete = [string.text for string in self.strings if string.push(character)]
            if complete:
                self.found = max(complete, key=len)
                return (self.held + text[: i + 1])[: -len(self.found)]
        text = self.held + text
        keep = max(string.matched for string in self.strings)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text held back: no stop string came of it."""
        held, self.held = self.held, ""
        return held


class Ended(NamedTuple):
    """Why a completion ended."""

    reason: Literal["stop", "length"]
    stop_sequence: str | None = None


@dataclass(slots=True)
class Released:
    """What one token brought."""

    text: str
    is_kept: bool = True
    """False for the end token, which is not part of the completion."""
    ended: Ended | None = None


class Stopping:
    """One completion's end, token by token."""

    def __init__(
        self,
        decoder: StreamDecoder,
        *,
        stop: Sequence[str],
        end_token_ids: Iterable[int],
        max_new_tokens: int,
        min_tokens: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        """Stand before the first token; stop strings in the text of the first `min_tokens` tokens are passed over."""
        self.decoder = decoder
        self.grammar = grammar
        self.num_unstoppable = min_tokens
        self.stop_strings = StopStrings(stop)
        self.end_token_ids = frozenset(end_token_ids)
        self.num_left = max_new_tokens

    def start(self) -> Released:
        """Return what is to say before the first token: that there is room for none."""
        return Released("", ended=Ended("length") if self.num_left <= 0 else None)

    def push(self, token_id: int) -> Released:
        """Take the token just drawn.

        Raises:
            GenerationError: the grammar became too complex to follow.
        """
        if token_id in self.end_token_ids:
            text = self.flush()
            return Released(text, is_kept=False, ended=Ended("stop", self.stop_strings.found))
        text = self.decoder.push(token_id)
        if self.num_unstoppable > 0:
            self.num_unstoppable -= 1
        else:
            text = self.stop_strings.push(text)
        self.num_left -= 1
        if self.stop_strings.found is not None:
            return Released(text, ended=Ended("stop", self.stop_strings.found))
        is_whole = self.grammar is not None and not self.grammar.push(token_id)
        if is_whole or self.num_left <= 0:
            text += self.flush()
            found = self.stop_strings.found
            return Released(text, ended=Ended("stop", found) if found or is_whole else Ended("length"))
        return Released(text)

    def flush(self) -> str:
        """Release all that is held back; an unfinished character becomes U+FFFD, and may complete a stop string."""
        text = self.stop_strings.push(self.decoder.flush())
        return text if self.stop_strings.found else text + self.stop_strings.flush()
