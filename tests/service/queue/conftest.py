"""A queue on a real Redis: one API side, any number of workers, short leases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import redis

from service.queue.connection import async_redis, blocking_redis
from service.queue.job import Admission, Chunk, Ended, JobRequest, LeasedJob, QueuedEvent, QueueLimits, WorkerInfo
from service.queue.job_queue import JobQueue
from service.queue.streams import TokenStreams
from service.queue.worker_queue import WorkerQueue

MODEL = "tiny"
REVISION = "revision-1"
LIMITS = QueueLimits(max_queued_jobs=8, max_queued_tokens=1_000, result_ttl_s=60, lease_ms=150, max_attempts=3)


@dataclass
class Bench:
    """Everything one test needs of the queue."""

    url: str
    client: redis.Redis
    queue: JobQueue
    streams: TokenStreams
    workers: dict[str, WorkerQueue] = field(default_factory=dict)
    limits: QueueLimits = LIMITS

    def worker(self, name: str = "worker", *, models: dict[str, str] | None = None) -> WorkerQueue:
        """Return a worker that has announced itself."""
        if name not in self.workers:
            self.workers[name] = WorkerQueue(self.client, worker_id=name, limits=self.limits)
        self.workers[name].announce(worker_info(name, models=models))
        return self.workers[name]

    async def admit(self, **values: Any) -> Admission:
        """Admit a job of cost 12 (2 + 10); fields of JobRequest and arguments of `admit` may be given."""
        fields = {name: values.pop(name) for name in list(values) if name in JobRequest.__dataclass_fields__}
        return await self.queue.admit(request(**fields), **{"timeout_s": 30, **values})

    def take(self, name: str = "worker", *, num_slots: int = 1, revision: str = REVISION) -> list[LeasedJob]:
        return self.workers[name].next(MODEL, revision, num_slots=num_slots, num_tokens=10_000)

    async def read_all(self, job_id: str, *, after: int = 0) -> list[QueuedEvent | Chunk | Ended]:
        return [event async for event in self.streams.follow(job_id, after=after)]


def request(**values: Any) -> JobRequest:
    defaults: dict[str, Any] = {
        "model": MODEL,
        "prompt_ids": (1, 2),
        "max_new_tokens": 10,
        "sampling": {"temperature": 1.0, "seed": 7},
    }
    return JobRequest(**{**defaults, **values})


def worker_info(name: str, *, models: dict[str, str] | None = None, draining: bool = False) -> WorkerInfo:
    return WorkerInfo(
        id=name,
        models={MODEL: REVISION} if models is None else models,
        slots=4,
        free=4,
        device="cpu",
        dtype="float32",
        draining=draining,
    )


def chunk(first_index: int, *token_ids: int) -> Chunk:
    """A chunk whose text tells its tokens."""
    return Chunk(first_index=first_index, token_ids=token_ids, text="".join(f"<{token}>" for token in token_ids))


def text_of(*token_ids: int) -> str:
    return chunk(0, *token_ids).text


def wait_until(condition: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Return once the condition holds; a predicate waits no longer than it must on any machine."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.005)


async def wait_until_async(condition: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """As `wait_until`, while the event loop goes on."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        await asyncio.sleep(0.005)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with blocking_redis(redis_url) as client:
        yield client


@pytest.fixture
async def bench(anyio_backend: str, redis_url: str, client: redis.Redis) -> AsyncIterator[Bench]:
    api = async_redis(redis_url)
    streams = TokenStreams(api)
    bench = Bench(redis_url, client, JobQueue(api, limits=LIMITS), streams)
    bench.worker()
    yield bench
    await streams.aclose()
    await api.aclose()


def with_limits(bench: Bench, **values: Any) -> QueueLimits:
    """Change limits on both sides."""
    bench.limits = replace(bench.limits, **values)
    bench.queue.limits = bench.limits
    for worker in bench.workers.values():
        worker.limits = bench.limits
    return bench.limits
