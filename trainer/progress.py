"""How far a long pass over text is: a bar on a terminal, a line now and then elsewhere, nothing when it is quick."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import NoReturn, Self

from tqdm import tqdm

QUIET_S = 2.0
LINE_EVERY_S = 5.0

log = logging.getLogger("trainer")


class Progress:
    """Counts units of work, `with Progress("input: encoding", total, unit="B") as progress: progress.update(n)`."""

    def __init__(self, what: str, total: int, *, unit: str, done: int = 0) -> None:
        """Begin, or go on from `done`: speed and time left count what is done from now on."""
        self.what, self.total, self.unit = what, total, unit
        self.done = self.done_before = done
        self.started = time.monotonic()
        self.next_line = self.started + QUIET_S
        self.bar: tqdm[NoReturn] | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=what, unit=f" {unit}", unit_scale=True, delay=QUIET_S, leave=False
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def rate(self, count: int) -> float:
        """`count` per second since the beginning."""
        return count / max(time.monotonic() - self.started, 1e-9)

    def update(self, count: int, also: str = "") -> None:
        """Add `count` units of work done; `also` is a further figure to show."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(also, refresh=False)
            self.bar.update(count)
        elif (now := time.monotonic()) >= self.next_line:
            self.next_line = now + LINE_EVERY_S
            left = max(0, self.total - self.done) / max(self.rate(self.done - self.done_before), 1e-9)
            log.info(
                "%s: %.0f %% of %s %s%s, about %s left",
                self.what,
                100 * self.done / max(1, self.total),
                f"{self.total:,}",
                self.unit,
                f", {also}" if also else "",
                duration(left),
            )


class Pace:
    """Speed and time left of a training, counted from the end of its first step: that one also compiles."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float]] = []

    def note(self, step: int, *, total_s: float, training_s: float) -> None:
        """Take down that a step is done: the clock's wall time, and its part spent on training."""
        self.steps[1:] = [(step, total_s, training_s)]

    def time_left(self, num_steps: int) -> float | None:
        """Seconds until the last step, evaluations and saves included; None after the first step."""
        if len(self.steps) < 2:
            return None
        (first, began, _), (last, now, _) = self.steps
        return (now - began) / (last - first) * (num_steps - last)

    def steps_per_second(self) -> float | None:
        """Of training alone; None after the first step."""
        if len(self.steps) < 2:
            return None
        (first, _, began), (last, _, now) = self.steps
        return (last - first) / max(now - began, 1e-9)


def duration(seconds: float) -> str:
    """4:05 or 1:02:09."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"
