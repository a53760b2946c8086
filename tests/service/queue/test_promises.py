"""Who is refused is told when to come back, and finds room then; a key gets what it is entitled to and no more."""

from __future__ import annotations

from typing import Any

import pytest

from service.api_keys import ApiKey
from service.errors import QueueFull
from service.queue import keys
from service.queue.job import Finish
from tests.service.queue.conftest import MODEL, Bench, chunk, with_limits

pytestmark = pytest.mark.anyio


async def refused(bench: Bench, **values: Any) -> QueueFull:
    """Admit what must be refused; every job costs 12."""
    with pytest.raises(QueueFull) as refusal:
        await bench.admit(**values)
    return refusal.value


def promises(bench: Bench) -> list[str]:
    return [str(who) for who in bench.client.zrange(keys.PROMISES + MODEL, 0, -1)]


def come_due(bench: Bench, *, ago_ms: int = 0) -> None:
    """Everybody's turn has come, or came so long ago."""
    now_ms = bench.client.time()[0] * 1000
    bench.client.zadd(keys.PROMISES + MODEL, dict.fromkeys(promises(bench), now_ms - ago_ms))


def entitled(**limits: Any) -> ApiKey:
    return ApiKey(sha256="0" * 64, **limits)


@pytest.fixture
async def full(bench: Bench) -> Bench:
    """Four jobs wait, which is all that may, and the service is known to need a minute for each."""
    with_limits(bench, max_queued_jobs=4, lease_ms=60_000)
    for _ in range(4):
        await bench.admit()
    bench.client.hset(keys.COUNTS + MODEL, "speed", 0.2)
    return bench


async def test_promises_are_as_far_apart_as_the_service_needs(full: Bench) -> None:
    waits = [(await refused(full, prompt_ids=(1, number))).retry_after_s for number in range(10, 15)]
    assert waits == [pytest.approx(60 * place, abs=20) for place in range(2, 7)]


async def test_without_a_measured_speed_nothing_is_promised(full: Bench) -> None:
    full.client.hdel(keys.COUNTS + MODEL, "speed")
    assert 4 <= ((await refused(full)).retry_after_s or 0) <= 6
    assert not full.client.exists(keys.PROMISES + MODEL)


async def test_no_promise_reaches_beyond_ten_minutes(full: Bench) -> None:
    full.client.hset(keys.COUNTS + MODEL, "speed", 0.06)
    waits = [(await refused(full, prompt_ids=(1, number))).retry_after_s for number in range(6)]
    assert waits == [pytest.approx(400, abs=1), *[pytest.approx(600, abs=1)] * 5]
    assert full.client.zcard(keys.PROMISES + MODEL) == 2


async def test_who_comes_back_in_time_goes_before_newcomers(full: Bench) -> None:
    patient: dict[str, Any] = {"prompt_ids": (7, 7)}
    await refused(full, **patient)
    [who] = promises(full)
    full.take()  # one may wait now, and that one is promised
    assert (await refused(full, prompt_ids=(8, 8))).retry_after_s
    assert 60 < ((await refused(full, **patient)).retry_after_s or 0) <= 120, "it came too early; its time stands"
    now_ms = full.client.time()[0] * 1000
    full.client.zadd(keys.PROMISES + MODEL, {who: now_ms}, xx=True)  # its time has come
    await full.admit(**patient, sampling={"temperature": 1.0, "seed": 99})  # the seed was drawn anew
    assert full.client.zscore(keys.PROMISES + MODEL, who) is None
    assert (await refused(full, prompt_ids=(9, 9))).retry_after_s


async def test_no_seat_stands_empty_for_who_is_still_on_the_way(full: Bench) -> None:
    for number in range(10):
        await refused(full, prompt_ids=(1, number))
    full.take(num_slots=2)
    await full.admit(prompt_ids=(8, 8))  # a quarter of four is left to those who come back, and no more
    await refused(full, prompt_ids=(9, 9))


async def test_for_those_whose_turn_has_come_the_line_may_be_twice_as_long(full: Bench) -> None:
    for number in range(6):
        await refused(full, prompt_ids=(1, number))
    come_due(full)
    for number in range(4):
        await full.admit(prompt_ids=(1, number))
    broken = [(await refused(full, prompt_ids=(1, number))).retry_after_s for number in (4, 5)]
    assert broken == [pytest.approx(60, abs=20), pytest.approx(120, abs=20)], "they have a line of their own"
    assert (await refused(full, prompt_ids=(9, 9))).retry_after_s


async def test_that_holds_for_cost_as_well(full: Bench) -> None:
    with_limits(full, max_queued_jobs=100, max_queued_tokens=60)
    await full.admit(prompt_ids=(1, 1))
    waits = [(await refused(full, prompt_ids=(1, number))).retry_after_s for number in range(2, 10)]
    assert waits == [pytest.approx(60 * (place + 2.25), abs=20) for place in range(1, 8)] + [pytest.approx(600, abs=20)]
    full.take(num_slots=2)
    await refused(full, prompt_ids=(8, 8), max_new_tokens=18)  # a quarter of the tokens is left to them
    come_due(full)
    for number in range(2, 9):
        await full.admit(prompt_ids=(1, number))
    await refused(full, prompt_ids=(1, 9))


async def test_turns_that_nobody_took_are_forgotten(full: Bench) -> None:
    await refused(full)
    come_due(full, ago_ms=11_000)
    full.take()
    await full.admit(prompt_ids=(9, 9))
    assert not full.client.exists(keys.PROMISES + MODEL)


async def test_speed_is_that_of_the_full_service(bench: Bench) -> None:
    with_limits(bench, lease_ms=60_000)

    async def end_one(ran_s: float) -> float:
        """A job of cost 12 ran alone for so long."""
        [job] = bench.take()
        bench.client.hincrbyfloat(keys.JOB + job.id, "leased", -1000 * ran_s)
        bench.workers["worker"].finish(job, Finish(reason="length"), chunk=chunk(0, 5))
        return (await bench.queue.statistics())[MODEL].tokens_per_second or 0.0

    await bench.admit()
    assert await end_one(12) == pytest.approx(1, rel=0.01), "nothing better is known"
    await bench.admit()
    await bench.admit()
    assert await end_one(1) == pytest.approx(12, rel=0.01), "somebody waits: this is what it can do"
    assert await end_one(12) == pytest.approx(12, rel=0.01), "nobody waits: a lone stream is no measure"
    for _ in range(3):
        await bench.admit()
    assert await end_one(2) == pytest.approx(9, rel=0.01), "the mean"
    bench.client.hincrbyfloat(keys.COUNTS + MODEL, "measured", -300_000)
    assert await end_one(12) == pytest.approx(1, rel=0.01), "of the last half minute"


async def test_rate_of_jobs(bench: Bench) -> None:
    key = entitled(requests_per_minute=2)
    for _ in range(2):
        await bench.admit(key="a", entitled_to=key)
    refusal = await refused(bench, key="a", entitled_to=key)
    assert refusal.code_name == "rate_limited" and "2 requests a minute" in str(refusal)
    assert refusal.retry_after_s == pytest.approx(30, abs=1)
    await bench.admit(key="b", entitled_to=key)
    bench.client.hincrby(keys.RATE + "a", "at", -31_000)  # half a minute later
    await bench.admit(key="a", entitled_to=key)
    await refused(bench, key="a", entitled_to=key)


async def test_rate_of_tokens(bench: Bench) -> None:
    key = entitled(tokens_per_minute=30)
    for _ in range(2):
        await bench.admit(key="a", entitled_to=key)
    assert (await refused(bench, key="a", entitled_to=key)).retry_after_s == pytest.approx(12, abs=1)
    await bench.admit(key="b", entitled_to=key, max_new_tokens=58)  # more than the bucket holds: it leaves a debt
    assert (await refused(bench, key="b", entitled_to=key)).retry_after_s == pytest.approx(84, abs=1)


async def test_what_was_never_served_does_not_count(bench: Bench) -> None:
    key = entitled(requests_per_minute=1, tokens_per_minute=12, max_queued_jobs=1)
    for _ in range(3):
        await bench.queue.cancel((await bench.admit(key="a", entitled_to=key)).id)
    await bench.admit(key="a", entitled_to=key)
    bench.take()
    assert (await refused(bench, key="a", entitled_to=key)).code_name == "rate_limited"


async def test_jobs_of_one_key_that_may_wait(bench: Bench) -> None:
    key = entitled(max_queued_jobs=2)
    for _ in range(2):
        await bench.admit(key="a", entitled_to=key)
    refusal = await refused(bench, key="a", entitled_to=key)
    assert refusal.code_name == "key_queue_full" and refusal.retry_after_s
    await bench.admit(key="b", entitled_to=key)
    bench.take()
    await bench.admit(key="a", entitled_to=key)


async def test_share_is_by_weight(bench: Bench) -> None:
    with_limits(bench, max_queued_jobs=100, max_queued_tokens=10_000, lease_ms=60_000)
    heavy = entitled(weight=3)
    for _ in range(12):
        await bench.admit(key="heavy", entitled_to=heavy)
        await bench.admit(key="light")
    served = [bench.client.hget(keys.JOB + job.id, "key") for job in bench.take(num_slots=12)]
    assert served.count("heavy") == 9
