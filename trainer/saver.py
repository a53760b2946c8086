"""Saving beside training: between two steps the state is copied, and a thread writes the copy while training goes on.

Training waits for the copy only: 1.6 GB for SmolLM2-135M, well under a second, where writing, hashing and syncing it
takes several. One copy exists at a time, so memory is bounded; what goes wrong in the thread is raised in the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from shared.errors import StorageError
from trainer.state import Best, Checkpoints

logger = logging.getLogger("trainer")


class Saver:
    """Writes the checkpoints of one run, one after another, in a thread of its own."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.best = checkpoints.best()
        """The best checkpoint, that of a save under way included."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._writing: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._writing is not None and not self._writing.done()

    def save(self, payload: dict[str, Any]) -> None:
        """Copy `payload` and write it in the background, after whatever is still being written.

        Raises:
            StorageError: the save before this one failed.
        """
        self.wait()
        copy, when_copied = snapshot(payload), copies_done()
        self._writing = self._thread.submit(self._write, copy, when_copied)

    def _write(self, payload: dict[str, Any], when_copied: Callable[[], None]) -> None:
        when_copied()
        self.checkpoints.save(payload)

    def mark_best(self, best: Best) -> None:
        """Protect the checkpoint of `best.step`, saved or being saved, until a better one is marked.

        Raises:
            StorageError: that save failed.
        """
        earlier, self.best = self._writing, best
        self._writing = self._thread.submit(self._mark, best, earlier)

    def _mark(self, best: Best, earlier: Future[None] | None) -> None:
        if earlier is not None:
            earlier.result()  # ended already: one thread does one thing after another
        self.checkpoints.mark_best(best)

    def check(self) -> None:
        """Raise what went wrong in the background, if anything has by now.

        Raises:
            StorageError: the disk refused; every earlier checkpoint is whole.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            StorageError: the disk refused; every earlier checkpoint is whole.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except StorageError as error:
                raise self.explained(error) from error

    def explained(self, error: StorageError) -> StorageError:
        """Say besides what a person has left."""
        steps = self.checkpoints.steps()
        rest = f"the checkpoint of step {steps[-1]} is whole: the same command goes on from there" if steps else ""
        return StorageError(f"{error}; {rest or 'no checkpoint had been written yet'}")

    def close(self) -> None:
        """End the thread after what it is doing; for a run that ends with another error, which comes first."""
        try:
            self.wait()
        except StorageError as error:
            logger.error("%s", error)
        self._thread.shutdown()


def snapshot(value: Any) -> Any:
    """Copy every tensor in nested containers to the CPU; from a GPU to pinned memory and without waiting."""
    if isinstance(value, Tensor):
        if value.device.type == "cuda":
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            return pinned.copy_(value.detach(), non_blocking=True)
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [snapshot(inner) for inner in value]
    return value


def copies_done() -> Callable[[], None]:
    """Return what waits until the copies asked for so far have arrived; updates asked for later come after them."""
    if not torch.cuda.is_available():
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize
