"""From an engine's outputs to writes in Redis: the first token at once, later ones together, all jobs in one call.

A thread of its own, the courier, waits for Redis while the engine computes the next step. While Redis is away nothing
is lost: what it did not take comes back here and goes out when it is there again. That is bounded by what the engine
may hold, since a job takes no more tokens than were reserved for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

from service.engine.sequence import Output
from service.errors import NotReady
from service.queue.job import Chunk, Finish, LeasedJob, Verdict
from service.queue.worker_queue import WorkerQueue

FLUSH_INTERVAL_S = 0.015
"""Tokens that come faster than this go out together; nobody reads faster, and Redis has less to do."""
FLUSH_INTERVAL_PER_STREAM_S = 0.0025
"""A chunk costs Redis, API and client some 150 us of CPU: so 32 streams take 3 % of two cores."""
MAX_FLUSH_INTERVAL_S = 0.08
"""A dozen events a second still look like a steady flow."""
UNREAD_INTERVAL_S = 0.25
"""Tokens that nobody follows as they come are written only so that another worker need not draw them again. A reader
who comes later waits this long, once."""


@dataclass(slots=True)
class Pending:
    """What one job has produced since the last write."""

    job: LeasedJob
    first_index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[str, Any]] | None = None
    prompt_scores: str | None = None
    finish: Finish | None = None
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def can_go(self) -> bool:
        """Whether there is a token or an end: text alone waits for one."""
        return bool(self.token_ids) or self.finish is not None

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for it: the first token and the end."""
        return self.finish is not None or self.first_index == len(self.job.completion_ids)

    def add(self, output: Output) -> None:
        """Note what a step brought."""
        self.token_ids += output.token_ids
        self.text += output.text
        if output.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *output.logprobs]
        if output.prompt_scores is not None:
            self.prompt_scores = output.prompt_scores.to_text()
        if output.finish_reason is not None:
            self.finish = Finish(reason=output.finish_reason, stop_sequence=output.stop_sequence, error=output.error)
            self.timings = output.timings

    def chunk(self) -> Chunk | None:
        """All of it as one chunk; None if there is nothing to say."""
        chunk = Chunk(
            first_index=self.first_index,
            token_ids=tuple(self.token_ids),
            text=self.text,
            logprobs=tuple(self.logprobs) if self.logprobs is not None else None,
            prompt_scores=self.prompt_scores,
        )
        return None if chunk.is_empty else chunk


@dataclass(slots=True)
class Delivery:
    """What goes to Redis together, and what became of it so far."""

    left: dict[str, Pending]
    """By job: what Redis has not taken yet."""
    to_hand_over: list[LeasedJob] = field(default_factory=list)
    """Jobs of which Redis knows less than this process can send, to be handed over to whoever goes on from there."""
    lost: list[LeasedJob] = field(default_factory=list)
    """Leases that are over: the worker drops these sequences, unless it holds the job by a later one."""
    refused: list[Verdict] = field(default_factory=list)
    error: NotReady | None = None
    """Why something is left; the verdicts above were heard before."""
    seconds: float = 0.0


class Publisher:
    """Collects outputs and has them delivered. For one thread."""

    def __init__(self, queue: WorkerQueue) -> None:
        self.queue = queue
        self.pending: dict[str, Pending] = {}
        self._read_sent_at_s = 0.0  # what somebody follows
        self._all_sent_at_s = 0.0
        self._courier = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="courier")
        self._future: futures.Future[None] | None = None
        self._delivery = Delivery({})

    @property
    def has_undelivered(self) -> bool:
        return bool(self.pending or self._delivery.left or self._delivery.to_hand_over) or self._future is not None

    def add(self, job: LeasedJob, output: Output) -> None:
        """Note what a step brought a job."""
        pending = self.pending.get(job.id)
        if pending is None:
            pending = self.pending[job.id] = Pending(job, output.first_index)
        pending.add(output)

    def fail(self, job: LeasedJob, error: str, *, code: str | None = None) -> None:
        """End a job that cannot be served; `error` is one sentence for its client, `code` for programs."""
        pending = self.pending.setdefault(job.id, Pending(job, len(job.completion_ids)))
        pending.finish = Finish(reason="error", error=error, code=code)

    def drop(self, job_id: str) -> None:
        """Forget what was not delivered: nobody wants it any more."""
        self.pending.pop(job_id, None)
        if self._future is None:  # what is on its way, Redis refuses by itself
            self._delivery.left.pop(job_id, None)

    def send(self, *, everything: bool = False) -> None:
        """Hand what is due, or everything, to the courier; nothing while it is on its way.

        What Redis did not take goes first and unchanged: it may have taken it without saying so, and knows it again.
        """
        if self._future is not None:
            return
        to_hand_over = self._delivery.to_hand_over
        due = self._delivery.left or self._take_due(everything)
        if not due and not to_hand_over:
            return
        self._delivery = Delivery(due, to_hand_over)
        self._future = self._courier.submit(write_to_redis, self.queue, self._delivery)

    def take_result(self, *, wait_s: float = 0.0) -> Delivery | None:
        """Return what became of the last delivery, once; None before it is known.

        With an `error` Redis is away; what it did not take is sent again.
        """
        if self._future is not None and wait_s > 0:
            futures.wait([self._future], wait_s)
        if self._future is None or not self._future.done():
            return None
        future, self._future = self._future, None
        future.result()
        return self._delivery

    def close(self) -> None:
        """Let the courier end its way, and go."""
        self._courier.shutdown()

    def _take_due(self, everything: bool) -> dict[str, Pending]:
        """Take what is due: the urgent at once, the rest when its time has come."""
        now_s = time.monotonic()
        unread = {job_id for job_id in self.pending if self.queue.is_unread(job_id)}
        num_read = len(self.pending) - len(unread)
        interval_s = min(max(FLUSH_INTERVAL_S, num_read * FLUSH_INTERVAL_PER_STREAM_S), MAX_FLUSH_INTERVAL_S)
        is_time_for_all = everything or now_s - self._all_sent_at_s >= UNREAD_INTERVAL_S
        is_time_for_read = is_time_for_all or now_s - self._read_sent_at_s >= interval_s

        def is_due(job_id: str, it: Pending) -> bool:
            is_time = is_time_for_all or (is_time_for_read and job_id not in unread)
            return it.can_go and (is_time or it.is_urgent)

        due = {job_id: it for job_id, it in self.pending.items() if is_due(job_id, it)}
        for job_id in due:
            del self.pending[job_id]
        if due and is_time_for_read:
            self._read_sent_at_s = now_s
        if due and is_time_for_all:
            self._all_sent_at_s = now_s
        return due


def write_to_redis(queue: WorkerQueue, delivery: Delivery) -> None:
    """Write everything, striking out what Redis took or refused."""
    started_s = time.monotonic()
    all_pending = list(delivery.left.values())
    writes = [
        (pending.job, chunk)
        for pending in all_pending
        if pending.finish is None and (chunk := pending.chunk()) is not None
    ]
    endings = [(it.job, it.finish, it.chunk(), it.timings) for it in all_pending if it.finish is not None]
    try:
        verdicts = (verdict for verdict, _ in queue.append(writes))
        strike_out(delivery, (job for job, _ in writes), verdicts, are_over=False)
        strike_out(delivery, (job for job, *_ in endings), queue.finish_many(endings), are_over=True)
        # Redis lost tokens that this process does not have either: the next attempt goes on from what is there.
        queue.release(delivery.to_hand_over)
        delivery.to_hand_over = []
    except NotReady as error:
        delivery.error = error
    delivery.seconds = time.monotonic() - started_s


def strike_out(delivery: Delivery, jobs: Iterable[LeasedJob], verdicts: Iterable[Verdict], *, are_over: bool) -> None:
    """Note what Redis said of each job."""
    for job, verdict in zip(jobs, verdicts, strict=True):
        del delivery.left[job.id]
        if verdict is not Verdict.OK:
            delivery.refused.append(verdict)
            if not are_over:
                delivery.lost.append(job)
        if verdict is Verdict.GAP:
            delivery.to_hand_over.append(job)
