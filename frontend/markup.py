"""Small pieces of HTML, every value escaped here and nowhere else; page.css dresses them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal

NOT_KNOWN = "\N{EN DASH}"
Tone = Literal["quiet", "good", "busy", "bad"]


def notice(sentence: str, tone: Tone = "quiet") -> str:
    """One sentence with a coloured dot before it."""
    role = "alert" if tone == "bad" else "status"
    return f'<div class="notice {tone}" role="{role}"><i class="dot"></i><span>{escape(sentence)}</span></div>'


def facts(pairs: Iterable[tuple[str, ...]]) -> str:
    """(label, value), the label over its value; a third text is shown on hover."""
    cells = []
    for label, value, *hint in pairs:
        title = f' title="{escape(hint[0])}"' if hint else ""
        cells.append(f"<div{title}><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>")
    return f'<dl class="facts">{"".join(cells)}</dl>' if cells else ""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> str:
    """Rows of text; `empty` is the sentence for none. Every cell knows its header, which a phone shows beside it."""
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{escape(h)}">{escape(c)}</td>' for h, c in zip(headers, row, strict=True))
        + "</tr>"
        for row in rows
    )
    if not body:
        return notice(empty)
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    return f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def heading(text: str) -> str:
    return f"<h3 class='heading'>{escape(text)}</h3>"


def stage_bar(stages: Sequence[tuple[str, int, int]], *, step: int, num_steps: int) -> str:
    """Stages as segments as wide as they are long, filled up to `step`; each is (name, first step, end step)."""
    segments = []
    for name, start, end in stages:
        share = 100 * (end - start) / max(num_steps, 1)
        filled = 100 * min(max(step - start, 0) / max(end - start, 1), 1)
        now = " now" if start <= step < end or (step >= end == num_steps) else ""
        segments.append(
            f'<li class="stage{now}" style="flex:{share:.3f} 1 0" title="{escape(name)}: steps {start:,} to {end:,}">'
            f'<span class="track"><span class="fill" style="width:{filled:.1f}%"></span></span>'
            f'<span class="name">{escape(name)}</span></li>'
        )
    return f'<ol class="stages">{"".join(segments)}</ol>'


def legend(lines: Iterable[tuple[str, str]]) -> str:
    """(name, colour) of every line of a plot; Vega's own legend does not wrap on a phone."""
    items = "".join(f'<li><i style="background:{escape(colour)}"></i>{escape(name)}</li>' for name, colour in lines)
    return f'<ul class="legend">{items}</ul>' if items else ""


def sample(*, about: str, prompt: str, text: str) -> str:
    """A generated text behind its prompt."""
    return (
        f'<figure class="sample"><figcaption>{escape(about)}</figcaption>'
        f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre></figure>"
    )


def number(value: float | None, style: str) -> str:
    """Format a number that may be missing: JSON has no word for one that is not finite."""
    return NOT_KNOWN if value is None else format(value, style)


def milliseconds(value: float | None) -> str:
    if value is None:
        return NOT_KNOWN
    return f"{value:,.0f} ms" if value < 10_000 else f"{value / 1000:,.1f} s"


def count(number: int) -> str:
    """As people say it: 134.5M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def short_revision(revision: str | None) -> str:
    """Enough of a sha256 to tell revisions apart."""
    return (revision or "").removeprefix("sha256:")[:8]
