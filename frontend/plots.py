"""A run's rows as line plots: few enough points for a browser, a colour for a source, a line where a stage begins."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

MAX_POINTS = 240
"""Points of one line; more are averaged in equal groups of steps."""

# (train, held-out): the same colour, pale for the noisy line and strong for the one to trust; both fit light and dark.
PALETTE = [
    ("#a5b4fc", "#6366f1"),
    ("#fcd34d", "#d97706"),
    ("#6ee7b7", "#059669"),
    ("#f9a8d4", "#db2777"),
    ("#7dd3fc", "#0284c7"),
]
STAGE_COLOUR = "#94a3b8"

Row = Mapping[str, Any]
Point = tuple[int, float]


@dataclass(frozen=True)
class LossPlot:
    """What a `gr.LinePlot` needs; columns of the frame are step, loss, line."""

    frame: pd.DataFrame
    colours: dict[str, str]
    legend: list[tuple[str, str]]
    """(name, colour) of the lines that are losses, and one for the stages."""


def loss_plot(rows: Sequence[Row], stages: Iterable[Row]) -> LossPlot:
    """Training and held-out loss of every source, with a vertical line where each stage but the first begins."""
    train, held_out = losses_by_source(rows)
    lines: dict[str, list[Point]] = {}
    colours: dict[str, str] = {}
    for index, source in enumerate(dict.fromkeys([*train, *held_out])):
        for name, points, colour in zip(
            (f"{source}, train", f"{source}, held-out"),
            (thin(train[source]), held_out[source]),
            PALETTE[index % len(PALETTE)],
            strict=True,
        ):
            if points:
                lines[name], colours[name] = points, colour
    legend = list(colours.items())
    losses = [loss for points in lines.values() for _, loss in points]
    last_step = max((step for points in lines.values() for step, _ in points), default=0)
    low, high = round_limits(losses) if losses else (0.0, 0.0)
    for stage in stages:
        if losses and 0 < stage["start_step"] <= last_step:
            name = f"{stage['name']} begins"
            lines[name] = [(stage["start_step"], low), (stage["start_step"], high)]
            colours[name] = STAGE_COLOUR
    if len(lines) > len(legend):
        legend.append(("a stage begins", STAGE_COLOUR))
    return LossPlot(frame_of(lines, "loss"), colours, legend)


def round_limits(values: Sequence[float]) -> tuple[float, float]:
    """The round numbers below and above: there Vega ends its axis, so lines between them cross the whole plot."""
    low, high = min(values), max(values)
    step = 10 ** math.floor(math.log10(max(high - low, 1e-6)))
    return math.floor(low / step) * step, math.ceil(high / step) * step


def losses_by_source(rows: Iterable[Row]) -> tuple[dict[str, list[Point]], dict[str, list[Point]]]:
    """Training and held-out losses; those that are not finite come as None and are left out."""
    train: dict[str, list[Point]] = defaultdict(list)
    held_out: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "train":
            for source, loss in row["source_loss"].items():
                train[source].append((row["step"], loss))
        elif row["kind"] == "evaluation":
            for source, numbers in row["held_out"].items():
                held_out[source].append((row["step"], numbers["loss"]))
    for points in (*train.values(), *held_out.values()):
        points[:] = [(step, loss) for step, loss in points if loss is not None]
    return train, held_out


def curve(rows: Iterable[Row], name: str) -> pd.DataFrame:
    """One number of the training rows by step."""
    points = [(row["step"], row[name]) for row in rows if row["kind"] == "train" and row.get(name) is not None]
    return pd.DataFrame(thin(points), columns=["step", name]).astype({"step": int, name: float})


def frame_of(lines: Mapping[str, Sequence[Point]], value: str) -> pd.DataFrame:
    records = [(step, y, name) for name, points in lines.items() for step, y in points]
    return pd.DataFrame(records, columns=["step", value, "line"]).astype({"step": int, value: float, "line": str})


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points: the means of equal groups, each at its last step."""
    size = -(-len(points) // MAX_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size or 1))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
