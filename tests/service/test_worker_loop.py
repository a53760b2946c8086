"""A worker's loop, turn by turn in this process and over a real Redis: what it hears, and what it does about it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.host import Hosts, load_host
from service.metrics import WorkerMetrics
from service.queue import keys
from service.queue.connection import async_redis, blocking_redis
from service.queue.job import JobRecord, JobRequest, JobState, QueueLimits
from service.queue.job_queue import JobQueue
from service.queue.worker_queue import WorkerQueue
from service.worker import Worker
from tests.processes import wait_until
from tests.tiny import other_tokenizer, write_tiny_export

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = QueueLimits(lease_ms=600_000)


@pytest.fixture
def worker(redis_url: str, tmp_path: Path) -> Iterator[Worker]:
    """One that serves the tiny model, with none of its threads but the courier."""
    import torch

    write_tiny_export(tmp_path / "models")

    def load(folder: Any) -> Any:
        return load_host(
            folder, device=torch.device("cpu"), dtype=torch.float32, num_slots=4, max_cached_tokens=1_024, kernels="off"
        )

    client = blocking_redis(redis_url)
    hosts = Hosts(tmp_path / "models", load, poll_s=60)
    queue = WorkerQueue(client, worker_id="worker", limits=LIMITS)
    worker = Worker(queue, hosts, WorkerMetrics(), shutdown_grace_s=60)
    hosts.refresh()
    worker.turn()
    yield worker
    worker.publisher.close()
    client.close()


def on_api(redis_url: str, ask: Callable[[JobQueue], Any]) -> Any:
    """Let an API process' side of the queue do something."""

    async def run() -> Any:
        redis = async_redis(redis_url)
        try:
            return await ask(JobQueue(redis, limits=LIMITS))
        finally:
            await redis.aclose()

    return asyncio.run(run())


def tiny_request(**values: Any) -> JobRequest:
    """A job that goes on for some steps."""
    defaults: dict[str, Any] = {
        "model": "tiny",
        "prompt_ids": (5, 6, 7),
        "max_new_tokens": 60,
        "sampling": {"temperature": 1.0, "seed": 3},
        "options": {"ignore_eos": True},
    }
    return JobRequest(**{**defaults, **values})


def admit(redis_url: str, **values: Any) -> str:
    admission = on_api(redis_url, lambda queue: queue.admit(tiny_request(**values), timeout_s=600))
    return str(admission.id)


def read(redis_url: str, job_id: str) -> JobRecord:
    record = on_api(redis_url, lambda queue: queue.get(job_id))
    assert isinstance(record, JobRecord)
    return record


def work_until_it_ends(worker: Worker, redis_url: str, job_id: str) -> JobRecord:
    def is_over() -> bool:
        worker.turn()
        return read(redis_url, job_id).state.is_final

    wait_until(is_over, "the job's end")
    return read(redis_url, job_id)


def attempt_in_hand(worker: Worker, job_id: str) -> int | None:
    running = worker.running.get(job_id)
    return None if running is None else running.job.attempt


def lose_lease(worker: Worker, job_id: str) -> None:
    worker.queue._client.zadd(keys.LEASES + "tiny", {job_id: 1})


def test_a_late_refusal_of_an_old_attempt_leaves_the_new_one_alone(worker: Worker, redis_url: str) -> None:
    """The worker lost the job for a moment and took it again while tokens of the first attempt were on their way."""
    undisturbed = work_until_it_ends(worker, redis_url, admit(redis_url))
    job_id = admit(redis_url)
    may_go = threading.Event()
    worker.publisher._courier.submit(may_go.wait)  # as a Redis that answers the courier last
    worker.turn()
    assert attempt_in_hand(worker, job_id) == 1
    lose_lease(worker, job_id)
    worker.turn()
    assert attempt_in_hand(worker, job_id) == 2
    may_go.set()
    worker.exchange(wait_s=60)  # hears the refusal, and sends what there is
    assert attempt_in_hand(worker, job_id) == 2
    record = work_until_it_ends(worker, redis_url, job_id)
    assert record.state is JobState.SUCCEEDED and record.completion == undisturbed.completion


def test_what_an_empty_redis_refused_does_not_harm_the_job_admitted_again(worker: Worker, redis_url: str) -> None:
    """Attempts begin anew there, so the number alone does not tell one lease from the other."""

    async def lose_and_restore(queue: JobQueue) -> str:
        admission = await queue.admit(tiny_request(), timeout_s=600, cancel_on_disconnect=True)
        worker.turn()
        old = worker.running[admission.id].job
        worker.queue._client.flushdb()
        worker.heartbeat.beat()  # is refused
        worker.heartbeat.announce()
        assert await queue.restore(admission.id)
        worker.ask_redis()
        new = worker.running[admission.id].job
        assert new is not old and new.attempt == old.attempt == 1
        return admission.id

    job_id = on_api(redis_url, lose_and_restore)
    worker.turn()
    assert attempt_in_hand(worker, job_id) == 1
    assert work_until_it_ends(worker, redis_url, job_id).state is JobState.SUCCEEDED


def test_a_job_that_another_worker_has_is_dropped_before_new_ones_are_taken(worker: Worker, redis_url: str) -> None:
    job_id = admit(redis_url)
    worker.turn()
    thief = WorkerQueue(worker.queue._client, worker_id="thief", limits=LIMITS)
    lose_lease(worker, job_id)
    [stolen] = thief.next("tiny", worker.hosts.current["tiny"].revision, num_slots=1, num_tokens=1_000)
    worker.heartbeat.beat()
    others = [admit(redis_url) for _ in range(4)]
    worker.turn()
    assert stolen.attempt == 2 and set(worker.running) == set(others)


def test_a_job_of_another_vocabulary_is_not_read_under_this_one(worker: Worker, redis_url: str) -> None:
    """The model was replaced while it waited: the same numbers would be other words, and nobody would know."""
    sha256 = worker.hosts.current["tiny"].folder.tokenizer_sha256
    same = work_until_it_ends(worker, redis_url, admit(redis_url, options={"tokenizer_sha256": sha256}))
    assert same.state is JobState.SUCCEEDED and same.finish is not None and same.finish.code is None
    other = work_until_it_ends(worker, redis_url, admit(redis_url, options={"tokenizer_sha256": "0" * 64}))
    assert other.state is JobState.FAILED and other.finish is not None and not other.completion.token_ids
    assert other.finish.code == "model_changed" and "another tokenizer" in str(other.finish.error)
    assert not worker.running and worker.hosts.current["tiny"].engine.free_slots == 4


def test_what_waited_for_the_old_tokenizer_is_answered_by_the_old_model(worker: Worker, redis_url: str) -> None:
    old = worker.hosts.current["tiny"]
    sha256_of_old = {"tokenizer_sha256": old.folder.tokenizer_sha256}
    undisturbed = work_until_it_ends(worker, redis_url, admit(redis_url, options=sha256_of_old, max_new_tokens=20))
    waiting = [
        admit(redis_url, options=sha256_of_old, max_new_tokens=20) for _ in range(6)
    ]  # more than the engine has slots
    folder = write_tiny_export(worker.hosts.models_dir, seed=1, tokenizer=other_tokenizer())
    fresh = admit(redis_url, options={"tokenizer_sha256": folder.tokenizer_sha256}, max_new_tokens=20)
    worker.hosts.refresh()
    worker.turn()
    new = worker.hosts.current["tiny"]
    assert new.revision == folder.revision != old.revision
    for job_id in waiting:
        record = work_until_it_ends(worker, redis_url, job_id)
        assert record.completion == undisturbed.completion
        assert (record.revision, record.attempt) == (old.revision, 2), "one more than the lease it was given back from"
    answer = work_until_it_ends(worker, redis_url, fresh)
    assert answer.state is JobState.SUCCEEDED and answer.revision == new.revision
    late = work_until_it_ends(worker, redis_url, admit(redis_url, options=sha256_of_old, max_new_tokens=20))
    assert late.revision == old.revision, "as long as some API process may still write its ids"
    worker.hosts.keep_s = 0.0
    worker.hosts.find("tiny", old.folder.tokenizer_sha256)
    worker.turn()
    assert worker.hosts.all == [new]
    too_late = work_until_it_ends(worker, redis_url, admit(redis_url, options=sha256_of_old, max_new_tokens=20))
    assert too_late.finish is not None and too_late.finish.code == "model_changed"


def test_a_stop_token_that_the_model_does_not_have_fails_its_job_alone(worker: Worker, redis_url: str) -> None:
    sampling = {"temperature": 1.0, "seed": 3, "min_tokens": 1}
    bad = admit(redis_url, sampling=sampling, options={"stop_token_ids": [40_000]})
    good = admit(redis_url)
    record = work_until_it_ends(worker, redis_url, bad)
    assert record.finish is not None and "stop token is 40000; it must be from 0 to 511" in str(record.finish.error)
    assert work_until_it_ends(worker, redis_url, good).state is JobState.SUCCEEDED
