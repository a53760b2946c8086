"""What a worker tells of each job in its hands: metrics, a line in the log, spans. One call each when it is taken,
brings tokens, and leaves; and one after each step of an engine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from service.engine.engine import Engine, Statistics
from service.engine.sequence import Output
from service.metrics import WorkerMetrics
from service.queue.job import LeasedJob
from service.tracing import Attributes, Tracer, trace_id_of

log = logging.getLogger("service.worker")


@dataclass(slots=True)
class Observed:
    """One job since it was taken; times are of a monotonic clock."""

    job: LeasedJob
    model: str
    taken_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_tokens: int = 0


class Observer:
    """For one thread."""

    def __init__(self, metrics: WorkerMetrics, tracer: Tracer) -> None:
        self.metrics = metrics
        self.tracer = tracer
        self.jobs: dict[str, Observed] = {}

    def took(self, job: LeasedJob, model: str) -> None:
        """A job came; one that another attempt had before is a redelivery."""
        self.jobs[job.id] = Observed(job, model, time.monotonic())
        if job.attempt > 1:
            self.metrics.redeliveries.labels(model).inc()
            log.info(
                "job %s goes on at token %d, attempt %d",
                *(job.id, len(job.completion_ids), job.attempt),
                extra=self.extra_of(job, model),
            )

    def drew(self, output: Output) -> None:
        """A step brought a job something."""
        one = self.jobs.get(output.sequence_id)
        if one is None or not output.token_ids:
            return
        now_s = time.monotonic()
        if one.first_token_s is None or one.last_token_s is None:
            one.first_token_s = now_s
            self.metrics.first_token_seconds.labels(one.model).observe(now_s - one.taken_s)
        else:
            gap_s = (now_s - one.last_token_s) / len(output.token_ids)
            between = self.metrics.between_tokens_seconds.labels(one.model)
            for _ in output.token_ids:
                between.observe(gap_s)
        one.last_token_s = now_s
        one.num_tokens += len(output.token_ids)

    def stepped(self, model: str, engine: Engine, before: Statistics, seconds: float) -> None:
        """An engine made a step."""
        statistics, metrics = engine.statistics, self.metrics
        metrics.step_seconds.labels(model).observe(seconds)
        metrics.completion_tokens.labels(model).inc(statistics.num_drawn_tokens - before.num_drawn_tokens)
        metrics.prefill_tokens.labels(model).inc(statistics.num_prefill_tokens - before.num_prefill_tokens)
        metrics.shared_tokens.labels(model).inc(statistics.num_shared_tokens - before.num_shared_tokens)
        metrics.drafts.labels(model).inc(statistics.num_drafts - before.num_drafts)
        metrics.right_drafts.labels(model).inc(statistics.num_right_drafts - before.num_right_drafts)
        self.stands(model, engine)

    def stands(self, model: str, engine: Engine) -> None:
        """What an engine holds now."""
        statistics, metrics = engine.statistics, self.metrics
        metrics.running.labels(model).set(statistics.num_running)
        metrics.waiting.labels(model).set(statistics.num_waiting)
        metrics.cached_bytes.labels(model).set(statistics.cached_bytes)
        metrics.kept_bytes.labels(model).set(statistics.kept_bytes)
        metrics.cache_limit_bytes.labels(model).set(statistics.cache_limit_bytes)
        metrics.cached_tokens.labels(model).set(statistics.cached_tokens)
        metrics.free_slots.labels(model).set(engine.free_slots)

    def left(self, job_id: str, how: str) -> None:
        """A job is no longer in hand: it ended, or somebody else has it."""
        one = self.jobs.pop(job_id, None)
        if one is None:
            return
        now_s = time.monotonic()
        self.metrics.jobs.labels(one.model, how).inc()
        self.metrics.job_seconds.labels(one.model).observe(now_s - one.taken_s)
        log.info(
            "job %s %s: %d tokens in %.3f s",
            *(job_id, how, one.num_tokens, now_s - one.taken_s),
            extra=self.extra_of(one.job, one.model),
        )
        if self.tracer.is_on:
            self.write_spans(one, how, now_s)

    def write_spans(self, one: Observed, how: str, now_s: float) -> None:
        now_ns = time.time_ns()

        def at(moment_s: float) -> int:
            return now_ns - round((now_s - moment_s) * 1e9)

        job = one.job
        attributes: Attributes = {"job.id": job.id, "job.attempt": job.attempt, "gen_ai.request.model": one.model}
        border_s = now_s if one.first_token_s is None else one.first_token_s
        self.tracer.record(
            "prefill",
            parent=job.trace,
            start_ns=at(one.taken_s),
            end_ns=at(border_s),
            attributes=attributes | {"gen_ai.usage.input_tokens": len(job.request.prompt_ids)},
        )
        if one.first_token_s is not None:
            self.tracer.record(
                "decode",
                parent=job.trace,
                start_ns=at(border_s),
                end_ns=now_ns,
                attributes=attributes | {"gen_ai.usage.output_tokens": one.num_tokens, "job.end": how},
            )

    def extra_of(self, job: LeasedJob, model: str) -> dict[str, str | int | None]:
        """The fields of a line in the log, beside its words."""
        return {"job": job.id, "model": model, "attempt": job.attempt, "trace": trace_id_of(job.trace)}
