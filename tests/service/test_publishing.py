"""What a worker has drawn reaches Redis in order, through an outage as well, and nothing of a dropped job does."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from service.engine.sequence import Output
from service.errors import NotReady
from service.publishing import Publisher
from service.queue import keys
from service.queue.connection import async_redis, blocking_redis
from service.queue.job import Chunk, Finish, JobRecord, JobRequest, LeasedJob, QueueLimits, Verdict, WorkerInfo
from service.queue.job_queue import JobQueue
from service.queue.local_server import LocalRedis, start_redis
from service.queue.worker_queue import WorkerQueue
from tests.processes import wait_until

LIMITS = QueueLimits(lease_ms=600_000)
TEXT = "Speak, speak."


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalRedis]:
    """A Redis of its own, to be frozen."""
    with start_redis(directory=tmp_path) as server:
        yield server


@pytest.fixture
def publisher(server: LocalRedis) -> Iterator[Publisher]:
    client = blocking_redis(server.url)
    worker = WorkerQueue(client, worker_id="worker", limits=LIMITS)
    worker.announce(WorkerInfo(id="worker", models={"tiny": "r"}, slots=4, free=4, device="cpu", dtype="float32"))
    publisher = Publisher(worker)
    yield publisher
    publisher.close()
    client.close()


def take(server: LocalRedis, publisher: Publisher, count: int) -> list[LeasedJob]:
    async def admit() -> None:
        redis = async_redis(server.url)
        for seed in range(count):
            job = JobRequest(model="tiny", prompt_ids=(1,), max_new_tokens=20, sampling={"seed": seed})
            await JobQueue(redis, limits=LIMITS).admit(job, timeout_s=600)
        await redis.aclose()

    asyncio.run(admit())
    return publisher.queue.next("tiny", "r", num_slots=count, num_tokens=1_000)


def draw(publisher: Publisher, job: LeasedJob, start: int, end: int) -> None:
    """Note the tokens `start` to `end`, each a character of `TEXT`; the last one ends the job."""
    for index in range(start, end):
        output = Output(
            sequence_id=job.id,
            first_index=index,
            token_ids=(index,),
            text=TEXT[index],
            finish_reason="length" if index + 1 == len(TEXT) else None,
        )
        publisher.add(job, output)


def read(server: LocalRedis, job: LeasedJob) -> JobRecord:
    async def get() -> JobRecord | None:
        redis = async_redis(server.url)
        try:
            return await JobQueue(redis, limits=LIMITS).get(job.id)
        finally:
            await redis.aclose()

    record = asyncio.run(get())
    assert record is not None
    return record


def error_of(publisher: Publisher) -> NotReady | None:
    delivery = publisher.take_result(wait_s=60)
    assert delivery is not None
    return delivery.error


def test_what_redis_does_not_take_goes_out_when_it_is_back_with_what_came_since(
    server: LocalRedis, publisher: Publisher
) -> None:
    [job] = take(server, publisher, 1)
    draw(publisher, job, 0, 2)
    publisher.send()
    assert publisher.take_result(wait_s=60) is not None
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    draw(publisher, job, 2, 5)
    publisher.send(everything=True)
    draw(publisher, job, 5, 8)
    publisher.send(everything=True)  # one delivery at a time
    assert publisher.take_result() is None and [*publisher.pending] == [job.id]
    assert error_of(publisher) is not None
    draw(publisher, job, 8, len(TEXT))
    server.process.send_signal(signal.SIGCONT)  # it now takes, late, what it was sent while it was frozen
    for _ in range(2):
        publisher.send(everything=True)
        delivery = publisher.take_result(wait_s=60)
        assert delivery is not None and not delivery.refused
    record = read(server, job)
    assert (record.completion.text, record.completion.token_ids) == (TEXT, tuple(range(len(TEXT))))
    assert record.state.is_final and not publisher.has_undelivered


def test_tokens_that_nobody_follows_wait_longer(server: LocalRedis, publisher: Publisher) -> None:
    followed, alone = take(server, publisher, 2)
    client = blocking_redis(server.url)
    subscription: Any = client.pubsub()  # type: ignore[no-untyped-call]
    subscription.subscribe(keys.PUSH + followed.id)
    assert subscription.get_message(timeout=60)["type"] == "subscribe"

    def send(start: int, end: int, *, all_sent_at_s: float) -> None:
        draw(publisher, followed, start, end)
        draw(publisher, alone, start, end)
        publisher._read_sent_at_s, publisher._all_sent_at_s = 0.0, all_sent_at_s
        publisher.send()
        publisher.take_result(wait_s=60)

    send(0, 1, all_sent_at_s=float("inf"))
    assert not publisher.pending, "a first token is urgent, followed or not"
    send(1, 2, all_sent_at_s=float("inf"))
    assert not publisher.pending, "a reader may be on the way"
    send(2, 3, all_sent_at_s=float("inf"))
    assert [*publisher.pending] == [alone.id] and read(server, followed).completion.token_ids == (0, 1, 2)
    send(3, 4, all_sent_at_s=0.0)
    assert read(server, alone).completion.token_ids == (0, 1, 2, 3), "for another worker, should this one die"
    subscription.close()
    wait_until(lambda: client.pubsub_numsub(keys.PUSH + followed.id) == [(keys.PUSH + followed.id, 0)], "no reader")
    send(4, 5, all_sent_at_s=0.0)
    send(5, 6, all_sent_at_s=float("inf"))
    assert {*publisher.pending} == {followed.id, alone.id}, "its reader is gone"
    send(6, len(TEXT), all_sent_at_s=float("inf"))
    assert read(server, alone).completion.text == TEXT
    client.close()


def test_only_what_somebody_waits_for_goes_out_at_once(server: LocalRedis, publisher: Publisher) -> None:
    first, second = take(server, publisher, 2)
    draw(publisher, first, 0, 2)
    publisher.send(everything=True)
    assert publisher.take_result(wait_s=60) is not None
    draw(publisher, first, 2, 4)
    draw(publisher, second, 0, 1)
    publisher._read_sent_at_s = publisher._all_sent_at_s = float("inf")  # no time for all of them comes
    publisher.send()
    assert publisher.take_result(wait_s=60) is not None
    assert [*publisher.pending] == [first.id] and read(server, second).completion.token_ids == (0,)
    draw(publisher, first, 4, len(TEXT))
    publisher.send()
    assert publisher.take_result(wait_s=60) is not None
    assert read(server, first).completion.text == TEXT and not publisher.has_undelivered


def test_a_job_dropped_in_an_outage_is_not_sent_again(server: LocalRedis, publisher: Publisher) -> None:
    kept, dropped = take(server, publisher, 2)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    for job in (kept, dropped):
        draw(publisher, job, 0, 1)
    publisher.send(everything=True)
    assert error_of(publisher) is not None
    publisher.drop(dropped.id)
    assert publisher.has_undelivered
    publisher.drop(kept.id)
    assert not publisher.has_undelivered
    server.process.send_signal(signal.SIGCONT)


class StopsBeforeEndings(WorkerQueue):
    """A worker's queue whose Redis goes away once, in the middle of a delivery."""

    stop_server: Callable[[], None] | None = None

    def finish_many(
        self, endings: Sequence[tuple[LeasedJob, Finish, Chunk | None, Mapping[str, float] | None]]
    ) -> list[Verdict]:
        stop, self.stop_server = self.stop_server, None
        if stop is not None:
            stop()
        return super().finish_many(endings)


def test_what_redis_said_before_it_went_away_is_heard(server: LocalRedis, tmp_path: Path) -> None:
    """Half a delivery: its refusals count, what was owed for them is done later, and the other half is sent again."""
    client = blocking_redis(server.url)
    queue = StopsBeforeEndings(client, worker_id="worker", limits=LIMITS)
    queue.announce(WorkerInfo(id="worker", models={"tiny": "r"}, slots=4, free=4, device="cpu", dtype="float32"))
    publisher = Publisher(queue)
    fenced, unheard, ended = take(server, publisher, 3)
    draw(publisher, unheard, 0, 1)
    publisher.send()
    assert error_of(publisher) is None
    queue.release([fenced])
    draw(publisher, fenced, 0, 1)
    draw(publisher, unheard, 3, 4)  # tokens 1 and 2 are nowhere: a Redis and a worker that each lost some
    draw(publisher, ended, 0, len(TEXT))
    queue.stop_server = server.stop
    publisher.send(everything=True)
    delivery = publisher.take_result(wait_s=60)
    assert delivery is not None and delivery.error is not None
    assert delivery.refused == [Verdict.FENCED, Verdict.GAP] and delivery.lost == [fenced, unheard]
    assert publisher.has_undelivered
    port = int(server.url.split(":")[-1].split("/")[0])
    with start_redis(port=port, directory=tmp_path) as again:
        publisher.send()
        assert error_of(publisher) is None and not publisher.has_undelivered
        assert read(again, ended).completion.text == TEXT
        handed_over = {job.id: job for job in queue.next("tiny", "r", num_slots=3, num_tokens=1_000)}
        assert handed_over[unheard.id].completion_ids == (0,) and handed_over[unheard.id].attempt == 2
        publisher.close()
        client.close()
