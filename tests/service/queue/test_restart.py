"""Redis goes away and comes back with its append-only file: a pause, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.errors import NotFound, NotReady
from service.queue import keys
from service.queue.connection import async_redis, blocking_redis
from service.queue.job import Chunk, Finish, JobState, LeasedJob, Verdict
from service.queue.job_queue import JobQueue
from service.queue.local_server import start_redis
from service.queue.streams import TokenStreams
from service.queue.worker_queue import WorkerQueue
from tests.service.queue.conftest import LIMITS, MODEL, REVISION, Bench, chunk, request, wait_until_async, worker_info

pytestmark = pytest.mark.anyio


async def test_stream_goes_on_after_redis_is_killed_and_restarted(anyio_backend: str, tmp_path: Path) -> None:
    server = start_redis(directory=tmp_path)
    port = int(server.url.rsplit(":", 1)[1].split("/")[0])
    api = async_redis(server.url)
    queue, streams = JobQueue(api, limits=LIMITS), TokenStreams(api)
    with blocking_redis(server.url) as client:
        worker = WorkerQueue(client, worker_id="worker", limits=LIMITS)
        worker.announce(worker_info("worker"))
        client.config_set("appendfsync", "always")  # so that the test is sure what the file holds
        admission = await queue.admit(request(), timeout_s=30, cancel_on_disconnect=True)
        waiting = await queue.admit(request(), timeout_s=30)
        [job] = worker.next(MODEL, REVISION, num_slots=1, num_tokens=100)
        events = streams.follow(admission.id)
        worker.append([(job, chunk(0, 5))])
        assert await anext(events) == chunk(0, 5)

        server.stop(kill=True)
        with pytest.raises(NotReady):
            worker.append([(job, chunk(1, 6))])
        with pytest.raises(NotReady):
            await queue.admit(request(), timeout_s=30)
        coming = asyncio.create_task(anext(events))
        await asyncio.sleep(0.2)
        server = start_redis(directory=tmp_path, port=port)

        # The lease may have run out meanwhile; nobody took the job, so the worker simply goes on.
        assert worker.append([(job, chunk(1, 6))]) == [(Verdict.OK, 2)]
        assert await coming == chunk(1, 6)
        assert worker.finish(job, Finish(reason="stop"), chunk=chunk(2, 7)) is Verdict.OK
        rest = [event async for event in events]
        assert [event for event in rest if isinstance(event, Chunk)] == [chunk(2, 7)]
        [other] = worker.next(MODEL, REVISION, num_slots=1, num_tokens=100)
        assert isinstance(other, LeasedJob)
        assert other.id == waiting.id
    await streams.aclose()
    await api.aclose()
    server.stop()


@pytest.fixture
async def restoring(bench: Bench) -> AsyncIterator[TokenStreams]:
    """Streams of the process that admitted what `bench.queue` admits."""
    client = async_redis(bench.url)
    streams = TokenStreams(client, queue=bench.queue)
    yield streams
    await streams.aclose()
    await client.aclose()


def lose_everything(bench: Bench) -> None:
    bench.client.flushdb()
    bench.worker()


@pytest.mark.parametrize("body", ["same", "another"])
async def test_a_lost_job_whose_client_asked_again_elsewhere_is_gone(
    bench: Bench, restoring: TokenStreams, body: str
) -> None:
    """Its Idempotency-Key belongs to the newer job: there is nothing to restore and nothing to wait for."""
    lost = await bench.admit(idempotency=("key", "same"), cancel_on_disconnect=True)
    lose_everything(bench)
    client = async_redis(bench.url)
    again = await JobQueue(client, limits=LIMITS).admit(request(), idempotency=("key", body), timeout_s=30)
    await client.aclose()
    assert again.is_new
    async with asyncio.timeout(10):
        with pytest.raises(NotFound, match=lost.id):
            await restoring.wait(lost.id)
    assert not bench.queue.admitted(lost.id)


async def test_a_lost_job_is_admitted_again_however_full_the_queue_is(bench: Bench, restoring: TokenStreams) -> None:
    lost = await bench.admit(cancel_on_disconnect=True)
    lose_everything(bench)
    for _ in range(LIMITS.max_queued_jobs):
        await bench.admit()
    waiting = asyncio.create_task(restoring.wait(lost.id))
    await wait_until_async(lambda: bench.client.exists(keys.JOB + lost.id))
    await bench.queue.cancel(lost.id)
    assert (await waiting).state == JobState.CANCELLED
