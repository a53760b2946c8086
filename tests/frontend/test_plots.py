"""Rows of a run as lines, and numbers and texts as HTML."""

from __future__ import annotations

from typing import Any

from frontend.markup import count, facts, milliseconds, notice, plural, sample, stage_bar, table
from frontend.plots import MAX_POINTS, curve, loss_plot, thin

STAGES: list[dict[str, Any]] = [
    {"name": "First", "start_step": 0, "end_step": 5},
    {"name": "Second", "start_step": 5, "end_step": 10},
    {"name": "Third", "start_step": 10, "end_step": 20},
]


def train(step: int, **losses: float | None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "learning_rate": step / 10, "tokens_per_second": None, "source_loss": losses}


def evaluation(step: int, **losses: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "held_out": {name: {"loss": loss} for name, loss in losses.items()}}


def test_every_source_has_a_train_and_a_held_out_line_in_one_colour_each() -> None:
    rows = [train(1, prose=4.0), train(2, prose=3.0, code=5.0), evaluation(2, prose=3.5, code=5.5)]
    plot = loss_plot(rows, [])
    assert [name for name, _ in plot.legend] == ["prose, train", "prose, held-out", "code, train", "code, held-out"]
    assert len({colour for _, colour in plot.legend}) == 4
    points = plot.frame[plot.frame["line"] == "prose, train"]
    assert list(zip(points["step"], points["loss"], strict=True)) == [(1, 4.0), (2, 3.0)]


def test_a_stage_that_was_reached_has_a_line_from_the_lowest_to_the_highest_loss() -> None:
    plot = loss_plot([train(step, prose=9.0 - step) for step in range(1, 8)], STAGES)
    begins = plot.frame[plot.frame["line"] == "Second begins"]
    assert sorted(begins["loss"]) == [2.0, 8.0] and set(begins["step"]) == {5}
    assert "Third begins" not in set(plot.frame["line"])
    assert plot.legend[-1][0] == "a stage begins"


def test_losses_that_are_no_numbers_leave_a_gap() -> None:
    plot = loss_plot([train(1, prose=4.0), train(2, prose=None), train(3, prose=3.0)], STAGES)
    assert list(plot.frame["step"]) == [1, 3]


def test_a_run_without_rows_is_an_empty_plot() -> None:
    assert loss_plot([], STAGES).frame.empty
    assert curve([train(1)], "tokens_per_second").empty


def test_long_lines_become_means_of_equal_groups() -> None:
    points = [(step, float(step % 2)) for step in range(1, 10 * MAX_POINTS + 1)]
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert thinned[-1] == (10 * MAX_POINTS, 0.5)
    assert thin(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_values_are_escaped_wherever_they_stand() -> None:
    evil = '<img src=x onerror="alert(1)">'
    for html in (
        notice(evil),
        facts([(evil, evil, evil)]),
        table([evil], [[evil]], empty=""),
        sample(about=evil, prompt=evil, text=evil),
        stage_bar([(evil, 0, 1)], step=0, num_steps=1),
    ):
        assert "<img" not in html and "&lt;img" in html
        assert 'onerror="' not in html


def test_numbers_are_written_as_people_say_them() -> None:
    assert [count(number) for number in (512, 30_000, 3_475_712, 134_515_008)] == ["512", "30k", "3.48M", "135M"]
    assert [milliseconds(value) for value in (None, 41.4, 9_999, 12_345)] == [
        "\N{EN DASH}",
        "41 ms",
        "9,999 ms",
        "12.3 s",
    ]
    assert [plural(number, "worker") for number in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]


def test_a_stage_is_filled_as_far_as_the_run_is() -> None:
    html = stage_bar([(s["name"], s["start_step"], s["end_step"]) for s in STAGES], step=7, num_steps=20)
    assert html.count("width:100.0%") == 1 and "width:40.0%" in html and "width:0.0%" in html
    assert html.count("stage now") == 1
