"""The thread that hears of cancelled jobs: it waits inside Redis, so nobody has to ask between steps."""

from __future__ import annotations

import logging
import threading

from service.errors import NotReady
from service.heartbeat import RETRY_S
from service.queue.worker_queue import WorkerQueue

log = logging.getLogger(__name__)

WAIT_S = 0.25
"""Longest wait inside Redis, and so for this thread to end."""


class CancelWatch:
    """Collects the ids of jobs closed from outside until the main thread takes them."""

    def __init__(self, queue: WorkerQueue) -> None:
        self.queue = queue
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cancel-watch", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Listen no more; returns when the thread has ended, or hangs on a Redis that does."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=4 * WAIT_S)

    def take(self) -> set[str]:
        """Return what was cancelled since the last call; some may be other workers' jobs."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
        return cancelled

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                cancelled = self.queue.cancelled_jobs(wait_s=WAIT_S)
            except Exception as error:  # without this thread nothing could be cancelled
                if not isinstance(error, NotReady):  # of which the heartbeat tells
                    log.exception("could not hear of cancelled jobs")
                self._stop.wait(RETRY_S)
            else:
                with self._lock:
                    self._cancelled |= cancelled
