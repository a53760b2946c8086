"""The tab that shows the service: its queue, its workers, its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from frontend.client import ApiClient, ApiError, Json
from frontend.markup import NOT_KNOWN, count, heading, notice, short_revision, table

EVERY_S = 2.0

Row = Mapping[str, Any]


def build_status(client: ApiClient, tab: gr.Tab) -> gr.Timer:
    """Lay out the tab; returns its timer."""
    overview = gr.HTML(notice("Asking the API …", "busy"), elem_id="service", padding=False)
    timer = gr.Timer(EVERY_S, active=False)

    async def refresh() -> str:
        try:
            return describe(await client.health(), await client.models())
        except ApiError as error:
            return notice(str(error), "bad")

    gr.on([timer.tick, tab.select], refresh, outputs=overview, show_progress="hidden")
    return timer


def describe(health: Json, models: Sequence[Json]) -> str:
    """All tables, the reason first where something is missing."""
    reason = [] if health["status"] == "ok" else [notice(health["reason"], "bad")]
    tables = [
        heading("Queue"),
        queue_table(health["models"]),
        heading("Workers"),
        worker_table(health["workers"]),
        heading("Models"),
        model_table(models),
    ]
    return "".join([*reason, *tables])


def queue_table(models: Sequence[Row]) -> str:
    rows = [
        (
            model["name"],
            f"{model['queued']:,}",
            f"{model['running']:,}",
            f"{model['workers']:,}",
            f"{model['tokens_per_second']:,.0f}" if model["tokens_per_second"] else "not measured yet",
        )
        for model in models
    ]
    return table(
        ["Model", "Waiting", "Running", "Workers", "Served tokens per second"], rows, empty="No model, so no queue."
    )


def worker_table(workers: Sequence[Row]) -> str:
    rows = [
        (
            worker["id"],
            f"{worker['slots'] - worker['free']} of {worker['slots']}",
            f"{worker['device']}, {worker['dtype']}",
            ", ".join(f"{name} @ {short_revision(revision)}" for name, revision in worker["models"].items()),
            "hands its work over" if worker["draining"] else f"heard {worker['age_ms'] / 1000:.0f} s ago",
        )
        for worker in workers
    ]
    return table(["Worker", "Busy slots", "Arithmetic", "Models", "State"], rows, empty="No worker is up: jobs wait.")


def model_table(models: Sequence[Row]) -> str:
    rows = [
        (
            model["id"] + (", the default" if model["is_default"] else ""),
            short_revision(model["revision"]),
            count(model["num_parameters"]),
            f"{model['context_length']:,}",
            f"{model['trained_length']:,}" if model["trained_length"] else NOT_KNOWN,
            model["owned_by"],
            "yes" if model["has_chat_template"] else "no",
        )
        for model in models
    ]
    headers = ["Model", "Revision", "Parameters", "Context", "Trained on", "Origin", "Chat"]
    return table(headers, rows, empty="No model yet: `make train` makes one.")
