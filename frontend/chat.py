"""The tab for conversations with models that have a chat template, over `POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from frontend.answer import follow
from frontend.client import ApiClient, Json
from frontend.controls import build_fold, parse_seed
from frontend.markup import notice

PLACEHOLDER = "Message"
PLACEHOLDER_BACK = f"() => ({{__type__: 'update', placeholder: '{PLACEHOLDER}'}})"
"""Runs in the browser: one more request for every token would be a waste."""


def build_chat(client: ApiClient) -> gr.Dropdown:
    """Lay out the tab; returns the model choice for whoever keeps it fresh."""
    with gr.Row():
        with gr.Column(scale=4, min_width=300, elem_classes="panel", render=False) as panel:
            model = gr.Dropdown([], label="Model", elem_id="chat-model")
            with build_fold():
                system = gr.Textbox(label="System message", lines=2, placeholder="none", elem_id="chat-system")
                limit = gr.Slider(1, 2048, 256, step=1, label="New tokens, at most", elem_id="chat-max-tokens")
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", elem_id="chat-temperature")
                top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top p", elem_id="chat-top-p")
                seed = gr.Textbox(label="Seed", placeholder="random", elem_id="chat-seed")
        with gr.Column(scale=8, min_width=320):
            status = gr.HTML(elem_id="chat-status", elem_classes="told", padding=False, render=False)

            async def reply(
                message: str, history: list[Json], model: str | None, system: str | None, *values: Any
            ) -> AsyncIterator[tuple[Any, str]]:
                limit, temperature, top_p, seed = values
                body = {
                    "model": model or None,
                    "messages": messages_of(history, message, system),
                    "max_tokens": limit,
                    "temperature": temperature,
                    "top_p": top_p,
                    "seed": parse_seed(seed),
                }
                # The stop button of a chat closes this generator, which cancels the job.
                async with aclosing(follow(client, client.chat(body), asyncio.Event())) as views:
                    async for view in views:
                        yield view.text or [], view.status + view.details  # [] is no message at all

            chat = gr.ChatInterface(
                reply,
                chatbot=gr.Chatbot(
                    height=460, show_label=False, elem_id="chat", buttons=["copy"],
                    placeholder="Ask something. The model keeps to the conversation above.",
                ),
                textbox=gr.Textbox(
                    placeholder=PLACEHOLDER, show_label=False, lines=1, max_lines=8, submit_btn=True, stop_btn=True,
                    elem_id="chat-message",
                ),
                additional_inputs=[model, system, limit, temperature, top_p, seed],
                additional_outputs=[status],
                concurrency_limit=None,
                analytics_enabled=False,
                api_visibility="private",
                autofocus=False,
                fill_height=False,
            )  # fmt: skip
            status.render()  # type: ignore[no-untyped-call]  # below the message: the conversation keeps its place
            # ChatInterface empties the placeholder with every message and never brings it back.
            status.change(None, js=PLACEHOLDER_BACK, outputs=chat.textbox, show_progress="hidden")
            chat.textbox.stop(lambda: notice("Stopped."), outputs=status, show_progress="hidden")
        panel.render()
    return model


def messages_of(history: Sequence[Json], message: str, system: str | None) -> list[Json]:
    """The conversation in the API's shape: plain text, the system message first where there is one."""
    said = [{"role": turn["role"], "content": plain_text(turn["content"])} for turn in history]
    first = [{"role": "system", "content": system}] if system and system.strip() else []
    return [*first, *said, {"role": "user", "content": message}]


def plain_text(content: Any) -> str:
    """Gradio keeps a message as a list of blocks."""
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content if block.get("type") == "text")
