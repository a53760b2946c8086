"""Plots of a run as PNG files, drawn from metrics.jsonl alone, so also of a run that is still going."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from shared.errors import DataError
from shared.files import storage_errors
from trainer.run_folder import RunFolder, read_rows

Rows = Sequence[dict[str, Any]]
Points = tuple[list[float], list[float]]

# Okabe and Ito's palette (2008): apart for every kind of colour vision, dark enough on white for lines and text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#4D4D4D")
INK, GREY, BAND = "#222222", "#767676", "#F3F3F1"

SIZE_INCHES = (10.0, 5.2)
DOTS_PER_INCH = 120
LABEL_ROOM = 0.17
"""Share of the width right of the curves, where their names stand."""

LABEL_APART = 0.045
"""Least distance of two names, as a share of the height."""


def plot_run(folder: RunFolder) -> list[Path]:
    """Draw the run's curves into plots/; return the files.

    Raises:
        DataError: nothing has been logged yet.
    """
    rows = read_rows(folder.metrics)
    train = [row for row in rows if row.get("kind") == "train"]
    evaluations = [row for row in rows if row.get("kind") == "evaluation" and row["held_out"]]
    runs = [row for row in rows if row.get("kind") == "run"]
    if not train or not runs:
        raise DataError(f"{folder.metrics} has no train rows yet; train first")
    stages = runs[-1]["stages"]
    colours = dict(zip(sources_of(train, evaluations), COLOURS * 10, strict=False))
    drawings: dict[str, tuple[str, Callable[[Axes], Sequence[Label]]]] = {
        "loss": ("loss, nats per token", lambda axes: draw_loss(axes, train, evaluations)),
        "loss_by_source": (
            "loss by source, nats per token · thin: training · dots: held-out text",
            lambda axes: draw_loss_by_source(axes, train, evaluations, colours),
        ),
        "bits_per_byte": (
            "held-out text, bits per byte",
            lambda axes: draw_bits_per_byte(axes, evaluations, colours),
        ),
        "shares": ("share of the tokens trained on", lambda axes: draw_shares(axes, train, colours)),
        "learning_rate": ("learning rate", lambda axes: draw_learning_rate(axes, train)),
        "throughput": (
            "tokens per second · evaluation, samples and saves apart",
            lambda axes: draw_throughput(axes, train),
        ),
    }
    paths = []
    with storage_errors(folder.plots):
        folder.plots.mkdir(exist_ok=True)
        for name, (title, draw) in drawings.items():
            figure = Figure(figsize=SIZE_INCHES)
            axes = figure.add_axes((0.065, 0.1, 0.925 - LABEL_ROOM, 0.72))
            last_step = max(train[-1]["step"], stages[-1]["end_step"] if stages else 0)
            axes.set_xlim(0, last_step)
            labels = draw(axes)
            dress(axes, stages, last_step)
            write_labels(axes, labels)
            figure.text(0.065, 0.945, folder.name, color=GREY, fontsize=10)
            figure.text(0.065, 0.905, title, color=INK, fontsize=13, fontweight="bold")
            paths.append(folder.plots / f"{name}.png")
            figure.savefig(paths[-1], dpi=DOTS_PER_INCH)
    return paths


Label = tuple[str, float, str]
"""A curve's name, the height it ends at, its colour."""


def dress(axes: Axes, stages: Rows, last_step: int) -> None:
    """Bands of the stages with their names above; no frame, a light grid."""
    for index, stage in enumerate(stages):
        if index % 2 == 0:
            axes.axvspan(stage["start_step"], stage["end_step"], color=BAND, linewidth=0, zorder=0)
    for stage, row in zip(stages, name_rows(stages, last_step), strict=True):
        axes.annotate(
            stage["name"],
            (stage["start_step"], 1.0),
            xytext=(2, 4 + 11 * row),
            textcoords="offset points",
            xycoords=axes.get_xaxis_transform(),
            fontsize=8,
            color=GREY,
            annotation_clip=False,
        )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=GREY, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("step", color=GREY, fontsize=9, loc="right")


def name_rows(stages: Rows, last_step: int) -> list[int]:
    """A row for each stage's name, so that none writes over another: what follows a wide name goes above it."""
    rows: list[int] = []
    ends = [float("-inf")] * 3
    for stage in stages:
        width = len(stage["name"]) * 0.0092 * last_step  # of a character at this size and width
        row = next((row for row, end in enumerate(ends) if end <= stage["start_step"]), 0)
        ends[row] = stage["start_step"] + width
        rows.append(row)
    return rows


def write_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each curve's name at its end, moved apart where they would cover one another."""
    low, high = axes.get_ylim()
    transform = axes.transData + axes.transAxes.inverted()
    left = axes.get_xlim()[1]
    heights = [float(transform.transform((left, min(max(y, low), high)))[1]) for _, y, _ in labels]
    for (name, _, colour), height in zip(labels, spread(heights), strict=True):
        axes.annotate(
            name,
            (1.0, height),
            xytext=(8, 0),
            textcoords="offset points",
            xycoords="axes fraction",
            va="center",
            color=colour,
            fontsize=9.5,
            fontweight="bold",
            annotation_clip=False,
        )


def spread(heights: Sequence[float]) -> list[float]:
    """Move heights apart to at least `LABEL_APART`, keeping their order and their middle as far as may be."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = [heights[index] for index in order]
    for _ in range(100):
        moved = False
        for lower, upper in pairwise(range(len(placed))):
            missing = LABEL_APART - (placed[upper] - placed[lower])
            if missing > 1e-4:
                placed[lower] -= missing / 2
                placed[upper] += missing / 2
                moved = True
        if not moved:
            break
    result = [0.0] * len(heights)
    for place, index in zip(placed, order, strict=True):
        result[index] = place
    return result


def draw_loss(axes: Axes, train: Rows, evaluations: Rows) -> list[Label]:
    steps, losses = series(train, lambda row: row["loss"])
    curve = smoothed(losses)
    axes.plot(steps, losses, color=COLOURS[0], linewidth=0.7, alpha=0.3)
    axes.plot(steps, curve, color=COLOURS[0], linewidth=2)
    labels = [(f"training {curve[-1]:.2f}", curve[-1], COLOURS[0])]
    if evaluations:
        steps, means = series(evaluations, mean_held_out)
        axes.plot(steps, means, "o-", color=COLOURS[1], markersize=4.5, clip_on=False, linewidth=1.2)
        labels.append((f"held-out {means[-1]:.2f}", means[-1], COLOURS[1]))
    return labels


def draw_loss_by_source(axes: Axes, train: Rows, evaluations: Rows, colours: Mapping[str, str]) -> list[Label]:
    labels = []
    for source, colour in colours.items():
        steps, losses = of_source(train, "source_loss", source)
        for part_steps, part_losses in runs_without_gaps(steps, losses):
            axes.plot(part_steps, smoothed(part_losses), color=colour, linewidth=1, alpha=0.55)
        held_steps, held_losses = held_out(evaluations, source, "loss")
        axes.plot(held_steps, held_losses, "o-", color=colour, markersize=4.5, clip_on=False, linewidth=1.6)
        if last := held_losses or losses:
            labels.append((f"{source} {last[-1]:.2f}", last[-1], colour))
    return labels


def draw_bits_per_byte(axes: Axes, evaluations: Rows, colours: Mapping[str, str]) -> list[Label]:
    labels = []
    for source, colour in colours.items():
        steps, values = held_out(evaluations, source, "bits_per_byte")
        axes.plot(steps, values, "o-", color=colour, markersize=4.5, clip_on=False, linewidth=1.6)
        if values:
            labels.append((f"{source} {values[-1]:.2f}", values[-1], colour))
    return labels


def draw_shares(axes: Axes, train: Rows, colours: Mapping[str, str]) -> list[Label]:
    """What was drawn between one row and the next, stacked to 1."""
    rows = [row for row in train if row.get("source_share")]
    if not rows:
        return []
    steps = [row["step"] for row in rows]
    stacks = [[row["source_share"].get(source, 0.0) for row in rows] for source in colours]
    axes.stackplot(steps, stacks, colors=list(colours.values()), alpha=0.8, linewidth=0, step="pre")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    labels, below = [], 0.0
    for source, stack in zip(colours, stacks, strict=True):
        if stack[-1]:
            labels.append((f"{source} {stack[-1]:.0%}", below + stack[-1] / 2, colours[source]))
        below += stack[-1]
    return labels


def draw_learning_rate(axes: Axes, train: Rows) -> list[Label]:
    steps, rates = series(train, lambda row: row["learning_rate"])
    axes.plot(steps, rates, color=COLOURS[0], linewidth=2)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.1e}" if rate else "0"))
    return [(f"{rates[-1]:.1e}", rates[-1], COLOURS[0])]


def draw_throughput(axes: Axes, train: Rows) -> list[Label]:
    steps, speeds = series(train, lambda row: row["tokens_per_second"])
    middle = sorted(speeds)[len(speeds) // 2]
    axes.plot(steps, speeds, color=COLOURS[0], linewidth=0.9, alpha=0.7)
    axes.axhline(middle, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.15 * sorted(speeds)[int(0.98 * (len(speeds) - 1))])
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    mfus = sorted(row["mfu"] for row in train if row["mfu"] is not None)
    mfu = f"\nMFU {mfus[len(mfus) // 2]:.1%}" if mfus else ""
    return [(f"median {middle:,.0f}{mfu}", middle, INK)]


def series(rows: Rows, value: Callable[[dict[str, Any]], float]) -> Points:
    return [row["step"] for row in rows], [value(row) for row in rows]


def of_source(train: Rows, field: str, source: str) -> Points:
    return series([row for row in train if source in row[field]], lambda row: row[field][source])


def held_out(evaluations: Rows, source: str, field: str) -> Points:
    return series([row for row in evaluations if source in row["held_out"]], lambda row: row["held_out"][source][field])


def mean_held_out(row: Mapping[str, Any]) -> float:
    losses = [numbers["loss"] for numbers in row["held_out"].values()]
    return float(sum(losses) / len(losses))


def smoothed(values: Sequence[float], radius: int = 4) -> list[float]:
    """Means over as many rows before as after, so that a steep curve is not shifted; fewer of them at the ends."""
    result = []
    for index in range(len(values)):
        reach = min(radius, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        result.append(sum(window) / len(window))
    return result


def runs_without_gaps(steps: Sequence[float], values: Sequence[float]) -> list[Points]:
    """Part a curve where its source was absent for a stage: a line across would be a lie."""
    if not steps:
        return []
    usual = sorted(b - a for a, b in pairwise(steps))[len(steps) // 2 - 1] if len(steps) > 1 else 1
    parts: list[Points] = [([steps[0]], [values[0]])]
    for (before, _), (step, value) in pairwise(zip(steps, values, strict=True)):
        if step - before > 5 * usual:
            parts.append(([], []))
        parts[-1][0].append(step)
        parts[-1][1].append(value)
    return parts


def sources_of(train: Rows, evaluations: Rows) -> list[str]:
    """Every source that any row names, in order of appearance."""
    names = [source for row in train for source in row["source_loss"]]
    names += [source for row in evaluations for source in row["held_out"]]
    return list(dict.fromkeys(names))
