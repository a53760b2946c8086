"""Every Prometheus name of the service and its buckets; each stands in docs/operations.md.

`api_*` is what an API process sees, `worker_*` what a worker does, `queue_*` what stands in Redis. A phase of a 135M
model takes between a quarter of a millisecond and minutes, so the buckets begin below a millisecond.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from service.queue.job import Chunk, JobRecord, JobRequest, ModelStatistics, WorkerInfo
from shared.errors import ConfigError

SECONDS: Final = (
    *(0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06),
    *(0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0),
)
TOKENS: Final = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(slots=True)
class StopWatch:
    """When one job's tokens passed this process, by `time.perf_counter`."""

    started_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_later_tokens: int = 0
    """Tokens that came behind the first chunk."""

    def note(self, chunk: Chunk) -> None:
        if not chunk.token_ids:
            return
        self.last_token_s = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        else:
            self.num_later_tokens += len(chunk.token_ids)

    def note_whole(self, job: JobRecord) -> None:
        """Of an answer that passed as a whole Redis' clock knows, in whole milliseconds."""
        if job.first_token_ms is None or job.finished_ms is None:
            return
        self.first_token_s = self.started_s + max(0, job.first_token_ms - job.created_ms) / 1000
        self.last_token_s = self.started_s + max(0, job.finished_ms - job.created_ms) / 1000
        self.num_later_tokens = max(0, len(job.completion.token_ids) - 1)


class ApiMetrics:
    """What one API process counts. A registry of its own, so that several apps can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "api_requests", "HTTP requests answered", ("route", "method", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "api_request_seconds", "First byte in to last byte out", ("route",), buckets=SECONDS, registry=registry
        )
        self.admission_seconds = Histogram(
            "api_admission_seconds", "Parse, tokenise and admit one job", buckets=SECONDS, registry=registry
        )
        self.refusals = Counter("api_refusals", "Requests refused, by error code", ("code",), registry=registry)
        self.jobs = Counter("api_jobs", "Jobs whose end this process saw", ("model", "state"), registry=registry)
        self.prompt_tokens = Counter("api_prompt_tokens", "Tokens of admitted prompts", ("model",), registry=registry)
        self.completion_tokens = Counter(
            "api_completion_tokens", "Tokens of completions that ended", ("model",), registry=registry
        )
        self.prompt_length = Histogram(
            "api_prompt_length_tokens", "Tokens per prompt", ("model",), buckets=TOKENS, registry=registry
        )
        self.key_jobs = Counter(
            "api_key_jobs", "Jobs by whose they were: a key's id, never the key", ("key", "state"), registry=registry
        )
        self.key_prompt_tokens = Counter(
            "api_key_prompt_tokens", "Tokens of their admitted prompts", ("key",), registry=registry
        )
        self.key_completion_tokens = Counter(
            "api_key_completion_tokens", "Tokens of their completions", ("key",), registry=registry
        )
        self.key_refusals = Counter(
            "api_key_refusals", "A key's requests refused, by error code", ("key", "code"), registry=registry
        )
        self.redeliveries = Counter(
            "api_redeliveries", "Times that a worker took a job another had before", ("model",), registry=registry
        )
        self.queue_seconds = self._phase("api_queue_seconds", "Admission until a worker took the job")
        self.prefill_seconds = self._phase("api_prefill_seconds", "The worker's work on the prompt")
        self.first_token_seconds = self._phase("api_first_token_seconds", "Admission to first token")
        self.between_tokens_seconds = self._phase("api_between_tokens_seconds", "Mean time between a job's tokens")
        self.job_seconds = self._phase("api_job_seconds", "Admission to the end of the job")
        self.open_streams = Gauge("api_open_streams", "Event streams being written", registry=registry)
        self.disconnects = Counter("api_disconnects", "Clients that left before their answer", registry=registry)
        self.redis_up = Gauge("api_redis_up", "1 while Redis answers", registry=registry)
        self.queued_jobs = Gauge("queue_queued_jobs", "Jobs that wait", ("model",), registry=registry)
        self.queued_tokens = Gauge("queue_queued_tokens", "Their cost in tokens", ("model",), registry=registry)
        self.running_jobs = Gauge("queue_running_jobs", "Jobs that workers hold", ("model",), registry=registry)
        self.running_tokens = Gauge("queue_running_tokens", "Their cost in tokens", ("model",), registry=registry)
        self.workers = Gauge("queue_workers", "Live workers that take its jobs", ("model",), registry=registry)
        self.slots = Gauge("queue_slots", "Sequences that live workers can decode at a time", registry=registry)
        self.free_slots = Gauge("queue_free_slots", "Of them those that are free", registry=registry)
        self.cached_tokens = Gauge(
            "queue_cached_tokens", "Tokens whose keys and values workers hold", registry=registry
        )
        self.max_cached_tokens = Gauge("queue_max_cached_tokens", "Most tokens that they may hold", registry=registry)

    def describe_queues(self, statistics: dict[str, ModelStatistics], workers: list[WorkerInfo]) -> None:
        """Set the gauges of Redis' side, those of models that are gone with nothing."""
        for gauge in (self.queued_jobs, self.queued_tokens, self.running_jobs, self.running_tokens, self.workers):
            gauge.clear()
        for model, one in statistics.items():
            self.queued_jobs.labels(model).set(one.queued)
            self.queued_tokens.labels(model).set(one.queued_cost)
            self.running_jobs.labels(model).set(one.running)
            self.running_tokens.labels(model).set(one.running_cost)
            self.workers.labels(model).set(one.workers)
        self.slots.set(sum(worker.slots for worker in workers))
        self.free_slots.set(sum(worker.free for worker in workers))
        self.cached_tokens.set(sum(worker.details.get("cached_tokens", 0) for worker in workers))
        self.max_cached_tokens.set(sum(worker.details.get("max_cached_tokens", 0) for worker in workers))

    def count_admission(self, job: JobRequest, key: str) -> None:
        num_tokens = len(job.prompt_ids)
        self.prompt_tokens.labels(job.model).inc(num_tokens)
        self.prompt_length.labels(job.model).observe(num_tokens)
        self.key_prompt_tokens.labels(key).inc(num_tokens)

    def count_end(self, job: JobRecord, watch: StopWatch) -> None:
        """Count a job whose end this process saw, and how long each of its phases took.

        What the client waits for is measured here, by this process's clock; the wait in the queue by Redis' clock, in
        whole milliseconds; the prefill by the worker's.
        """
        model, num_tokens = job.request.model, len(job.completion.token_ids)
        self.key_jobs.labels(job.key, job.state.value).inc()
        self.key_completion_tokens.labels(job.key).inc(num_tokens)
        if job.attempt > 1:
            self.redeliveries.labels(model).inc(job.attempt - 1)
        self.jobs.labels(model, job.state.value).inc()
        self.completion_tokens.labels(model).inc(num_tokens)
        if job.started_ms is not None:
            self.queue_seconds.labels(model).observe(max(0, job.started_ms - job.created_ms) / 1000)
        if job.prefill_ms is not None:
            self.prefill_seconds.labels(model).observe(job.prefill_ms / 1000)
        if watch.first_token_s is not None and watch.last_token_s is not None:
            self.first_token_seconds.labels(model).observe(watch.first_token_s - watch.started_s)
            if watch.num_later_tokens > 0:
                decode_s = watch.last_token_s - watch.first_token_s
                self.between_tokens_seconds.labels(model).observe(decode_s / watch.num_later_tokens)
        self.job_seconds.labels(model).observe(time.perf_counter() - watch.started_s)

    def _phase(self, name: str, documentation: str) -> Histogram:
        return Histogram(name, documentation, ("model",), buckets=SECONDS, registry=self.registry)


class WorkerMetrics:
    """What one worker process counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry, model = self.registry, ("model",)
        self.jobs = Counter("worker_jobs", "Jobs that left this worker, by how", ("model", "end"), registry=registry)
        self.prefill_tokens = Counter("worker_prefill_tokens", "Prompt tokens computed", model, registry=registry)
        self.completion_tokens = Counter("worker_completion_tokens", "Tokens drawn", model, registry=registry)
        self.step_seconds = Histogram(
            "worker_step_seconds", "One step of an engine", model, buckets=SECONDS, registry=registry
        )
        self.publish_seconds = Histogram(
            "worker_publish_seconds", "One delivery of tokens to Redis", buckets=SECONDS, registry=registry
        )
        self.running = Gauge("worker_running_sequences", "Sequences that hold a slot", model, registry=registry)
        self.waiting = Gauge("worker_waiting_sequences", "Sequences that wait for room", model, registry=registry)
        self.cached_bytes = Gauge("worker_cached_bytes", "Memory of live keys and values", model, registry=registry)
        self.cached_tokens = Gauge("worker_cached_tokens", "Tokens of live keys and values", model, registry=registry)
        self.kept_bytes = Gauge(
            "worker_kept_bytes", "Memory of all keys and values, ended sequences' too", model, registry=registry
        )
        self.cache_limit_bytes = Gauge("worker_cache_limit_bytes", "What that may come to", model, registry=registry)
        self.shared_tokens = Counter(
            "worker_shared_tokens", "Prompt tokens copied from another sequence", model, registry=registry
        )
        self.drafts = Counter("worker_draft_tokens", "Tokens guessed ahead", model, registry=registry)
        self.right_drafts = Counter(
            "worker_right_draft_tokens", "Tokens guessed ahead and drawn", model, registry=registry
        )
        self.free_slots = Gauge("worker_free_slots", "Sequences it could take at once", model, registry=registry)
        self.first_token_seconds = Histogram(
            "worker_first_token_seconds", "A job taken until its first token", model, buckets=SECONDS, registry=registry
        )
        self.between_tokens_seconds = Histogram(
            "worker_between_tokens_seconds",
            "Time between two tokens of a job",
            model,
            buckets=SECONDS,
            registry=registry,
        )
        self.job_seconds = Histogram(
            "worker_job_seconds", "A job taken until it left this worker", model, buckets=SECONDS, registry=registry
        )
        self.redeliveries = Counter(
            "worker_redeliveries", "Jobs taken that another worker had before", model, registry=registry
        )
        self.refused_writes = Counter(
            "worker_refused_writes", "Writes that Redis refused: fenced, cancel, gap", ("verdict",), registry=registry
        )
        self.redis_up = Gauge("worker_redis_up", "1 while Redis answers", registry=registry)


def serve_metrics(metrics: WorkerMetrics, port: int) -> None:
    """Answer GET /metrics on a thread of its own; port 0 is off."""
    if not port:
        return
    try:
        start_http_server(port, registry=metrics.registry)
    except OSError as error:
        raise ConfigError(
            f"the worker's metrics port {port} cannot be opened ({error.strerror}); set SMOLLM_WORKER_METRICS_PORT"
        ) from error
