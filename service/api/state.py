"""What all requests of one API process share: connections, models, metrics, and the tasks that keep them fresh."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from fastapi import Request

from service.api.models import Models
from service.api_keys import KeyRing
from service.errors import NotReady
from service.metrics import ApiMetrics, StopWatch
from service.queue.connection import async_redis
from service.queue.job import JobRecord
from service.queue.job_queue import JITTER, JobQueue
from service.queue.streams import TokenStreams
from service.settings import Settings
from service.tracing import Tracer, open_tracer, trace_id_of
from shared.log import GoesOn

log = logging.getLogger("service.api")

PING_EVERY_S = 0.5
PING_TIMEOUT_S = 1.0
REAP_EVERY_S = 1.0
KEYS_POLL_S = 2.0
OUTAGE_CODE = "redis_unavailable"


class ApiState:
    """Opened when the app starts, closed when it ends; lives in one event loop."""

    def __init__(self, settings: Settings, *, tracer: Tracer | None = None) -> None:
        """Raises `ConfigError` for keys or an exporter that cannot be."""
        self.settings = settings
        self.key_ring = KeyRing(settings.api_keys, settings.api_keys_file)
        self.limits = settings.queue_limits
        self.client = async_redis(settings.redis_url.get_secret_value())
        self.queue = JobQueue(self.client, limits=self.limits)
        self.streams = TokenStreams(self.client, queue=self.queue)
        self.models = Models(settings.models_dir, preferred=settings.default_model, workers=self.queue.workers)
        self.metrics = ApiMetrics()
        self.tracer = tracer or open_tracer("api", settings.otlp_endpoint)
        self.redis = RedisWatch(self.queue, self.metrics)
        self.started_at = time.time()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Read the models once, then keep everything fresh in the background."""
        await self.models.refresh()
        await self.redis.look()
        self._tasks = [
            asyncio.create_task(repeat(self.models.refresh, self.settings.model_poll_s), name="models"),
            asyncio.create_task(repeat(self.redis.look, PING_EVERY_S), name="redis-watch"),
            asyncio.create_task(repeat(self.key_ring.refresh, KEYS_POLL_S), name="keys"),
            asyncio.create_task(repeat(self._reap, REAP_EVERY_S), name="reaper"),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.streams.aclose()
        await self.client.aclose()
        await asyncio.to_thread(self.tracer.close)

    def note_end(self, job: JobRecord, watch: StopWatch) -> None:
        """Count and log a job whose end this process saw. What was said stays out of the log unless asked for."""
        self.metrics.count_end(job, watch)
        if self.tracer.is_on and job.started_ms is not None:
            self.tracer.record(
                "queue",
                parent=job.trace,
                start_ns=job.created_ms * 1_000_000,
                end_ns=job.started_ms * 1_000_000,
                attributes={"job.id": job.id, "job.priority": job.priority},
            )
        extra = {"job": job.id, "model": job.request.model, "trace": trace_id_of(job.trace), "key": job.key}
        num_tokens, seconds = len(job.completion.token_ids), ((job.finished_ms or 0) - job.created_ms) / 1000
        log.info("job %s %s: %d tokens in %.3f s", job.id, job.state.value, num_tokens, seconds, extra=extra)
        if self.settings.log_prompts:
            model = self.models.find(job.request.model)
            prompt = model.tokenizer.decode(job.request.prompt_ids, skip_special_tokens=False) if model else ""
            log.info("job %s: %r -> %r", job.id, prompt, job.completion.text, extra=extra)

    async def _reap(self) -> None:
        """Deadlines hold even while no worker lives."""
        if self.redis.outage is None:
            with contextlib.suppress(NotReady):
                await self.queue.reap()


class RedisWatch:
    """Knows whether Redis answers: while it is away, requests are refused at once instead of after a time-out."""

    def __init__(self, queue: JobQueue, metrics: ApiMetrics) -> None:
        self._queue = queue
        self._metrics = metrics
        self.outage: NotReady | None = None

    def require(self) -> None:
        """Raise `NotReady` while Redis is away."""
        if self.outage is not None:
            raise self.outage.with_traceback(None)

    def report(self, error: NotReady) -> None:
        """Tell of an outage that a request met."""
        if error.code_name == OUTAGE_CODE:
            self._set(error)

    async def look(self) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self._queue.ping()
        except NotReady as error:
            self._set(error)
        except TimeoutError:
            # A time-out that itself came late says that this process was busy, and nothing about Redis.
            if time.monotonic() - started < 1.5 * PING_TIMEOUT_S:
                self._set(NotReady("The queue's Redis does not answer.", code=OUTAGE_CODE, retry_after_s=2.0))
        else:
            self._set(None)

    def _set(self, outage: NotReady | None) -> None:
        if (outage is None) != (self.outage is None):
            log.warning("%s", outage or "Redis answers again.")
        self.outage = outage
        self._metrics.redis_up.set(0 if outage else 1)


async def repeat(work: Callable[[], Awaitable[None]], every_s: float) -> None:
    """Do something for ever, whatever it raises; a fifth of jitter keeps processes apart."""
    goes_on = GoesOn(log, f"the task {task.get_name()!r}" if (task := asyncio.current_task()) else "a task")
    while True:
        await asyncio.sleep(every_s * JITTER.uniform(0.9, 1.1))
        with goes_on:
            await work()


def state_of(request: Request) -> ApiState:
    state = request.app.state.api
    assert isinstance(state, ApiState)
    return state
