"""SIGTERM and Ctrl-C ask a run to stop; they never interrupt an update or a save."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)

PATIENCE_S = 1.0
"""A container is killed ten seconds after it was asked; a step that takes longer than this is given up for the save."""


class StopRequest:
    """While entered, the first signal only sets `requested`; a second one acts as if nobody listened."""

    def __init__(self) -> None:
        self.requested_at: float | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.ask()
        self.restore()

    def ask(self) -> None:
        """Ask as a signal would."""
        self.requested_at = self.requested_at or time.monotonic()

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    @property
    def is_urgent(self) -> bool:
        """Whether the request is older than `PATIENCE_S`."""
        return self.requested_at is not None and time.monotonic() - self.requested_at > PATIENCE_S

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
