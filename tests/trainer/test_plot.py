"""Plots of runs that are short, broken off or unusual; and names that do not cover one another."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DataError
from trainer.plot import LABEL_APART, name_rows, plot_run, runs_without_gaps, smoothed, spread
from trainer.run_folder import RunFolder, append_row


def stage(name: str, start: int, end: int) -> dict[str, Any]:
    return {"name": name, "start_step": start, "end_step": end, "shares": {"input": 1.0}}


def run_of(folder: Path, steps: list[int], **changes: Any) -> RunFolder:
    run = RunFolder(folder)
    row = {"loss": 3.0, "learning_rate": 1e-3, "tokens_per_second": 9.0, "mfu": None, "source_loss": {"input": 3.0}}
    append_row(run.metrics, {"kind": "run", "stages": [stage("One", 0, 10), stage("Two", 10, 11)]})
    for step in steps:
        append_row(run.metrics, {"kind": "train", "step": step, **row, **changes})
    return run


@pytest.mark.parametrize("steps", [[1], [1, 2], [1, 10, 11]])
def test_a_run_just_begun_has_plots(tmp_path: Path, steps: list[int]) -> None:
    paths = plot_run(run_of(tmp_path, steps, mfu=0.4, source_share={"input": 1.0}))
    assert [path.name for path in paths] == [
        f"{name}.png" for name in ("loss", "loss_by_source", "bits_per_byte", "shares", "learning_rate", "throughput")
    ]


def test_rows_of_an_older_trainer_and_evaluations_without_text_are_drawn(tmp_path: Path) -> None:
    run = run_of(tmp_path, [1, 2])
    append_row(run.metrics, {"kind": "evaluation", "step": 2, "held_out": {}, "train_gap": {}})
    assert len(plot_run(run)) == 6


def test_nothing_logged_yet_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train rows yet"):
        plot_run(RunFolder(tmp_path))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_names_stand_apart_in_the_order_of_their_curves(heights: list[float]) -> None:
    placed = spread(heights)
    for (low, low_place), (high, high_place) in pairwise(sorted(zip(heights, placed, strict=True))):
        assert low <= high
        assert high_place - low_place >= LABEL_APART - 2e-3
    if len(heights) == 1:
        assert placed == heights


def test_a_name_wider_than_its_stage_sends_the_next_one_up() -> None:
    stages = [stage("Foundation", 0, 500), stage("A very long name of a stage", 500, 510), stage("Next", 510, 1000)]
    assert name_rows(stages, 1000) == [0, 0, 1]


def test_a_source_that_paused_has_no_line_across_the_pause() -> None:
    steps = [*range(10, 100, 10), *range(500, 600, 10)]
    parts = runs_without_gaps(steps, [1.0] * len(steps))
    assert [part[0][0] for part in parts] == [10, 500]
    assert runs_without_gaps([], []) == []
    assert runs_without_gaps([3], [1.0]) == [([3], [1.0])]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_smoothing_keeps_ends_and_straight_lines(values: list[float]) -> None:
    curve = smoothed(values)
    assert (curve[0], curve[-1]) == (values[0], values[-1])
    assert smoothed([2.0 * n for n in range(30)]) == pytest.approx([2.0 * n for n in range(30)])
