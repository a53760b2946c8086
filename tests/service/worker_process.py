"""Real worker processes for tests, and a client that admits jobs and waits for their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio

from service.queue.connection import async_redis
from service.queue.job import JobRecord, JobRequest, QueueLimits
from service.queue.job_queue import JobQueue

LIMITS = QueueLimits(lease_ms=1_500, result_ttl_s=60)
PATIENCE_S = 60.0

T = TypeVar("T")


class WorkerProcess:
    """`python -m service worker` on its own."""

    def __init__(self, redis_url: str, models_dir: Path, log_path: Path, **settings: Any) -> None:
        self.log_path = log_path
        environment = {
            **os.environ,
            "SMOLLM_REDIS_URL": redis_url,
            "SMOLLM_MODELS_DIR": str(models_dir),
            "SMOLLM_DTYPE": "float32",
            "SMOLLM_DEVICE": "cpu",
            "SMOLLM_NUM_THREADS": "1",
            "SMOLLM_LEASE_MS": str(LIMITS.lease_ms),
            "SMOLLM_RESULT_TTL_S": "60",
            "SMOLLM_MODEL_POLL_S": "0.1",
            "SMOLLM_LOG_FORMAT": "text",
            **{f"SMOLLM_{name.upper()}": str(value) for name, value in settings.items()},
        }
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", "worker"], env=environment, stdout=log, stderr=log
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """Ask it to stop; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


class Client:
    """Admits jobs as the API would."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue

    async def admit(self, request: JobRequest) -> str:
        return (await self.queue.admit(request, timeout_s=300)).id

    async def get(self, job_id: str) -> JobRecord:
        record = await self.queue.get(job_id)
        assert record is not None
        return record

    async def result(self, job_id: str) -> JobRecord:
        """Wait for the end of a job."""
        return await self.until(job_id, lambda record: record.state.is_final)

    async def until(self, job_id: str, holds: Callable[[JobRecord], bool]) -> JobRecord:
        async def look() -> JobRecord | None:
            record = await self.get(job_id)
            return record if holds(record) else None

        return await wait_for(look)

    async def wait_for_workers(self, count: int, model: str) -> list[str]:
        """Wait until so many live workers serve a model; return their revisions."""

        async def look() -> list[str] | None:
            infos = [info for info in await self.queue.workers() if model in info.models and not info.draining]
            return [info.models[model] for info in infos] if len(infos) >= count else None

        return await wait_for(look)


async def wait_for(look: Callable[[], Awaitable[T | None]]) -> T:
    """Ask again and again until there is an answer."""
    give_up_at = time.monotonic() + PATIENCE_S
    while (found := await look()) is None:
        assert time.monotonic() < give_up_at, "nothing happened"
        await anyio.sleep(0.01)
    return found


@asynccontextmanager
async def connect(redis_url: str) -> AsyncIterator[Client]:
    redis = async_redis(redis_url)
    try:
        yield Client(JobQueue(redis, limits=LIMITS))
    finally:
        await redis.aclose()
