"""Every parameter of `POST /generate` as a control, and the request body they make together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component

DEFAULT_TIMEOUT_S = 300

FOLDED_ON_PHONES = "() => ({__type__: 'update', open: !matchMedia('(max-width: 700px)').matches})"
"""Runs in the browser, which alone knows its width; page.css stacks the columns at the same one."""


class Scale(NamedTuple):
    """A number that is slid."""

    low: float
    high: float
    value: float
    step: float
    label: str
    info: str | None


SLIDERS = {
    "max_new_tokens": Scale(1, 2048, 128, 1, "New tokens, at most", None),
    "temperature": Scale(0, 2, 0.7, 0.05, "Temperature", "0 always takes the likeliest token"),
    "top_p": Scale(0.05, 1, 0.95, 0.05, "Top p", "Share the likeliest hold; 1 is off"),
    "top_k": Scale(0, 200, 0, 1, "Top k", "0 is off"),
    "min_p": Scale(0, 1, 0, 0.01, "Min p", "Least share of the likeliest token's chance; 0 is off"),
    "repetition_penalty": Scale(0.5, 2, 1, 0.05, "Repetition penalty", "Over prompt and answer; 1 is off"),
    "presence_penalty": Scale(-2, 2, 0, 0.1, "Presence penalty", "Once for a token that appeared"),
    "frequency_penalty": Scale(-2, 2, 0, 0.1, "Frequency penalty", "For every time it appeared"),
}


@dataclass(frozen=True)
class Controls:
    """The controls in the order of their names; events take `components`, `body` takes their values."""

    names: tuple[str, ...]
    components: list[Component]

    def __getitem__(self, name: str) -> Component:
        return self.components[self.names.index(name)]

    def body(self, prompt: str, model: str | None, values: Sequence[Any]) -> dict[str, Any]:
        """The request body. Values are passed on as they are: what is wrong with one, the API says best."""
        body = dict(zip(self.names, values, strict=True))
        body["seed"] = parse_seed(body["seed"])
        body["stop"] = parse_stops(body["stop"])
        return {"prompt": prompt, "model": model or None, **body}


def parse_seed(text: str | None) -> int | str | None:
    """Return the number, None for an empty field, and anything else as it stands."""
    text = (text or "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        return text


def parse_stops(text: str | None) -> list[str]:
    r"""One stop text a line; \n and \t stand for themselves, as no line can hold a line break."""
    lines = [line for line in (text or "").split("\n") if line]
    return [line.replace("\\n", "\n").replace("\\t", "\t") for line in lines]


def build_fold() -> gr.Accordion:
    """Open a block for what stands beside an answer; on a phone, where it stands below, it begins folded."""
    fold = gr.Accordion("Parameters", open=True, elem_classes="fold")
    gr.on(None, None, js=FOLDED_ON_PHONES, outputs=fold, show_progress="hidden")  # once, when the page opens
    return fold


def build_controls(place: str) -> Controls:
    """Lay the controls out where they are called for: the usual ones in sight, the others folded.

    Their element ids are `place` and the parameter's name.
    """
    made: dict[str, Component] = {}

    def slide(name: str) -> None:
        one = SLIDERS[name]
        made[name] = gr.Slider(
            one.low, one.high, one.value, step=one.step, label=one.label, info=one.info, elem_id=f"{place}-{name}"
        )

    for name in ("max_new_tokens", "temperature", "top_p"):
        slide(name)
    with gr.Accordion("More ways to choose a token", open=False):
        for name in ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            slide(name)
    with gr.Accordion("Seed, stop texts, time limit", open=False):
        # A text field: seeds have 63 bits, and a browser's numbers only 53.
        made["seed"] = gr.Textbox(
            label="Seed", placeholder="random", info="The same seed repeats an answer", elem_id=f"{place}-seed"
        )
        made["stop"] = gr.Textbox(
            label="Stop texts", lines=2, placeholder="one a line", info="\\n is a line break", elem_id=f"{place}-stop"
        )
        made["timeout_s"] = gr.Number(
            DEFAULT_TIMEOUT_S, label="Time limit in seconds", minimum=1, precision=0, elem_id=f"{place}-timeout_s"
        )
    return Controls(tuple(made), list(made.values()))
