"""The tab for plain completions: a prompt, every parameter, the answer as it comes, and what there is to know of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from frontend.answer import Stops, View, follow
from frontend.client import ApiClient
from frontend.controls import build_controls, build_fold
from frontend.markup import notice

EXAMPLES = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n",
    "def fibonacci(n):\n",
    "The three most important facts about the sea are",
]


def build_generate(client: ApiClient, stops: Stops) -> gr.Dropdown:
    """Lay out the tab; returns the model choice for whoever keeps it fresh."""
    with gr.Row():
        with gr.Column(scale=8, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", lines=4, max_lines=16, autofocus=True, elem_id="prompt",
                placeholder="The model goes on from here. Shift + Enter starts.",
            )  # fmt: skip
            with gr.Row(elem_classes="buttons"):
                run = gr.Button("Generate", variant="primary", scale=0, min_width=150, elem_id="run")
                stop = gr.Button("Stop", variant="stop", scale=0, min_width=150, visible=False, elem_id="stop-answer")
            status = gr.HTML(notice("Nothing generated yet."), elem_id="answer-status", padding=False)
            answer = gr.Textbox(
                label="Answer", lines=12, max_lines=12, interactive=False, buttons=["copy"], elem_id="answer"
            )
            details = gr.HTML(elem_id="answer-details", padding=False, visible=False)
            with gr.Row(elem_classes="buttons"):
                go_on = gr.Button("Continue the answer", scale=0, visible=False, elem_id="continue")
                keep_seed = gr.Button("Keep the seed", scale=0, visible=False, elem_id="keep-seed")
            gr.Examples([[text] for text in EXAMPLES], inputs=[prompt], label="Begin with", elem_id="examples")
        with gr.Column(scale=4, min_width=300, elem_classes="panel"):
            model = gr.Dropdown([], label="Model", elem_id="model")
            with build_fold():
                controls = build_controls("generate")
    last_seed = gr.State("")

    async def generate(
        request: gr.Request, prompt: str, model: str | None, *values: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        stop_asked = stops.open(request, "generate")
        shown, hidden = gr.update(visible=True), gr.update(visible=False)
        view = View("", "")
        yield "", gr.skip(), hidden, "", hidden, shown, hidden, hidden
        try:
            body = controls.body(prompt, model, values)
            followed = follow(client, client.generate(body), stop_asked, limit=body["max_new_tokens"])
            async with aclosing(followed) as views:
                async for view in views:
                    yield view.text, view.status, *[gr.skip()] * 6
        finally:
            stops.close(request, "generate")
        known = gr.update(value=view.details, visible=bool(view.details))
        has_text, has_seed = gr.update(visible=bool(view.text)), gr.update(visible=bool(view.seed))
        yield gr.skip(), gr.skip(), known, view.seed or "", shown, hidden, has_text, has_seed

    def stop_it(request: gr.Request) -> None:
        stops.stop(request, "generate")

    asked = [prompt, model, *controls.components]
    told = [answer, status, details, last_seed, run, stop, go_on, keep_seed]
    longer = go_on.click(
        lambda text, more: (text or "") + (more or ""), [prompt, answer], prompt, show_progress="hidden",
        trigger_mode="once",
    )  # fmt: skip
    gr.on([run.click, prompt.submit], generate, asked, told, show_progress="hidden", trigger_mode="once")
    longer.then(generate, asked, told, show_progress="hidden")
    stop.click(stop_it, show_progress="hidden")
    keep_seed.click(lambda seed: seed, last_seed, controls["seed"], show_progress="hidden")
    return model
