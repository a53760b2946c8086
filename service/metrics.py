"""Every Prometheus name of the service and its buckets; each stands in docs/operations.md.

`api_*` is what an API process sees, `worker_*` what a worker does, `queue_*` what stands in Redis. A phase of a 135M
model takes between a quarter of a millisecond and minutes, so the buckets begin below a millisecond.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.queue.job import JobRecord

SECONDS: Final = (
    *(0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06),
    *(0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0),
)
TOKENS: Final = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


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

    def count_end(self, job: JobRecord) -> None:
        """Count a job whose end this process saw, and how long each of its phases took."""
        model, num_tokens = job.request.model, len(job.completion.token_ids)
        self.jobs.labels(model, job.state.value).inc()
        self.completion_tokens.labels(model).inc(num_tokens)
        for phase, start_ms, end_ms in (
            (self.queue_seconds, job.created_ms, job.started_ms),
            (self.first_token_seconds, job.created_ms, job.first_token_ms),
            (self.job_seconds, job.created_ms, job.finished_ms),
        ):
            if end_ms is not None:
                phase.labels(model).observe(max(0, end_ms - start_ms) / 1000)
        if job.prefill_ms is not None:
            self.prefill_seconds.labels(model).observe(job.prefill_ms / 1000)
        if job.first_token_ms is not None and job.finished_ms is not None and num_tokens > 1:
            decode_s = max(0, job.finished_ms - job.first_token_ms) / 1000
            self.between_tokens_seconds.labels(model).observe(decode_s / (num_tokens - 1))

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
        self.redis_up = Gauge("worker_redis_up", "1 while Redis answers", registry=registry)
