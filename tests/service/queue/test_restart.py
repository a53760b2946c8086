"""Redis goes away and comes back with its append-only file: a pause, and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.errors import NotReady
from service.queue.connection import async_redis, blocking_redis
from service.queue.job import Chunk, Finish, LeasedJob, Verdict
from service.queue.job_queue import JobQueue
from service.queue.local_server import start_redis
from service.queue.streams import TokenStreams
from service.queue.worker_queue import WorkerQueue
from tests.service.queue.conftest import LIMITS, MODEL, REVISION, chunk, request, worker_info

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
