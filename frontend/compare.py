"""The tab that asks two models the same thing at once, with the same parameters and the same seed."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from frontend.answer import Stops, follow
from frontend.client import ApiClient
from frontend.controls import Controls, build_controls, parse_seed
from frontend.markup import notice

SIDES = ("left", "right")
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Side:
    """One of the two answers."""

    model: gr.Dropdown
    answer: gr.Textbox
    status: gr.HTML


def build_compare(client: ApiClient, stops: Stops) -> list[gr.Dropdown]:
    """Lay out the tab; returns both model choices for whoever keeps them fresh."""
    prompt = gr.Textbox(
        label="Prompt for both", lines=3, max_lines=12, elem_id="compare-prompt", placeholder="Shift + Enter starts."
    )
    with gr.Row(elem_classes="buttons"):
        run = gr.Button("Ask both", variant="primary", scale=0, min_width=150, elem_id="compare-run")
        stop = gr.Button("Stop both", scale=0, min_width=150, elem_id="compare-stop")
    with gr.Row():
        sides = {name: build_side(name) for name in SIDES}
    with gr.Accordion("Parameters of both", open=False):
        controls = build_controls("compare")
    seed = gr.State("")

    def draw_seed(given: str | None) -> str:
        return (given or "").strip() or str(random.randint(0, LARGEST_SEED))

    def stop_both(request: gr.Request) -> None:
        for name in SIDES:
            stops.stop(request, name)

    started = gr.on(
        [run.click, prompt.submit], draw_seed, [controls["seed"]], [seed], show_progress="hidden", trigger_mode="once"
    )
    for name, side in sides.items():
        started.then(
            asking(client, stops, controls, name),
            [prompt, seed, side.model, *controls.components],
            [side.answer, side.status],
            show_progress="hidden",
        )
    stop.click(stop_both, show_progress="hidden")
    return [side.model for side in sides.values()]


def build_side(name: str) -> Side:
    with gr.Column(min_width=320):
        return Side(
            model=gr.Dropdown([], label="Model", elem_id=f"compare-model-{name}"),
            answer=gr.Textbox(
                label="Answer", lines=12, max_lines=12, interactive=False, buttons=["copy"],
                elem_id=f"compare-answer-{name}", elem_classes="answer",
            ),
            # Below, so that the answers stand side by side whatever there is to say of one of them.
            status=gr.HTML(
                notice("Nothing generated yet."), elem_id=f"compare-status-{name}", elem_classes="told", padding=False
            ),
        )  # fmt: skip


def asking(
    client: ApiClient, stops: Stops, controls: Controls, name: str
) -> Callable[..., AsyncIterator[tuple[str, str]]]:
    """Return the event of one side."""

    async def ask(
        request: gr.Request, prompt: str, seed: str, model: str | None, *values: Any
    ) -> AsyncIterator[tuple[str, str]]:
        body = {**controls.body(prompt, model, values), "seed": parse_seed(seed)}
        stop_asked = stops.open(request, name)
        try:
            followed = follow(client, client.generate(body), stop_asked, limit=body["max_new_tokens"])
            async with aclosing(followed) as views:
                async for view in views:
                    yield view.text, view.status + view.details
        finally:
            stops.close(request, name)

    return ask
