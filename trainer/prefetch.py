"""The next step's batch, made by a thread while this step is computed.

A batch is a pure function of its step, so nothing goes wrong by asking early: what nobody fetches is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """`make(step)` for step after step, one of them ahead of time."""

    def __init__(self, make: Callable[[int], T], *, ahead: bool) -> None:
        self.make = make
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if ahead else None
        self.waiting: tuple[int, Future[T]] | None = None

    def __call__(self, step: int) -> T:
        """Return `make(step)` and start on the step after it; an error of `make` is raised here."""
        waiting, self.waiting = self.waiting, None
        made = waiting[1].result() if waiting and waiting[0] == step else self.make(step)
        if self.executor:
            self.waiting = (step + 1, self.executor.submit(self.make, step + 1))
        return made
