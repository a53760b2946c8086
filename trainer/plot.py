"""Plots of a run as PNG files, drawn from metrics.jsonl alone, so also of a run that is still going."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shared.errors import DataError
from shared.files import storage_errors
from trainer.run_folder import RunFolder, read_rows

Rows = Sequence[dict[str, Any]]


def plot_run(folder: RunFolder) -> list[Path]:
    """Draw loss, loss per source, learning rate and throughput into plots/; return the files.

    Raises:
        DataError: nothing has been logged yet.
    """
    rows = read_rows(folder.metrics)
    train = [row for row in rows if row.get("kind") == "train"]
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    runs = [row for row in rows if row.get("kind") == "run"]
    if not train or not runs:
        raise DataError(f"{folder.metrics} has no train rows yet; train first")
    stages = runs[-1]["stages"]
    drawings: dict[str, Callable[[Axes], None]] = {
        "loss": lambda axes: draw_loss(axes, train, evaluations),
        "loss_by_source": lambda axes: draw_loss_by_source(axes, train, evaluations),
        "bits_per_byte": lambda axes: draw_bits_per_byte(axes, evaluations),
        "learning_rate": lambda axes: draw_learning_rate(axes, train),
        "throughput": lambda axes: draw_throughput(axes, train),
    }
    paths = []
    with storage_errors(folder.plots):
        folder.plots.mkdir(exist_ok=True)
        for name, draw in drawings.items():
            figure = Figure(figsize=(10, 5))
            figure.subplots_adjust(left=0.08, right=0.98, bottom=0.1, top=0.92)  # a computed layout draws all twice
            axes = figure.add_subplot()
            draw(axes)
            mark_stages(axes, stages)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend(loc="best", fontsize="small")
            figure.suptitle(f"{folder.name}: {name.replace('_', ' ')}")
            paths.append(folder.plots / f"{name}.png")
            figure.savefig(paths[-1], dpi=110)
    return paths


def mark_stages(axes: Axes, stages: Rows) -> None:
    """Shade every second stage and name each at its beginning."""
    for index, stage in enumerate(stages):
        if index % 2:
            axes.axvspan(stage["start_step"], stage["end_step"], color="tab:gray", alpha=0.12, linewidth=0)
        axes.annotate(
            stage["name"],
            (stage["start_step"], 0.99),
            xycoords=axes.get_xaxis_transform(),
            rotation=90,
            fontsize="x-small",
            verticalalignment="top",
            color="tab:gray",
        )


def draw_loss(axes: Axes, train: Rows, evaluations: Rows) -> None:
    axes.plot([row["step"] for row in train], [row["loss"] for row in train], label="train, all sources", linewidth=1)
    points = [row for row in evaluations if row["held_out"]]
    means = [sum(held["loss"] for held in row["held_out"].values()) / len(row["held_out"]) for row in points]
    axes.plot([row["step"] for row in points], means, "o-", label="held-out, mean of sources", markersize=4)
    axes.set_ylabel("loss, nats per token")


def draw_loss_by_source(axes: Axes, train: Rows, evaluations: Rows) -> None:
    for index, source in enumerate(sources_of(train, evaluations)):
        color = f"C{index}"
        rows = [row for row in train if source in row["source_loss"]]
        axes.plot(
            [row["step"] for row in rows],
            [row["source_loss"][source] for row in rows],
            color=color,
            label=f"{source}, train",
            linewidth=1,
            alpha=0.6,
        )
        points = [row for row in evaluations if source in row["held_out"]]
        axes.plot(
            [row["step"] for row in points],
            [row["held_out"][source]["loss"] for row in points],
            "o--",
            color=color,
            label=f"{source}, held-out",
            markersize=4,
        )
    axes.set_ylabel("loss, nats per token")


def draw_bits_per_byte(axes: Axes, evaluations: Rows) -> None:
    for source in sources_of([], evaluations):
        points = [row for row in evaluations if source in row["held_out"]]
        values = [row["held_out"][source]["bits_per_byte"] for row in points]
        axes.plot([row["step"] for row in points], values, "o-", label=f"{source}, held-out", markersize=4)
    axes.set_ylabel("bits per byte of text")


def draw_learning_rate(axes: Axes, train: Rows) -> None:
    axes.plot([row["step"] for row in train], [row["learning_rate"] for row in train], label="learning rate")
    axes.set_ylim(bottom=0)


def draw_throughput(axes: Axes, train: Rows) -> None:
    steps, speeds = [row["step"] for row in train], [row["tokens_per_second"] for row in train]
    axes.plot(steps, speeds, label="evaluation, samples and saves apart", linewidth=1)
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)


def sources_of(train: Rows, evaluations: Rows) -> list[str]:
    """Every source that any row names, in order of appearance."""
    names = [source for row in train for source in row["source_loss"]]
    names += [source for row in evaluations for source in row["held_out"]]
    return list(dict.fromkeys(names))
