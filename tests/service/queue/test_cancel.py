"""Cancelling, deadlines and clients that went away, for queued and running jobs."""

from __future__ import annotations

import asyncio

import pytest

from service.queue import keys
from service.queue.job import Finish, JobState, Verdict
from service.queue.scripts import BlockingScripts
from service.queue.streams import TokenStreams
from tests.service.queue.conftest import MODEL, Bench, chunk, wait_until_async

pytestmark = pytest.mark.anyio


async def test_cancelled_queued_job_leaves_the_queue(bench: Bench) -> None:
    first, second = await bench.admit(), await bench.admit()
    record = await bench.queue.cancel(first.id)
    assert record is not None
    assert record.state is JobState.CANCELLED
    assert record.finish == Finish(reason="cancelled")
    assert [job.id for job in bench.take(num_slots=4)] == [second.id]


async def test_cancelled_running_job_tells_its_worker(bench: Bench) -> None:
    worker = bench.workers["worker"]
    await bench.admit()
    [job] = bench.take()
    worker.append([(job, chunk(0, 5))])
    assert worker.cancelled_jobs() == set()
    record = await bench.queue.cancel(job.id)
    assert record is not None
    assert record.completion.token_ids == (5,)
    assert worker.cancelled_jobs() == {job.id}
    assert worker.cancelled_jobs() == set()
    assert worker.heartbeat([job]) == [Verdict.CANCEL]
    assert worker.append([(job, chunk(1, 6))]) == [(Verdict.CANCEL, 0)]
    assert worker.finish(job, Finish(reason="length")) is Verdict.CANCEL
    assert bench.take() == []
    assert (await bench.queue.statistics())[MODEL].running == 0


async def test_cancelling_is_idempotent_and_never_undoes_an_ending(bench: Bench) -> None:
    await bench.admit()
    [job] = bench.take()
    bench.workers["worker"].finish(job, Finish(reason="stop"), chunk=chunk(0, 5))
    for _ in range(2):
        record = await bench.queue.cancel(job.id)
        assert record is not None
        assert record.state is JobState.SUCCEEDED
    assert await bench.queue.cancel("unknown") is None
    assert await bench.queue.get("unknown") is None


async def test_deadline_ends_a_queued_job(bench: Bench) -> None:
    admission = await bench.admit(timeout_s=0.01)
    await asyncio.sleep(0.012)
    assert bench.take() == []
    record = await bench.queue.get(admission.id)
    assert record is not None
    assert (record.state, record.finish) == (JobState.EXPIRED, Finish(reason="deadline"))


async def test_deadline_is_reaped_without_any_worker(bench: Bench) -> None:
    admission = await bench.admit(timeout_s=0.01)
    bench.workers["worker"].withdraw()
    await asyncio.sleep(0.012)
    assert await bench.queue.reap() == 1
    assert await bench.queue.reap() == 0
    record = await bench.queue.get(admission.id)
    assert record is not None
    assert record.state is JobState.EXPIRED


async def test_deadline_stops_a_running_job_at_its_next_write(bench: Bench) -> None:
    worker = bench.workers["worker"]
    await bench.admit(timeout_s=0.03)
    [job] = bench.take()
    worker.append([(job, chunk(0, 5))])
    await asyncio.sleep(0.035)
    assert worker.append([(job, chunk(1, 6))]) == [(Verdict.CANCEL, 0)]
    record = await bench.queue.get(job.id)
    assert record is not None
    assert record.state is JobState.EXPIRED
    assert record.completion.token_ids == (5,)


def let_watchers_be_gone(bench: Bench) -> None:
    """As if their 15 s had passed."""
    for job_id in bench.client.zrange(keys.WATCHES, 0, -1):
        bench.client.zadd(keys.WATCHES, {str(job_id): 1})


async def test_job_nobody_listens_to_is_cancelled(bench: Bench) -> None:
    left = await bench.admit(cancel_on_disconnect=True)
    watched = await bench.admit(cancel_on_disconnect=True)
    unbothered = await bench.admit()
    await bench.queue.reap()
    let_watchers_be_gone(bench)
    BlockingScripts(bench.client).run("touch", keys.WATCH_MS, watched.id, unbothered.id)
    assert await bench.queue.reap() == 1
    states = [(await bench.queue.get(each.id)).state for each in (left, watched, unbothered)]  # type: ignore[union-attr]
    assert states == ["cancelled", "queued", "queued"]


async def test_listeners_get_their_time_again_after_an_outage(bench: Bench) -> None:
    admission = await bench.admit(cancel_on_disconnect=True)
    let_watchers_be_gone(bench)
    assert await bench.queue.reap() == 0  # nobody reaped before: they had no chance to say that they listen
    assert await bench.queue.reap() == 0
    record = await bench.queue.get(admission.id)
    assert record is not None
    assert record.state is JobState.QUEUED


async def test_following_keeps_a_job_alive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "WATCH_MS", 400)
    admission = await bench.admit(cancel_on_disconnect=True)
    before = bench.client.zscore(keys.WATCHES, admission.id) or 0
    follower = asyncio.create_task(bench.read_all(admission.id))
    await wait_until_async(lambda: (bench.client.zscore(keys.WATCHES, admission.id) or 0) > before)
    follower.cancel()
    with pytest.raises(asyncio.CancelledError):
        await follower


async def test_vanished_jobs_are_audited_away(bench: Bench) -> None:
    for key in ("a", "b"):
        await bench.admit(key=key, cancel_on_disconnect=True)
    kept = await bench.admit()
    [running, vanishing] = bench.take(num_slots=2)
    queued = await bench.admit(priority=2)
    for job_id in (vanishing.id, queued.id):
        bench.client.delete(keys.JOB + job_id)
        bench.client.zadd(keys.DEADLINES, {job_id: 1})
    assert await bench.queue.reap() == 0
    statistics = (await bench.queue.statistics())[MODEL]
    assert (statistics.queued, statistics.queued_cost, statistics.running, statistics.running_cost) == (1, 12, 1, 12)
    assert bench.client.zrange(keys.LEASES + MODEL, 0, -1) == [running.id]
    assert set(bench.client.zrange(keys.DEADLINES, 0, -1)) == {running.id, kept.id}
    assert [job.id for job in bench.take(num_slots=4)] == [kept.id]


async def test_a_listener_who_comes_to_another_process_is_believed_in_at_once(bench: Bench) -> None:
    """Else a job whose API processes die one after the other is cancelled under a client that listens all the time."""
    job = await bench.admit(cancel_on_disconnect=True)
    bench.client.zadd(keys.WATCHES, {job.id: 1_000}, xx=True)
    other = TokenStreams(bench.queue._client)
    events = other.follow(job.id)
    await anext(events)
    assert int(str(bench.client.zscore(keys.WATCHES, job.id)).partition(".")[0]) > 1_000
    await events.aclose()
    await other.aclose()
