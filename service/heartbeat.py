"""The thread that keeps a worker's leases while its main thread computes, and tells everyone that it lives.

It is also the one that tries whether a Redis that went away is back: a call to a Redis that hangs takes seconds, which
the main thread spends on computing instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from service.errors import NotReady
from service.queue.job import LeasedJob, Verdict, WorkerInfo
from service.queue.worker_queue import WorkerQueue

log = logging.getLogger(__name__)

ANNOUNCE_EVERY_S = 2.0
REAP_EVERY_S = 1.0
RETRY_S = 0.25
STUCK_AFTER_S = 120.0
"""A main thread silent for this long hangs; its leases are let go so that another worker takes its jobs."""


class Heartbeat:
    """Beats four times per lease, announces, and closes what is overdue."""

    def __init__(
        self,
        queue: WorkerQueue,
        *,
        lease_s: float,
        jobs: Callable[[], Sequence[LeasedJob]],
        describe: Callable[[], WorkerInfo],
    ) -> None:
        self.queue = queue
        self.interval_s = min(lease_s / 4, REAP_EVERY_S)
        self.jobs = jobs
        self.describe = describe
        self.alive_at_s = time.monotonic()
        self.is_connected = True
        """Whether Redis answered last; the main thread leaves it alone while it did not."""
        self._announce_lock = threading.Lock()
        self._announced_at_s = self._reaped_at_s = 0.0
        self._lost: list[LeasedJob] = []
        self._lost_lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; returns when the thread has ended, or hangs on a Redis that does."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def tick(self) -> None:
        """The main thread says that it does not hang."""
        self.alive_at_s = time.monotonic()

    def lost_connection(self, error: NotReady) -> None:
        """A call of any thread found Redis away."""
        if self.is_connected:
            log.warning("%s The worker goes on with what it has.", error)
        self.is_connected = False

    def take_lost(self) -> list[LeasedJob]:
        """Return the leases that were refused since the last call."""
        with self._lost_lock:
            lost, self._lost = self._lost, []
        return lost

    def announce(self) -> None:
        """Tell what this worker serves, from any thread. Raises `NotReady`."""
        with self._announce_lock:
            self.queue.announce(self.describe())
            self._announced_at_s = time.monotonic()

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s if self.is_connected else RETRY_S):
            try:
                self.beat()
            except NotReady as error:
                self.lost_connection(error)
            except Exception:  # without this thread every lease would run out
                log.exception("a heartbeat failed")

    def beat(self) -> None:
        """Renew all leases, and say and close what is due. Raises `NotReady`."""
        now_s = time.monotonic()
        if now_s - self.alive_at_s > STUCK_AFTER_S:
            log.error("no step ended for %.0f s; the leases of this worker run out", now_s - self.alive_at_s)
            return
        jobs = self.jobs()
        verdicts = self.queue.heartbeat(jobs)
        with self._lost_lock:
            self._lost += [job for job, verdict in zip(jobs, verdicts, strict=True) if verdict is not Verdict.OK]
        if now_s - self._announced_at_s >= ANNOUNCE_EVERY_S or not self.is_connected:
            self.announce()  # an empty Redis that came back knows no worker
        if not self.is_connected:
            log.info("Redis answers again")
            self.is_connected = True
        if now_s - self._reaped_at_s >= REAP_EVERY_S:
            self.queue.reap()
            self._reaped_at_s = now_s
