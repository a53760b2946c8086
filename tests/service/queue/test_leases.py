"""Workers: what they take, what they may write, and what happens to a job whose worker is gone."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from service.queue import keys
from service.queue.job import Chunk, Finish, JobRecord, JobState, LeasedJob, Verdict
from tests.service.queue.conftest import LIMITS, MODEL, REVISION, Bench, chunk, text_of, wait_until

pytestmark = pytest.mark.anyio

DONE = Finish(reason="length")


async def read(bench: Bench, job: LeasedJob) -> JobRecord:
    record = await bench.queue.get(job.id)
    assert record is not None
    return record


def let_lease_run_out(bench: Bench) -> None:
    """Wait on the server's clock, as the next worker would."""
    wait_until(lambda: bench.client.zcount(keys.LEASES + MODEL, "-inf", server_ms(bench)))


def server_ms(bench: Bench) -> int:
    seconds, microseconds = bench.client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


async def test_a_job_from_admission_to_its_end(bench: Bench) -> None:
    worker = bench.workers["worker"]
    admission = await bench.admit(trace="00-trace")
    [job] = bench.take()
    assert (job.id, job.attempt, job.completion_ids, job.trace) == (admission.id, 1, (), "00-trace")
    assert worker.append([(job, chunk(0, 5, 6))]) == [(Verdict.OK, 2)]
    assert (await read(bench, job)).state is JobState.RUNNING
    assert worker.append([(job, chunk(2, 7))]) == [(Verdict.OK, 3)]
    ending = Finish(reason="stop", stop_sequence="\n")
    assert worker.finish(job, ending, chunk=chunk(3, 8), timings={"prefill_ms": 1.5, "cached_tokens": 2}) is Verdict.OK
    record = await read(bench, job)
    assert record.state is JobState.SUCCEEDED
    assert record.finish == ending
    assert record.completion.token_ids == (5, 6, 7, 8)
    assert record.completion.text == text_of(5, 6, 7, 8)
    assert (record.worker, record.revision, record.attempt) == ("worker", REVISION, 1)
    assert (record.prefill_ms, record.cached_tokens) == (1.5, 2)
    times = [record.created_ms, record.started_ms, record.first_token_ms, record.finished_ms]
    assert times == sorted(time for time in times if time is not None)


async def test_log_probabilities_and_text_without_tokens_arrive(bench: Bench) -> None:
    worker = bench.workers["worker"]
    await bench.admit(logprobs=2)
    [job] = bench.take()
    entries = ({"logprob": -0.5, "top": [[5, -0.5]]}, {"logprob": -1e9, "top": []})
    worker.append([(job, Chunk(first_index=0, token_ids=(5, 6), text="", logprobs=entries))])
    assert worker.finish(job, DONE, chunk=Chunk(first_index=2, token_ids=(), text="held back")) is Verdict.OK
    completion = (await read(bench, job)).completion
    assert (completion.token_ids, completion.text, completion.logprobs) == ((5, 6), "held back", entries)


async def test_a_prompt_s_scores_arrive_once(bench: Bench) -> None:
    """With a job's first tokens, with text that no token carries, or with nothing else, and never alone in between."""
    worker = bench.workers["worker"]
    for chunks, ending in (
        ([Chunk(first_index=0, token_ids=(5,), text="a", prompt_scores="1:abc")], None),
        ([], Chunk(first_index=0, token_ids=(), text="held back", prompt_scores="1:abc")),
        ([], Chunk(first_index=0, token_ids=(), text="", prompt_scores="1:abc")),
        ([], Chunk(first_index=0, token_ids=(), text="", prompt_scores="1:abc", logprobs=({"token_id": 0},))),
    ):
        await bench.admit(logprobs=1)
        [job] = bench.take()
        worker.append([(job, each) for each in chunks])
        assert worker.finish(job, DONE, chunk=ending) is Verdict.OK
        completion = (await read(bench, job)).completion
        assert completion.prompt_scores == "1:abc"
        assert completion.logprobs == (ending.logprobs if ending else None)


async def test_worker_takes_no_more_than_it_has_room_for(bench: Bench) -> None:
    for _ in range(4):
        await bench.admit()
    worker = bench.workers["worker"]
    assert worker.next(MODEL, REVISION, num_slots=0, num_tokens=1_000) == []
    assert worker.next(MODEL, REVISION, num_slots=4, num_tokens=11) == []
    assert len(worker.next(MODEL, REVISION, num_slots=4, num_tokens=35)) == 2
    assert len(worker.next(MODEL, REVISION, num_slots=1, num_tokens=1_000)) == 1
    assert (await bench.queue.statistics())[MODEL].running_cost == 36


async def test_workers_of_other_models_take_nothing(bench: Bench) -> None:
    await bench.admit()
    assert bench.workers["worker"].next("other", REVISION, num_slots=4, num_tokens=1_000) == []


async def test_idle_worker_wakes_within_milliseconds(bench: Bench) -> None:
    worker = bench.workers["worker"]
    woken_after: list[float] = []

    def sleep() -> None:
        start = time.monotonic()
        while not worker.next(MODEL, REVISION, num_slots=1, num_tokens=1_000):
            worker.wait_for_work()
        woken_after.append(time.monotonic() - start)

    thread = threading.Thread(target=sleep)
    thread.start()
    await asyncio.sleep(0.05)
    await bench.admit()
    await asyncio.to_thread(thread.join)
    assert woken_after[0] < 0.6
    assert not worker.wait_for_work(0.01)


async def test_zombie_is_refused_everywhere(bench: Bench) -> None:
    zombie, heir = bench.workers["worker"], bench.worker("heir")
    await bench.admit()
    [old] = bench.take()
    zombie.append([(old, chunk(0, 5))])
    let_lease_run_out(bench)
    [new] = bench.take("heir")
    assert (new.id, new.attempt) == (old.id, 2)
    lease = bench.client.zscore(keys.LEASES + MODEL, old.id)
    assert zombie.append([(old, chunk(1, 66))]) == [(Verdict.FENCED, 0)]
    assert zombie.heartbeat([old]) == [Verdict.FENCED]
    assert zombie.release([old]) == [Verdict.FENCED]
    assert zombie.finish(old, DONE, chunk=chunk(1, 66)) is Verdict.FENCED
    assert bench.client.zscore(keys.LEASES + MODEL, old.id) == lease
    assert heir.finish(new, DONE, chunk=chunk(1, 6)) is Verdict.OK
    assert zombie.append([(old, chunk(1, 66))]) == [(Verdict.FENCED, 0)]
    assert (await read(bench, new)).completion.token_ids == (5, 6)


async def test_next_worker_goes_on_at_the_same_index(bench: Bench) -> None:
    await bench.admit()
    [old] = bench.take()
    bench.workers["worker"].append([(old, chunk(0, 5, 6)), (old, chunk(2, 7))])
    heir = bench.worker("heir")
    assert bench.take("heir") == []
    let_lease_run_out(bench)
    [new] = bench.take("heir")
    assert new.completion_ids == (5, 6, 7)
    assert heir.append([(new, chunk(3, 8))]) == [(Verdict.OK, 4)]


@pytest.mark.parametrize("sign_of_life", ["heartbeat", "append"])
async def test_sign_of_life_renews_a_lease_that_ran_out(bench: Bench, sign_of_life: str) -> None:
    worker = bench.workers["worker"]
    bench.worker("thief")
    await bench.admit()
    [job] = bench.take()
    bench.client.zadd(keys.LEASES + MODEL, {job.id: 1})  # nobody asked meanwhile, so it is still this worker's
    if sign_of_life == "heartbeat":
        assert worker.heartbeat([job]) == [Verdict.OK]
    else:
        assert worker.append([(job, chunk(0, 5))]) == [(Verdict.OK, 1)]
    lease = bench.client.zscore(keys.LEASES + MODEL, job.id)
    assert lease is not None
    assert lease > server_ms(bench) - 10_000
    assert lease <= server_ms(bench) + LIMITS.lease_ms


async def test_append_sent_twice_changes_nothing(bench: Bench) -> None:
    worker = bench.workers["worker"]
    await bench.admit()
    [job] = bench.take()
    for _ in range(2):
        assert worker.append([(job, chunk(0, 5, 6))]) == [(Verdict.OK, 2)]
    for _ in range(2):
        assert worker.finish(job, DONE, chunk=chunk(2, 7)) is Verdict.OK
    assert (await read(bench, job)).completion.token_ids == (5, 6, 7)


async def test_many_jobs_in_one_round_trip_get_their_own_verdicts(bench: Bench) -> None:
    worker = bench.workers["worker"]
    for _ in range(3):
        await bench.admit()
    first, second, third = bench.take(num_slots=3)
    await bench.queue.cancel(second.id)
    worker.release([third])
    verdicts = worker.append([(job, chunk(0, 5)) for job in (first, second, third)])
    assert verdicts == [(Verdict.OK, 1), (Verdict.CANCEL, 0), (Verdict.FENCED, 0)]


async def test_gap_is_filled_from_the_workers_memory(bench: Bench) -> None:
    worker = bench.workers["worker"]
    await bench.admit()
    [job] = bench.take()
    worker.append([(job, chunk(0, 5))])
    names = (keys.JOB + job.id, keys.TOKENS + job.id)
    saved = [(name, bench.client.pttl(name), dump(bench, name)) for name in names]
    worker.append([(job, chunk(1, 6, 7))])
    worker.append([(job, chunk(3, 8))])
    restore(bench, saved)  # as a Redis that lost its last second
    assert worker.append([(job, chunk(4, 9))]) == [(Verdict.OK, 5)]
    assert (await read(bench, job)).completion.token_ids == (5, 6, 7, 8, 9)
    restore(bench, saved)
    assert worker.finish(job, DONE) is Verdict.OK
    assert (await read(bench, job)).completion.text == text_of(5, 6, 7, 8, 9)


async def test_gap_nobody_can_fill_names_its_index(bench: Bench) -> None:
    worker = bench.workers["worker"]
    await bench.admit()
    [job] = bench.take()
    worker.append([(job, chunk(0, 5))])
    assert worker.append([(job, chunk(3, 8))]) == [(Verdict.GAP, 1)]


def dump(bench: Bench, name: str) -> bytes:
    import redis

    with redis.Redis.from_url(bench.url, decode_responses=False, socket_timeout=5) as raw:
        value = raw.dump(name)
    assert isinstance(value, bytes)
    return value


def restore(bench: Bench, saved: list[tuple[str, int, bytes]]) -> None:
    for name, lifetime, value in saved:
        bench.client.restore(name, lifetime, value, replace=True)


async def test_released_job_is_claimable_at_once_and_costs_no_attempt(bench: Bench) -> None:
    await bench.admit()
    bench.worker("heir")
    [job] = bench.take()
    for turn in range(5):
        giver, taker = ("worker", "heir") if turn % 2 == 0 else ("heir", "worker")
        assert bench.workers[giver].append([(job, chunk(turn, turn))])[0][0] is Verdict.OK
        assert bench.workers[giver].release([job]) == [Verdict.OK]
        assert bench.workers[giver].append([(job, chunk(turn + 1, 99))])[0][0] is Verdict.FENCED
        assert bench.workers[taker].wait_for_work(0.5)
        [job] = bench.take(taker)
        assert job.attempt == turn + 2
    assert job.completion_ids == (0, 1, 2, 3, 4)


async def test_orphans_come_before_the_queue(bench: Bench) -> None:
    first = await bench.admit()
    [job] = bench.take()
    await bench.admit(priority=0)
    bench.workers["worker"].release([job])
    assert bench.take()[0].id == first.id


async def test_nothing_passes_an_orphan_that_waits_for_room(bench: Bench) -> None:
    """Small jobs would take the room that a large one needs, again and again."""
    large = await bench.admit(max_new_tokens=500)
    [job] = bench.take()
    bench.workers["worker"].release([job])
    small = await bench.admit()
    worker = bench.workers["worker"]
    assert worker.next(MODEL, REVISION, num_slots=4, num_tokens=100) == []
    assert [job.id for job in worker.next(MODEL, REVISION, num_slots=4, num_tokens=1_000)] == [large.id, small.id]


async def test_job_that_kills_its_workers_is_failed(bench: Bench) -> None:
    admission = await bench.admit()
    other = await bench.admit()
    for attempt in (1, 2, 3):
        job = bench.take()[0]
        assert (job.id, job.attempt) == (admission.id, attempt)
        let_lease_run_out(bench)
    assert [job.id for job in bench.take()] == [other.id]
    record = await read(bench, job)
    assert record.state is JobState.FAILED
    assert record.finish is not None
    assert (record.finish.reason, record.finish.code) == ("error", "worker_lost")
    assert record.finish.error
    [(_, dead)] = bench.client.xrange(keys.DEAD)  # type: ignore[misc]
    assert dead["j"] == admission.id  # type: ignore[index]


async def test_replaced_model_repins_an_untouched_job_and_fails_a_begun_one(bench: Bench) -> None:
    for _ in range(2):
        await bench.admit()
    untouched, begun = bench.take(num_slots=2)
    bench.workers["worker"].append([(begun, chunk(0, 5))])
    bench.workers["worker"].release([untouched, begun])
    [job] = bench.take(num_slots=2, revision="revision-2")
    assert job.id == untouched.id
    assert (await read(bench, untouched)).revision == "revision-2"
    finish = (await read(bench, begun)).finish
    assert finish is not None
    assert (finish.reason, finish.code) == ("error", "model_changed")


@pytest.mark.parametrize("code", [None, "model_changed"])
async def test_failure_carries_the_workers_sentence(bench: Bench, code: str | None) -> None:
    await bench.admit()
    [job] = bench.take()
    ending = Finish(reason="error", error="The prompt has 9000 tokens.", code=code)
    assert bench.workers["worker"].finish(job, ending) is Verdict.OK
    record = await read(bench, job)
    assert record.finish == ending
    assert record.state is JobState.FAILED
