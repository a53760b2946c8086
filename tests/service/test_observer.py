"""What a worker counts of redelivered jobs and refused writes, on a real queue."""

from __future__ import annotations

import logging

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from service.engine.sequence import Output
from service.metrics import WorkerMetrics
from service.observer import Observer
from service.publishing import Publisher
from service.queue.connection import async_redis, blocking_redis
from service.queue.job import JobRequest, LeasedJob, QueueLimits, Verdict, WorkerInfo
from service.queue.job_queue import JobQueue
from service.queue.worker_queue import WorkerQueue
from service.tracing import Tracer, new_traceparent, provider_of, trace_id_of

LIMITS = QueueLimits(lease_ms=60_000)
REQUEST = JobRequest(model="tiny", prompt_ids=(1, 2), max_new_tokens=10, sampling={"seed": 1})


def value_of(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


def drawn(job: LeasedJob, index: int, *, end: bool = False) -> Output:
    ending = {"finish_reason": "length", "timings": {"prefill_ms": 1.0}} if end else {}
    return Output(sequence_id=job.id, first_index=index, token_ids=(7,), text="a", **ending)  # type: ignore[arg-type]


def delivered(publisher: Publisher) -> tuple[set[str], list[Verdict]]:
    """Send everything; return which jobs were lost, and what else Redis refused to take."""
    publisher.send(everything=True)
    delivery = publisher.take_result(wait_s=60)
    assert (
        delivery is not None and not delivery.left and publisher.take_result() is None and not publisher.has_undelivered
    )
    return {job.id for job in delivery.lost}, delivery.refused


@pytest.mark.anyio
async def test_a_redelivered_job_and_the_refused_write_of_its_first_worker_are_counted(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    redis = async_redis(redis_url)
    clients = [blocking_redis(redis_url) for _ in range(2)]
    first, second = (WorkerQueue(client, worker_id=str(place), limits=LIMITS) for place, client in enumerate(clients))
    for worker in (first, second):
        worker.announce(
            WorkerInfo(id=worker.worker_id, models={"tiny": "r"}, slots=1, free=1, device="cpu", dtype="float32")
        )
    trace = new_traceparent()
    admission = await JobQueue(redis, limits=LIMITS).admit(REQUEST, timeout_s=60, trace=trace)
    await redis.aclose()

    (job,) = first.next("tiny", "r", num_slots=1, num_tokens=100)
    metrics, publisher = WorkerMetrics(), Publisher(first)
    observer = Observer(metrics, Tracer("worker"))
    observer.took(job, "tiny")
    publisher.add(job, drawn(job, 0))
    assert delivered(publisher) == (set(), [])
    assert value_of(metrics.registry, "worker_redeliveries_total", model="tiny") == 0

    assert first.release([job]) == [Verdict.OK]
    (again,) = second.next("tiny", "r", num_slots=1, num_tokens=100)
    publisher.add(job, drawn(job, 1))  # it does not know yet
    assert delivered(publisher) == ({job.id}, [Verdict.FENCED])
    publisher.add(job, drawn(job, 2, end=True))
    assert delivered(publisher) == (set(), [Verdict.FENCED])
    publisher.close()

    exporter = InMemorySpanExporter()
    provider = provider_of("worker", exporter)
    observer = Observer(metrics, Tracer("worker", provider))
    observer.took(again, "tiny")
    for index in range(1, 4):
        observer.drew(drawn(again, index))
    observer.left(again.id, "length")
    observer.left(again.id, "length")  # told twice, it counts once
    assert value_of(metrics.registry, "worker_redeliveries_total", model="tiny") == 1
    assert value_of(metrics.registry, "worker_jobs_total", model="tiny", end="length") == 1
    assert value_of(metrics.registry, "worker_first_token_seconds_count", model="tiny") == 1
    assert value_of(metrics.registry, "worker_between_tokens_seconds_count", model="tiny") == 2
    assert f"job {admission.id} goes on at token 1, attempt 2" in caplog.text
    lines = [record for record in caplog.records if getattr(record, "job", "") == admission.id]
    assert {getattr(line, "trace", "") for line in lines} == {trace_id_of(trace)}
    assert provider.force_flush()
    assert exporter.get_finished_spans() == (), "the client's trace is not sampled, so nobody keeps it"
    for client in clients:
        client.close()


def test_spans_of_a_sampled_trace_are_its_children() -> None:
    exporter = InMemorySpanExporter()
    provider = provider_of("worker", exporter)
    parent = new_traceparent()[:-2] + "01"
    job = LeasedJob(id="a", attempt=2, request=REQUEST, trace=parent)
    observer = Observer(WorkerMetrics(), Tracer("worker", provider))
    observer.took(job, "tiny")
    observer.drew(drawn(job, 0))
    observer.left("a", "length")
    provider.force_flush()
    prefill, decode = exporter.get_finished_spans()
    assert (prefill.name, decode.name) == ("prefill", "decode")
    for span in (prefill, decode):
        assert span.context is not None and span.parent is not None and span.attributes is not None
        assert f"{span.context.trace_id:032x}" == trace_id_of(parent)
        assert f"{span.parent.span_id:016x}" == parent.split("-")[2]
        assert span.attributes["job.id"] == "a" and span.attributes["job.attempt"] == 2
    times = [prefill.start_time, prefill.end_time, decode.start_time, decode.end_time]
    known = [time for time in times if time is not None]
    assert len(known) == 4 and known == sorted(known) and known[1] == known[2]
