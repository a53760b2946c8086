"""From an engine's outputs to writes in Redis: the first token at once, later ones together, all jobs in one call.

While Redis is away nothing is lost: outputs stay here and go out when it is back. They are bounded by what the engine
may hold, since a job takes no more tokens than were reserved for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from service.engine.sequence import Output
from service.queue.job import Chunk, Finish, LeasedJob, Verdict
from service.queue.worker_queue import WorkerQueue

FLUSH_INTERVAL_S = 0.015
"""Tokens that come faster than this go out together; nobody reads faster, and Redis has less to do."""


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
    timings: dict[str, float] = field(default_factory=dict)

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


class Publisher:
    """Collects outputs and delivers them. For one thread."""

    def __init__(self, queue: WorkerQueue, *, flush_interval_s: float = FLUSH_INTERVAL_S) -> None:
        self.queue = queue
        self.flush_interval_s = flush_interval_s
        self.pending: dict[str, Pending] = {}
        self.is_urgent = False
        self.flushed_at_s = 0.0
        self.flush_s = 0.0
        """How long the last delivery took."""
        self._lost: set[str] = set()
        self._refused: list[Verdict] = []

    def add(self, job: LeasedJob, output: Output) -> None:
        """Note what a step brought a job."""
        pending = self.pending.get(job.id)
        if pending is None:
            pending = self.pending[job.id] = Pending(job, output.first_index)
        pending.token_ids += output.token_ids
        pending.text += output.text
        if output.logprobs is not None:
            pending.logprobs = [*(pending.logprobs or ()), *output.logprobs]
        if output.prompt_scores is not None:
            pending.prompt_scores = output.prompt_scores.to_text()
        if output.finish_reason is not None:
            pending.finish = Finish(reason=output.finish_reason, stop_sequence=output.stop_sequence, error=output.error)
            pending.timings = {name: value for name, value in output.timings.items() if name != "decode_ms"}
        is_first = output.first_index == len(job.completion_ids)
        self.is_urgent |= is_first or pending.finish is not None

    def fail(self, job: LeasedJob, error: str) -> None:
        """End a job that cannot be served; `error` is one sentence for its client."""
        pending = self.pending.setdefault(job.id, Pending(job, len(job.completion_ids)))
        pending.finish = Finish(reason="error", error=error)
        self.is_urgent = True

    def drop(self, job_id: str) -> None:
        """Forget what was not delivered: nobody wants it any more."""
        self.pending.pop(job_id, None)

    def is_due(self) -> bool:
        """Whether to deliver now."""
        if not self.pending:
            return False
        return self.is_urgent or time.monotonic() - self.flushed_at_s >= self.flush_interval_s

    def flush(self) -> set[str]:
        """Deliver everything; return the ids of the jobs that this worker must drop.

        Raises:
            NotReady: Redis is away; what it did not take stays here.
        """
        started_s = time.monotonic()
        self._deliver()
        self.is_urgent = False
        self.flushed_at_s = time.monotonic()
        self.flush_s = self.flushed_at_s - started_s
        lost, self._lost = self._lost, set()
        return lost

    def take_refused(self) -> list[Verdict]:
        """Return why Redis refused writes since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def _deliver(self) -> None:
        unheard: list[LeasedJob] = []
        writes = [
            (pending.job, chunk)
            for pending in self.pending.values()
            if pending.finish is None and pending.token_ids and (chunk := pending.chunk()) is not None
        ]
        for (job, _), (verdict, _) in zip(writes, self.queue.append(writes), strict=True):
            del self.pending[job.id]
            if verdict is not Verdict.OK:
                self._refused.append(verdict)
                self._lost.add(job.id)
            if verdict is Verdict.GAP:
                unheard.append(job)
        endings = [pending for pending in self.pending.values() if pending.finish is not None]
        verdicts = self.queue.finish_many(
            [(it.job, it.finish, it.chunk(), it.timings) for it in endings if it.finish is not None]
        )
        for pending, verdict in zip(endings, verdicts, strict=True):
            del self.pending[pending.job.id]
            if verdict is not Verdict.OK:
                self._refused.append(verdict)
            if verdict is Verdict.GAP:
                unheard.append(pending.job)
        # Redis lost tokens that this process does not have either: the next attempt goes on from what is there.
        self.queue.release(unheard)
