"""The tab that watches a run: where it is in its stages, how the losses fall, and what the model writes by now."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from frontend.client import ApiClient, ApiError, Json
from frontend.markup import facts, heading, legend, notice, number, sample, stage_bar
from frontend.plots import Row, curve, loss_plot

EVERY_S = 3.0
NUM_SAMPLES = 6
SILENT_S = 120.0

MOVES = ("state", "step", "num_steps", "loss", "updated_at")
"""What changes in `GET /runs` when a run wrote something."""

NO_RUNS = "No training run yet: `make train` starts one, and it appears here by itself."


def build_training(client: ApiClient, tab: gr.Tab) -> gr.Timer:
    """Lay out the tab; returns its timer, which whoever owns the tabs switches on while this one is looked at."""
    with gr.Row():
        with gr.Column(scale=1, min_width=220):
            run = gr.Dropdown([], label="Run", elem_id="run-name")
        with gr.Column(scale=4, min_width=320):
            summary = gr.HTML(notice("Looking for runs …", "busy"), elem_id="run-summary", padding=False)
    loss = gr.LinePlot(
        x="step", y="loss", color="line", title="Loss by source, nats per token", x_title="step", y_title="loss",
        colors_in_legend=[], height=360, elem_id="loss-plot", visible=False,
    )  # fmt: skip
    legend_of_losses = gr.HTML(elem_id="loss-legend", padding=False)
    with gr.Row():
        rate = gr.LinePlot(
            x="step", y="learning_rate", title="Learning rate", x_title="step", y_title=" ", y_axis_format="~g",
            height=230, min_width=320, elem_id="rate-plot", visible=False,
        )  # fmt: skip
        speed = gr.LinePlot(
            x="step", y="tokens_per_second", title="Tokens per second", x_title="step", y_title=" ",
            y_axis_format="~s", y_lim=[0, None], height=230, min_width=320, elem_id="speed-plot", visible=False,
        )  # fmt: skip
    samples = gr.HTML(elem_id="samples", padding=False)
    timer = gr.Timer(EVERY_S, active=False)
    shown = gr.State("")

    async def refresh(chosen: str | None, shown: str) -> tuple[Any, ...]:
        nothing = gr.skip()
        try:
            runs = {run["name"]: run for run in await client.runs()}
            name = chosen if chosen in runs else newest(runs)
            if name is None:
                hidden = gr.update(visible=False)
                return gr.update(choices=[], value=None), notice(NO_RUNS), hidden, "", hidden, hidden, "", ""
            # A run that did not move since the last look costs one small request.
            state = json.dumps([list(runs), {key: runs[name][key] for key in MOVES}, is_silent(runs[name])])
            if state == shown:
                return (nothing,) * len(outputs)
            rows, texts = await client.run_metrics(name), await client.run_samples(name)
        except ApiError as error:
            return nothing, notice(str(error), "bad"), *[nothing] * 5, ""
        stages = stages_of(rows)
        losses = loss_plot(rows, stages)
        return (
            gr.update(choices=list(runs), value=name),
            summarise(runs[name], rows, stages),
            gr.LinePlot(losses.frame, color_map=losses.colours, visible=True),
            legend(losses.legend),
            gr.LinePlot(curve(rows, "learning_rate"), visible=True),
            gr.LinePlot(curve(rows, "tokens_per_second"), visible=True),
            show_samples(texts),
            state,
        )

    async def choose(chosen: str | None) -> tuple[Any, ...]:
        return await refresh(chosen, "")

    outputs = [run, summary, loss, legend_of_losses, rate, speed, samples, shown]
    gr.on([timer.tick, tab.select], refresh, [run, shown], outputs, show_progress="hidden")
    run.input(choose, [run], outputs, show_progress="hidden")
    return timer


def stages_of(rows: Sequence[Row]) -> list[Json]:
    """The stages as the newest row about the run tells them."""
    return next((row["stages"] for row in reversed(rows) if row["kind"] == "run"), [])


def newest(runs: Mapping[str, Json]) -> str | None:
    """The run that wrote last."""
    return max(runs, key=lambda name: runs[name]["updated_at"] or "", default=None)


def is_silent(run: Json) -> bool:
    """It says that it runs, and has written nothing for long."""
    return run["state"] == "running" and (run["age_s"] or 0) > SILENT_S


def summarise(run: Json, rows: Sequence[Row], stages: Sequence[Row]) -> str:
    """State, place and newest numbers of a run."""
    train = next((row for row in reversed(rows) if row["kind"] == "train"), None)
    evaluation = next((row for row in reversed(rows) if row["kind"] == "evaluation"), None)
    if train is None or run["num_steps"] is None:
        return notice("The run has begun; its first numbers come with its first steps.", "busy")
    step, num_steps = train["step"], run["num_steps"]
    numbers: list[tuple[str, ...]] = [
        ("State", "silent" if is_silent(run) else str(run["state"])),
        ("Step", f"{step:,} of {num_steps:,}"),
        ("Stage", str(train["stage"])),
        ("Loss", number(train["loss"], ".3f"), "of the newest step, nats per token"),
        ("Tokens", number(train["tokens"], ",")),
        ("Speed", f"{number(train['tokens_per_second'], ',.0f')} tokens/s"),
    ]
    if train.get("mfu") is not None:
        numbers.append(("Of the chip's peak", f"{100 * train['mfu']:.1f} %", "model FLOPs utilisation"))
    numbers += held_out(evaluation)
    bar = stage_bar([(s["name"], s["start_step"], s["end_step"]) for s in stages], step=step, num_steps=num_steps)
    warning = notice("It has written nothing for minutes: it may have been stopped.", "busy") if is_silent(run) else ""
    return bar + facts(numbers) + warning


def held_out(evaluation: Row | None) -> list[tuple[str, ...]]:
    """Bits per byte of every source, in one cell."""
    if evaluation is None:
        return []
    sources = evaluation["held_out"].items()
    values = " · ".join(f"{source} {number(one['bits_per_byte'], '.3f')}" for source, one in sources)
    perplexities = ", ".join(f"{source} {number(one['perplexity'], ',.1f')}" for source, one in sources)
    return [("Held-out bits per byte", values, f"at step {evaluation['step']:,}; perplexity: {perplexities}")]


def show_samples(rows: Sequence[Row]) -> str:
    """The newest texts, newest first."""
    newest = rows[-NUM_SAMPLES:][::-1]
    texts = "".join(
        sample(about=f"step {row['step']:,}" + (f" · {row['source']}" if row.get("source") else ""),
               prompt=row["prompt"], text=row["text"])
        for row in newest
    )  # fmt: skip
    return heading("What it writes") + f'<div class="samples">{texts}</div>' if texts else ""
