"""The worker's side of the queue: take jobs, deliver tokens, keep leases. Blocking; safe to share between threads.

Every write carries the job's attempt. An answer of `FENCED` or `CANCEL` means: drop the sequence and write nothing
more for it. Methods raise `NotReady` while Redis is away; every one of them may simply be called again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import redis

from service.queue import keys
from service.queue.connection import MAX_BLOCK_S, redis_errors_as_not_ready
from service.queue.job import Chunk, Finish, FinishReason, JobState, LeasedJob, QueueLimits, Verdict, WorkerInfo
from service.queue.records import read_lease
from service.queue.scripts import BlockingScripts

STATE_OF_REASON: Mapping[FinishReason, JobState] = {
    "stop": JobState.SUCCEEDED,
    "length": JobState.SUCCEEDED,
    "cancelled": JobState.CANCELLED,
    "deadline": JobState.EXPIRED,
    "error": JobState.FAILED,
}

Write = tuple[LeasedJob, Chunk]


@dataclass(slots=True)
class Delivered:
    """What this process delivered of one running job."""

    attempt: int
    chunks: list[Chunk]
    is_unread: bool = False


class WorkerQueue:
    """One worker process' view of the queue."""

    def __init__(self, client: redis.Redis, *, worker_id: str, limits: QueueLimits) -> None:
        self.worker_id = worker_id
        self.limits = limits
        self._client = client
        self._scripts = BlockingScripts(client)
        self._models: tuple[str, ...] = ()
        self._cancel_cursor = "0-0"
        # What this process delivered of each running job. A Redis that restarts may lose its last second; it then
        # answers GAP with the index it still has, and is sent the rest again.
        self._delivered: dict[str, Delivered] = {}
        self._lock = threading.Lock()

    def announce(self, info: WorkerInfo) -> None:
        """Tell that this worker lives and what it serves; call every 2 to 3 s, it is believed for 10 s."""
        served = () if info.draining else tuple(info.models)
        models = dict.fromkeys(self._models, 0) | dict.fromkeys(served, 1)
        self._announce(json.dumps(asdict(info)), models)
        self._models = served

    def withdraw(self) -> None:
        """Say goodbye: no request is admitted on this worker's account any more."""
        self._announce("", dict.fromkeys(self._models, 0))
        self._models = ()

    def _announce(self, info: str, models: Mapping[str, int]) -> None:
        flat = [part for pair in models.items() for part in pair]
        self._scripts.run("announce", self.worker_id, info, keys.WORKER_ALIVE_MS, *flat)

    def next(
        self, model: str, revision: str, *, num_slots: int, num_tokens: int, num_spare: int = 0
    ) -> list[LeasedJob]:
        """Take up to `num_slots` jobs whose cost fits `num_tokens` together: lost workers' jobs first.

        The last `num_spare` of the slots are not for an API key that has more than half of what runs anywhere.
        A job that already delivered tokens comes with them (`completion_ids`); go on behind them.
        """
        if num_slots <= 0 or num_tokens <= 0:
            return []
        replies = self._scripts.run(
            "next",
            self.worker_id,
            model,
            revision,
            num_slots,
            num_tokens,
            self.limits.lease_ms,
            self.limits.max_attempts,
            num_spare,
        )
        jobs = [read_lease(reply) for reply in replies]
        with self._lock:
            for job in jobs:
                self._delivered[job.id] = Delivered(job.attempt, list(job.chunks))
        return jobs

    def wait_for_work(self, timeout_s: float = MAX_BLOCK_S) -> bool:
        """Sleep until a job of an announced model may be waiting, at most `timeout_s` (and 1 s); True when woken."""
        with redis_errors_as_not_ready():
            bells = [keys.BELL + model for model in self._models] or [keys.BELL]
            return self._client.blpop(bells, timeout=min(timeout_s, MAX_BLOCK_S)) is not None

    def append(self, writes: Sequence[Write]) -> list[tuple[Verdict, int]]:
        """Deliver chunks of any number of jobs in one round trip; each renews its job's lease.

        Returns one (verdict, tokens that Redis now holds) per chunk. Chunks must carry tokens; text that remains
        without one goes with `finish`. Calling again with the same chunks is harmless.
        """
        if not writes:
            return []
        assert all(chunk.token_ids for _, chunk in writes), "text without tokens belongs to finish()"
        for job, chunk in writes:
            self._remember(job, chunk)
        answers = self._append(writes)
        for i, (verdict, index) in enumerate(answers):
            if verdict is Verdict.GAP:
                answers[i] = self._resend(writes[i][0], index)
            elif verdict is not Verdict.OK:
                self._forget(writes[i][0])
        return answers

    def is_unread(self, job_id: str) -> bool:
        """Whether nobody followed a job's tokens when its last chunk was delivered: it is for an answer as a whole."""
        delivered = self._delivered.get(job_id)
        return delivered is not None and delivered.is_unread

    def finish(
        self,
        job: LeasedJob,
        finish: Finish,
        *,
        chunk: Chunk | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> Verdict:
        """End a job together with its last chunk (which may be text without tokens), in one step.

        `timings` may hold "prefill_ms" and "cached_tokens". An ending sent twice is OK twice.
        """
        return self.finish_many([(job, finish, chunk, timings)])[0]

    def finish_many(
        self, endings: Sequence[tuple[LeasedJob, Finish, Chunk | None, Mapping[str, float] | None]]
    ) -> list[Verdict]:
        """As `finish`, for several jobs in one round trip."""
        if not endings:
            return []
        answers = self._finish(endings)
        for i, (verdict, index) in enumerate(answers):
            job = endings[i][0]
            if verdict is Verdict.GAP and self._resend(job, index)[0] is Verdict.OK:
                answers[i] = self._finish([endings[i]])[0]
            self._forget(job)
        return [verdict for verdict, _ in answers]

    def release(self, jobs: Sequence[LeasedJob]) -> list[Verdict]:
        """Hand jobs over to whoever asks next, at once; this worker's later writes to them are refused."""
        if not jobs:
            return []
        replies = self._scripts.run("release", *_identities(jobs))
        for job in jobs:
            self._forget(job)
        return [Verdict(reply) for reply in replies]

    def heartbeat(self, jobs: Sequence[LeasedJob]) -> list[Verdict]:
        """Renew leases while no tokens flow (prefill, compilation); call every quarter of a lease, from any thread."""
        if not jobs:
            return []
        verdicts = [
            Verdict(reply) for reply in self._scripts.run("heartbeat", self.limits.lease_ms, *_identities(jobs))
        ]
        for job, verdict in zip(jobs, verdicts, strict=True):
            if verdict is not Verdict.OK:
                self._forget(job)
        return verdicts

    def cancelled_jobs(self, *, wait_s: float = 0.0) -> set[str]:
        """Return ids of running jobs closed from outside since the last call; some may be other workers' jobs.

        Where there are none it waits for some inside Redis, at most `wait_s` (and 1 s). For one thread.
        """
        block_ms = round(1000 * min(wait_s, MAX_BLOCK_S)) or None
        with redis_errors_as_not_ready():
            reply: Any = self._client.xread({keys.CANCELLED: self._cancel_cursor}, block=block_ms)
        cancelled = set()
        for _, entries in reply or []:
            for entry_id, fields in entries:
                self._cancel_cursor = entry_id
                cancelled.add(fields["j"])
        with self._lock:
            for job_id in cancelled:
                self._delivered.pop(job_id, None)
        return cancelled

    def reap(self) -> int:
        """Close jobs whose deadline passed or whose listener is gone; call about once a second."""
        closed, lost = self._scripts.run("reap", keys.WATCH_MS, keys.PAUSE_MS)
        if lost:
            self._scripts.run("audit")
        return int(closed)

    def _append(self, writes: Sequence[Write]) -> list[tuple[Verdict, int]]:
        arguments: list[str | int] = []
        for job, chunk in writes:
            arguments += [job.id, job.attempt, chunk.first_index, chunk.end_index, len(chunk.text), chunk.to_json()]
        flat = self._scripts.run("append", self.limits.lease_ms, *arguments)
        with self._lock:
            for (job, chunk), num_readers in zip(writes, map(int, flat[2::3]), strict=True):
                # A first chunk may come before its reader; of what was not published (-1) nothing is known; and what
                # another thread forgot meanwhile stays forgotten.
                delivered = self._delivered.get(job.id)
                if delivered is not None and chunk.first_index > 0 and num_readers >= 0:
                    delivered.is_unread = num_readers == 0
        return _verdicts(flat[::3], flat[1::3])

    def _finish(
        self, endings: Sequence[tuple[LeasedJob, Finish, Chunk | None, Mapping[str, float] | None]]
    ) -> list[tuple[Verdict, int]]:
        arguments: list[str | int | float] = []
        for job, finish, chunk, timings in endings:
            if chunk is None:
                end = self._end_of(job)
                span: list[str | int | float] = [end, end, 0, ""]
            else:
                content = "" if chunk.is_empty else chunk.to_json()
                span = [chunk.first_index, chunk.end_index, len(chunk.text), content]
            arguments += [job.id, job.attempt, *span, STATE_OF_REASON[finish.reason], finish.reason]
            arguments += [finish.stop_sequence or "", finish.error or "", finish.code or ""]
            arguments += [(timings or {}).get(name, "") for name in ("prefill_ms", "cached_tokens")]
        flat = self._scripts.run("finish", *arguments)
        return _verdicts(flat[::2], flat[1::2])

    def _resend(self, job: LeasedJob, index: int) -> tuple[Verdict, int]:
        """Send again what a restarted Redis lost behind `index`; stays GAP only if this process never had it."""
        with self._lock:
            delivered = list(self._of(job).chunks)
        missing = [(job, chunk) for chunk in delivered if chunk.first_index >= index]
        if not missing or missing[0][1].first_index != index:
            return Verdict.GAP, index
        return self._append(missing)[-1]

    def _remember(self, job: LeasedJob, chunk: Chunk) -> None:
        with self._lock:
            delivered = self._of(job).chunks
            if not delivered or delivered[-1].end_index == chunk.first_index:
                delivered.append(chunk)

    def _of(self, job: LeasedJob) -> Delivered:
        """Return what this attempt delivered; an older attempt gets a record of its own that nobody keeps."""
        delivered = self._delivered.get(job.id)
        if delivered is None or delivered.attempt != job.attempt:
            is_newest = delivered is None or delivered.attempt < job.attempt
            delivered = Delivered(job.attempt, list(job.chunks))
            if is_newest:
                self._delivered[job.id] = delivered
        return delivered

    def _forget(self, job: LeasedJob) -> None:
        with self._lock:
            if job.id in self._delivered and self._delivered[job.id].attempt <= job.attempt:
                del self._delivered[job.id]

    def _end_of(self, job: LeasedJob) -> int:
        with self._lock:
            delivered = self._of(job).chunks
            return delivered[-1].end_index if delivered else 0


def _identities(jobs: Sequence[LeasedJob]) -> list[str | int]:
    return [part for job in jobs for part in (job.id, job.attempt)]


def _verdicts(names: Sequence[str], indices: Sequence[int]) -> list[tuple[Verdict, int]]:
    return [(Verdict(name), int(index)) for name, index in zip(names, indices, strict=True)]
