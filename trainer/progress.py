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

    def __init__(self, what: str, total: int, *, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.started = time.monotonic()
        self.next_line = self.started + QUIET_S
        self.bar: tqdm[NoReturn] | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True, delay=QUIET_S, leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int) -> None:
        """Add `count` units of work done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif (now := time.monotonic()) >= self.next_line:
            self.next_line = now + LINE_EVERY_S
            rate = self.done / (now - self.started)
            log.info(
                "%s: %.0f %% of %s %s, about %.0f s left",
                self.what,
                100 * self.done / self.total,
                f"{self.total:,}",
                self.unit,
                (self.total - self.done) / rate,
            )
