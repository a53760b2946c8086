"""The API's side of the queue: admit, read, cancel, count. Asyncio.

Methods raise `NotReady` at once while Redis is away or out of memory: there is no queue in front of the queue.
"""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import time
from dataclasses import astuple, dataclass, replace
from typing import Any, Final, TypeVar

import redis.asyncio

from service.api_keys import ANYBODY, PRIORITIES, ApiKey
from service.errors import IdempotencyConflict, NotReady, QueueFull
from service.queue import keys
from service.queue.connection import answer_in_time
from service.queue.job import Admission, JobRecord, JobRequest, ModelStatistics, QueueLimits, WorkerInfo
from service.queue.records import read_place, read_record
from service.queue.scripts import AsyncScripts

logger = logging.getLogger(__name__)

MAX_REMEMBERED: Final = 2_000
"""Jobs with a listener that a process could admit again; a request is a few KB."""
NO_WORKER_RETRY_S: Final = 5.0
UNKNOWN_SPEED_RETRY_S: Final = 5.0
RETRY_RANGE_S: Final = (1.0, 120.0)
JITTER: Final = random.Random()
"""Not the global generator: whoever runs the API inside a process of their own may have seeded that one."""


Limit = TypeVar("Limit", int, float)


@dataclass(frozen=True, kw_only=True)
class Application:
    """What `lua/admit` reads of a job, by the names and in the order of its ARGV; "" is no limit, no key, no trace."""

    id: str
    model: str
    request: str
    key: str
    class_: int
    cost: int
    timeout_ms: int
    keep_ms: int
    watch_ms: int
    trace: str
    max_jobs: int
    max_cost: int
    alive_ms: int
    idempotency: str
    sha: str
    who: str
    weight: float
    jobs_per_minute: float | str
    cost_per_minute: float | str
    max_jobs_of_key: int | str

    def as_arguments(self) -> tuple[str | int | float, ...]:
        return astuple(self)

    def again(self, *, timeout_s: float) -> Application:
        """The same job once more, for what is left of its time: it was accepted once, so no bound refuses it now."""
        return replace(
            self,
            timeout_ms=milliseconds(timeout_s),
            max_jobs=2**31,
            max_cost=2**53,
            jobs_per_minute="",
            cost_per_minute="",
            max_jobs_of_key="",
        )


@dataclass(frozen=True)
class Admitted:
    """A job as it was admitted, and the moment of a monotonic clock until which it may run."""

    application: Application
    until_s: float


class JobQueue:
    """One API process' view of the queue."""

    def __init__(self, client: redis.asyncio.Redis, *, limits: QueueLimits) -> None:
        self.limits = limits
        self._client = client
        self._scripts = AsyncScripts(client)
        self._listened_to: dict[str, Admitted] = {}

    async def admit(
        self,
        request: JobRequest,
        *,
        key: str = "",
        entitled_to: ApiKey = ANYBODY,
        priority: int = 1,
        timeout_s: float,
        idempotency: tuple[str, str] | None = None,
        cancel_on_disconnect: bool = False,
        trace: str | None = None,
    ) -> Admission:
        """Accept a job or refuse it before anything is reserved.

        Args:
            key: whose job this is, for fair share; a name or a hash, never the secret itself.
            entitled_to: that key's weight and limits.
            priority: 0 high, 1 normal, 2 batch.
            timeout_s: from now until the job expires, queued or running.
            idempotency: (Idempotency-Key, hash of the body).
            cancel_on_disconnect: cancel when nobody has followed it (`TokenStreams`) for 15 s.

        Raises:
            QueueFull: too many jobs or too much cost are waiting, in all or of this key, or its rate is used up;
                carries `retry_after_s`. Who comes back then goes before newcomers.
            NotReady: no live worker serves the model, or Redis is away or out of memory.
            IdempotencyConflict: the same key came with another body.
        """
        assert priority in PRIORITIES.values(), priority
        known_as, body = ("", "")
        if idempotency is not None:
            known_as = hashlib.sha256("\0".join((key, idempotency[0])).encode(errors="surrogatepass")).hexdigest()
            body = hashlib.sha256(idempotency[1].encode(errors="surrogatepass")).hexdigest()
        application = Application(
            id=new_job_id(),
            model=request.model,
            request=request.to_json(),
            key=key,
            class_=priority,
            cost=request.cost,
            timeout_ms=milliseconds(timeout_s),
            keep_ms=round(self.limits.result_ttl_s * 1000),
            watch_ms=keys.WATCH_MS if cancel_on_disconnect else 0,
            trace=trace or "",
            max_jobs=self.limits.max_queued_jobs,
            max_cost=self.limits.max_queued_tokens,
            alive_ms=keys.WORKER_ALIVE_MS,
            idempotency=known_as,
            sha=body,
            who=fingerprint(request, key),
            weight=entitled_to.weight,
            jobs_per_minute=or_nothing(entitled_to.requests_per_minute),
            cost_per_minute=or_nothing(entitled_to.tokens_per_minute),
            max_jobs_of_key=or_nothing(entitled_to.max_queued_jobs),
        )
        answer, *values = await self._scripts.run("admit", *application.as_arguments())
        if answer in ("admitted", "known"):
            job_id, standing = values
            position, eta_s = read_place(standing)
            if answer == "admitted" and cancel_on_disconnect:
                self._remember(job_id, Admitted(application, time.monotonic() + timeout_s))
            return Admission(id=job_id, position=position, eta_s=eta_s, is_new=answer == "admitted")
        if answer == "full":
            raise self._queue_full(request, *values)
        if answer == "key_full":
            raise QueueFull(
                f"{values[0]} jobs of this API key wait, and it may have {entitled_to.max_queued_jobs} of them; "
                "try again when one has begun.",
                code="key_queue_full",
                retry_after_s=bounded(values[1] / 1000),
            )
        if answer == "rate":
            raise QueueFull(
                f"This API key has used up its rate, {describe_rate(entitled_to)}; this request needs {request.cost} "
                f"tokens: try again in {values[0] / 1000:.1f} s.",
                code="rate_limited",
                retry_after_s=values[0] / 1000,
            )
        if answer == "conflict":
            raise IdempotencyConflict(
                f"This Idempotency-Key was used for job {values[0]} with another body; use a new key.",
                param="Idempotency-Key",
            )
        assert answer == "no_worker", answer
        raise NotReady(
            f"No worker serves the model {request.model!r} at the moment; try again in {NO_WORKER_RETRY_S:g} s.",
            code="no_worker",
            retry_after_s=NO_WORKER_RETRY_S,
        )

    async def restore(self, job_id: str) -> bool:
        """Admit a job again, under its id, that Redis lost; False if it is not there after that.

        A Redis that comes back after a power cut may lack its last second. Seed and prompt are the same, so is every
        token: a listener who had some of them goes on behind those. False where this process did not admit it, or its
        client asked again meanwhile and another job has its Idempotency-Key. Raises `NotReady` as `admit`.
        """
        lost = self._listened_to.get(job_id)
        left_s = lost.until_s - time.monotonic() if lost is not None else 0.0
        if lost is None or left_s <= 0:
            return False
        answer, *_ = await self._scripts.run("admit", *lost.application.again(timeout_s=left_s).as_arguments())
        if answer == "no_worker":  # they say that they live within seconds
            raise NotReady("No worker is back yet.", code="no_worker", retry_after_s=1.0)
        if answer != "admitted":
            logger.warning("job %s was lost by Redis and is not admitted again: another has its place", job_id)
            self.forget(job_id)
            return False
        logger.warning("job %s was lost by Redis and is admitted again", job_id)
        return True

    def admitted(self, job_id: str) -> bool:
        """Whether this process admitted it, and its listener has not heard its end."""
        return job_id in self._listened_to

    def forget(self, job_id: str) -> None:
        """Nobody needs this job restored any more."""
        self._listened_to.pop(job_id, None)

    def _remember(self, job_id: str, admitted: Admitted) -> None:
        self._listened_to[job_id] = admitted
        if len(self._listened_to) > MAX_REMEMBERED:
            del self._listened_to[next(iter(self._listened_to))]

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job with everything it delivered so far; None for an unknown or forgotten one."""
        return read_record(job_id, await self._scripts.run("read", job_id))

    async def cancel(self, job_id: str) -> JobRecord | None:
        """Close a queued or running job at once and return it; one that ended stays as it is. None when unknown."""
        self.forget(job_id)
        await self._scripts.run("cancel", job_id)
        return await self.get(job_id)

    async def reap(self) -> int:
        """Close jobs whose deadline passed or whose listener is gone; call about once a second."""
        closed, lost = await self._scripts.run("reap", keys.WATCH_MS, keys.PAUSE_MS)
        if lost:
            await self._scripts.run("audit")
        return int(closed)

    async def statistics(self, model: str | None = None) -> dict[str, ModelStatistics]:
        """Return the counters of one model, or of every model seen lately."""
        async with answer_in_time():
            seen: Any = [model] if model else await self._client.zrange(keys.MODELS, 0, -1)
            models: list[str] = seen
            oldest = await self._now_ms() - keys.WORKER_ALIVE_MS
            pipeline = self._client.pipeline(transaction=False)
            for name in models:
                pipeline.hgetall(keys.COUNTS + name)
                pipeline.zcount(keys.SERVED + name, oldest, "+inf")
            replies = await pipeline.execute()
        return {
            name: _statistics(counts, workers)
            for name, counts, workers in zip(models, replies[::2], replies[1::2], strict=True)
        }

    async def workers(self) -> list[WorkerInfo]:
        """Return the live workers, as each last described itself."""
        async with answer_in_time():
            now = await self._now_ms()
            seen: Any = await self._client.zrange(keys.WORKERS, 0, -1, withscores=True)
            infos = await self._client.mget([keys.WORKER + name for name, _ in seen]) if seen else []
        return [
            WorkerInfo.from_json(info, age_ms=max(0, now - int(score)))
            for (_, score), info in zip(seen, infos, strict=True)
            if info is not None
        ]

    async def ping(self) -> None:
        """Return if Redis answers, else `NotReady`."""
        async with answer_in_time():
            await self._client.ping()

    async def _now_ms(self) -> int:
        seconds, microseconds = await self._client.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    def _queue_full(self, request: JobRequest, queued: int, queued_cost: int, wait_ms: int) -> QueueFull:
        # Where the speed is unknown nobody was promised anything: jitter, so that they do not come back all at once.
        wait_s = wait_ms / 1000 or UNKNOWN_SPEED_RETRY_S * JITTER.uniform(0.8, 1.2)
        limits = self.limits
        return QueueFull(
            f"The queue of {request.model!r} is full: {queued} of {limits.max_queued_jobs} jobs and "
            f"{queued_cost} of {limits.max_queued_tokens} tokens wait, and this request needs {request.cost}; "
            f"try again in {wait_s:.1f} s.",
            retry_after_s=wait_s,
        )


def fingerprint(request: JobRequest, key: str) -> str:
    """Return what tells that a request was refused before: all of it but the seed, which may be drawn anew."""
    sampling = {name: value for name, value in request.sampling.items() if name != "seed"}
    text = repr((key, request.model, request.prompt_ids, request.max_new_tokens, sampling, request.stop))
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def or_nothing(limit: Limit | None) -> Limit | str:
    return "" if limit is None else limit


def milliseconds(timeout_s: float) -> int:
    """At least one: 0 would be no time to live."""
    return max(1, round(timeout_s * 1000))


def bounded(wait_s: float) -> float:
    return min(max(wait_s, RETRY_RANGE_S[0]), RETRY_RANGE_S[1])


def describe_rate(key: ApiKey) -> str:
    limits = ((key.requests_per_minute, "requests"), (key.tokens_per_minute, "tokens"))
    return " and ".join(f"{limit:g} {what} a minute" for limit, what in limits if limit is not None)


def new_job_id() -> str:
    """Return an id nobody can guess. It begins with the time, which settles ties between keys by arrival."""
    return f"{time.time_ns() // 1000:013x}{secrets.token_hex(10)}"


def _statistics(counts: dict[str, Any], workers: int) -> ModelStatistics:
    speed = float(counts.get("speed", 0))
    return ModelStatistics(
        queued=int(counts.get("queued", 0)),
        queued_cost=int(counts.get("queued_cost", 0)),
        running=int(counts.get("running", 0)),
        running_cost=int(counts.get("running_cost", 0)),
        tokens_per_second=round(speed, 3) if speed > 0 else None,
        workers=int(workers),
    )
