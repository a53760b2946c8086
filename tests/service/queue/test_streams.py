"""Following a stream: from any index, by many at once, through lost pushes and a lost connection."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest

from service.errors import NotFound
from service.queue import keys, push, streams
from service.queue.connection import async_redis
from service.queue.job import Chunk, Ended, Finish, JobState, LeasedJob, QueuedEvent
from service.queue.streams import TokenStreams
from tests.service.queue.conftest import Bench, chunk, text_of, wait_until_async

pytestmark = pytest.mark.anyio

DONE = Finish(reason="length")


def tokens(events: list[QueuedEvent | Chunk | Ended]) -> list[int]:
    return [token for event in events if isinstance(event, Chunk) for token in event.token_ids]


def text(events: list[QueuedEvent | Chunk | Ended]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


async def start(bench: Bench) -> LeasedJob:
    await bench.admit()
    return bench.take()[0]


def listeners(bench: Bench, job_id: str) -> int:
    channels = (keys.PUSH + job_id, keys.END + job_id)
    return sum(number for _, number in bench.client.pubsub_numsub(*channels))


async def test_follower_sees_everything_from_the_queue_to_the_end(bench: Bench) -> None:
    _, second = await bench.admit(), await bench.admit()
    seen: list[QueuedEvent | Chunk | Ended] = []

    async def follow() -> None:
        async for event in bench.streams.follow(second.id):
            seen.append(event)

    follower = asyncio.create_task(follow())
    await wait_until_async(lambda: seen)
    assert seen == [QueuedEvent(position=2, eta_s=None)]
    bench.workers["worker"].finish(bench.take()[0], DONE)
    await wait_until_async(lambda: len(seen) == 2)
    assert isinstance(seen[1], QueuedEvent)
    assert seen[1].position == 1
    [job] = bench.take()
    assert job.id == second.id
    for write in (chunk(0, 5, 6), chunk(2, 7)):
        bench.workers["worker"].append([(job, write)])
        await wait_until_async(lambda: seen[-1] == write)  # noqa: B023
    bench.workers["worker"].finish(job, DONE, chunk=Chunk(first_index=3, token_ids=(), text="!"))
    await follower
    assert text(seen) == text_of(5, 6, 7) + "!"
    ended = seen[-1]
    assert isinstance(ended, Ended)
    assert ended.record == await bench.queue.get(second.id)
    assert ended.record.completion.text == text(seen)


async def test_chunks_arrive_by_push_not_by_poll(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "POLL_S", 60)
    job = await start(bench)
    follower = asyncio.create_task(bench.read_all(job.id))
    await wait_until_async(lambda: listeners(bench, job.id))
    bench.workers["worker"].append([(job, chunk(0, 5))])
    bench.workers["worker"].finish(job, DONE, chunk=chunk(1, 6))
    assert tokens(await asyncio.wait_for(follower, 5)) == [5, 6]


@pytest.mark.parametrize(("after", "expected"), [(0, [5, 6, 7, 8]), (2, [7, 8]), (3, [8]), (4, []), (5, [])])
async def test_replay_after_an_index(bench: Bench, after: int, expected: list[int]) -> None:
    job = await start(bench)
    bench.workers["worker"].append([(job, chunk(0, 5, 6)), (job, chunk(2, 7))])
    bench.workers["worker"].finish(job, DONE, chunk=chunk(3, 8))
    events = await bench.read_all(job.id, after=after)
    assert tokens(events) == expected
    assert isinstance(events[-1], Ended)


async def test_index_inside_a_chunk_gets_the_whole_chunk(bench: Bench) -> None:
    job = await start(bench)
    bench.workers["worker"].finish(job, DONE, chunk=chunk(0, 5, 6))
    assert (await bench.read_all(job.id, after=1))[0] == chunk(0, 5, 6)


async def test_replay_goes_on_live_and_text_without_tokens_has_its_own_cursor(bench: Bench) -> None:
    job = await start(bench)
    bench.workers["worker"].append([(job, chunk(0, 5, 6)), (job, chunk(2, 7))])
    follower = asyncio.create_task(bench.read_all(job.id, after=2))
    await wait_until_async(lambda: listeners(bench, job.id))
    bench.workers["worker"].append([(job, chunk(3, 8))])
    bench.workers["worker"].finish(job, DONE, chunk=Chunk(first_index=4, token_ids=(), text="tail"))
    events = await follower
    assert text(events) == text_of(7, 8) + "tail"
    chunks = [event for event in events if isinstance(event, Chunk)]
    assert [each.cursor for each in chunks] == [3, 4, 5]
    assert text(await bench.read_all(job.id, after=4)) == "tail"
    assert text(await bench.read_all(job.id, after=5)) == ""


async def test_two_followers_on_two_processes_read_the_same(bench: Bench) -> None:
    job = await start(bench)
    other = async_redis(bench.url)
    others = TokenStreams(other)
    readers = [asyncio.create_task(bench.read_all(job.id)) for _ in range(2)]

    async def read_elsewhere() -> list[QueuedEvent | Chunk | Ended]:
        return [event async for event in others.follow(job.id)]

    readers.append(asyncio.create_task(read_elsewhere()))
    await wait_until_async(lambda: listeners(bench, job.id) == 2)
    for index in range(20):
        bench.workers["worker"].append([(job, chunk(index, 100 + index))])
        if index == 10:
            readers.append(asyncio.create_task(bench.read_all(job.id)))
            await asyncio.sleep(0)
    bench.workers["worker"].finish(job, DONE)
    for events in await asyncio.gather(*readers):
        assert tokens(events) == list(range(100, 120))
    await others.aclose()
    await other.aclose()


async def test_slow_reader_holds_a_cursor_and_no_buffer(bench: Bench) -> None:
    job = await start(bench)
    events = bench.streams.follow(job.id)
    bench.workers["worker"].append([(job, chunk(0, 0))])
    seen = [await anext(events)]
    for index in range(1, 3 * push.MAX_UNREAD):
        bench.workers["worker"].append([(job, chunk(index, index))])
    bench.workers["worker"].finish(job, DONE)
    await asyncio.sleep(0.05)  # let the pushes arrive and the oldest fall out
    seen += [event async for event in events]
    assert tokens(seen) == list(range(3 * push.MAX_UNREAD))


async def test_lost_push_connection_costs_no_token(bench: Bench) -> None:
    job = await start(bench)
    follower = asyncio.create_task(bench.read_all(job.id))
    await wait_until_async(lambda: listeners(bench, job.id))
    bench.workers["worker"].append([(job, chunk(0, 5))])
    bench.client.client_kill_filter(_type="pubsub")
    bench.workers["worker"].append([(job, chunk(1, 6))])
    await wait_until_async(lambda: listeners(bench, job.id))
    bench.workers["worker"].append([(job, chunk(2, 7))])
    bench.workers["worker"].finish(job, DONE)
    assert tokens(await follower) == [5, 6, 7]


@pytest.mark.parametrize("whole", [False, True])
async def test_what_was_published_while_the_push_connection_was_lost_is_read_when_it_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(streams, "POLL_S", 600)
    job = await start(bench)
    reader = asyncio.create_task(bench.streams.wait(job.id) if whole else bench.read_all(job.id))
    await wait_until_async(lambda: listeners(bench, job.id))
    bench.client.client_kill_filter(_type="pubsub")
    bench.workers["worker"].finish(job, DONE, chunk=chunk(0, 5))
    await asyncio.wait_for(reader, 60)


async def test_reader_whose_subscription_comes_late_looks_when_it_is_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_looked, may_subscribe = asyncio.Event(), asyncio.Event()
    write, peek = push.PushConnection._write, bench.streams._peek

    async def write_late(self: push.PushConnection, connection: Any) -> None:
        await may_subscribe.wait()
        await write(self, connection)

    async def peek_and_tell(job_id: str, cursor: int) -> tuple[str, Any, Any]:
        answer = await peek(job_id, cursor)
        has_looked.set()
        return answer

    monkeypatch.setattr(streams, "POLL_S", 600)
    monkeypatch.setattr(streams, "SUBSCRIBE_S", 0.01)
    monkeypatch.setattr(push.PushConnection, "_write", write_late)
    monkeypatch.setattr(bench.streams, "_peek", peek_and_tell)
    job = await start(bench)
    reader = asyncio.create_task(bench.streams.wait(job.id))
    await has_looked.wait()
    bench.workers["worker"].finish(job, DONE, chunk=chunk(0, 5))
    may_subscribe.set()
    assert (await asyncio.wait_for(reader, 60)).completion.token_ids == (5,)


async def test_worker_knows_whether_anybody_follows(bench: Bench) -> None:
    job, worker = await start(bench), bench.workers["worker"]
    worker.append([(job, chunk(0, 5))])
    assert not worker.is_unread(job.id), "a reader may be on the way"
    worker.append([(job, chunk(1, 6))])
    assert worker.is_unread(job.id)
    follower = asyncio.create_task(bench.read_all(job.id))
    await wait_until_async(lambda: listeners(bench, job.id))
    for _ in range(2):  # sent twice, it is published once
        worker.append([(job, chunk(2, 7))])
        assert not worker.is_unread(job.id)
    worker.finish(job, DONE)
    assert tokens(await follower) == [5, 6, 7] and not worker.is_unread(job.id)


async def test_what_was_cancelled_while_it_was_written_is_forgotten(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, worker = await start(bench), bench.workers["worker"]
    worker.append([(job, chunk(0, 5))])
    run = worker._scripts.run

    def run_and_hear_of_the_cancel(name: str, *arguments: Any) -> Any:
        reply = run(name, *arguments)
        run("cancel", job.id)
        assert worker.cancelled_jobs() == {job.id}
        return reply

    monkeypatch.setattr(worker._scripts, "run", run_and_hear_of_the_cancel)
    worker.append([(job, chunk(1, 6))])
    assert job.id not in worker._delivered


async def test_cancel_ends_the_stream(bench: Bench) -> None:
    running = await start(bench)
    for job_id in ((await bench.admit()).id, running.id):
        follower = asyncio.create_task(bench.streams.wait(job_id))
        await wait_until_async(lambda: listeners(bench, job_id))  # noqa: B023
        await bench.queue.cancel(job_id)
        assert (await follower).state is JobState.CANCELLED


async def test_who_waits_for_the_whole_hears_of_its_end_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "POLL_S", 60)
    job = await start(bench)
    wait = asyncio.create_task(bench.streams.wait(job.id))
    await wait_until_async(lambda: listeners(bench, job.id))
    assert bench.client.pubsub_numsub(keys.PUSH + job.id) == [(keys.PUSH + job.id, 0)]
    bench.workers["worker"].append([(job, chunk(0, 5))])
    bench.workers["worker"].finish(job, DONE, chunk=chunk(1, 6))
    assert (await asyncio.wait_for(wait, 60)).completion.token_ids == (5, 6)


async def test_unknown_job_is_not_found(bench: Bench) -> None:
    with pytest.raises(NotFound, match="unknown"):
        await bench.read_all("unknown")


async def test_readers_that_leave_are_unsubscribed(bench: Bench) -> None:
    job = await start(bench)
    bench.workers["worker"].append([(job, chunk(0, 5))])
    for _ in range(3):
        async with contextlib.aclosing(bench.streams.follow(job.id)) as events:
            await anext(events)
    wait = asyncio.create_task(bench.streams.wait(job.id))
    await wait_until_async(lambda: listeners(bench, job.id) == 1)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    await wait_until_async(lambda: listeners(bench, job.id) == 0)


@pytest.mark.parametrize("cut", [2, 4])
async def test_heir_that_cuts_tokens_differently_changes_no_text(bench: Bench, cut: int) -> None:
    """After Redis lost writes that a reader already saw, the next worker's chunks overlap the reader's cursor."""
    job = await start(bench)
    events = bench.streams.follow(job.id)
    bench.workers["worker"].append([(job, replace(chunk(0, 5, 6, 7), prompt_scores="1:abc"))])
    seen = [await anext(events)]
    bench.client.hset(keys.JOB + job.id, mapping={"n": 0, "chars": 0})
    bench.client.delete(keys.TOKENS + job.id)
    bench.workers["worker"].release([job])
    heir = bench.worker("heir")
    [again] = bench.take("heir")
    ids = (5, 6, 7, 8, 9)
    first = replace(chunk(0, *ids[:cut]), prompt_scores="1:abc")
    heir.append([(again, first), (again, chunk(cut, *ids[cut:]))])
    heir.finish(again, DONE)
    seen += [event async for event in events]
    assert tokens(seen) == [5, 6, 7, 8, 9]
    assert text(seen) == text_of(5, 6, 7, 8, 9)
    assert [one.prompt_scores for one in seen if isinstance(one, Chunk) and one.prompt_scores] == ["1:abc"]


async def test_many_streams_share_one_connection(bench: Bench) -> None:
    job = await start(bench)
    readers = [asyncio.create_task(bench.streams.wait(job.id)) for _ in range(50)]
    await wait_until_async(lambda: listeners(bench, job.id))
    assert len(bench.client.client_list(_type="pubsub")) == 1
    bench.workers["worker"].finish(job, DONE, chunk=chunk(0, 5))
    assert {record.id for record in await asyncio.gather(*readers)} == {job.id}
