"""Long passes speak, quick ones do not."""

from __future__ import annotations

import logging

import pytest

from trainer import progress
from trainer.progress import Pace, Progress


def test_a_quick_pass_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trainer"), Progress("input: reading", 100, unit="B") as passing:
        for _ in range(10):
            passing.update(10)
    assert passing.done == 100
    assert not caplog.text


def test_a_long_pass_says_how_far_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    with caplog.at_level(logging.INFO, logger="trainer"), Progress("input: reading", 1_000, unit="B") as passing:
        passing.update(250)
        passing.update(250)
    assert [message[:30] for message in caplog.messages] == ["input: reading: 25 % of 1,000 B"[:30]]


def test_the_time_left_is_reckoned_without_the_first_step_which_compiles() -> None:
    pace = Pace()
    pace.note(1, total_s=60, training_s=60)
    assert pace.time_left(101) is None and pace.steps_per_second() is None
    pace.note(2, total_s=62, training_s=61)
    assert pace.time_left(101) == 2 * 99 and pace.steps_per_second() == 1
    pace.note(11, total_s=80, training_s=70)
    assert pace.time_left(101) == 2 * 90 and pace.steps_per_second() == 1
