"""Who is refused is told when to come back, and finds room then; a key gets what it is entitled to and no more."""

from __future__ import annotations

from typing import Any

import pytest

from service.api_keys import ApiKey
from service.errors import QueueFull
from service.queue import keys
from tests.service.queue.conftest import MODEL, Bench, with_limits

pytestmark = pytest.mark.anyio


async def refused(bench: Bench, **values: Any) -> QueueFull:
    """Admit what must be refused; every job costs 12."""
    with pytest.raises(QueueFull) as refusal:
        await bench.admit(**values)
    return refusal.value


def promises(bench: Bench) -> list[str]:
    return [str(who) for who in bench.client.zrange(keys.PROMISES + MODEL, 0, -1)]


def entitled(**limits: Any) -> ApiKey:
    return ApiKey(sha256="0" * 64, **limits)


@pytest.fixture
async def full(bench: Bench) -> Bench:
    """Four jobs wait, which is all that may, and the service is known to need 1.5 s for each."""
    with_limits(bench, max_queued_jobs=4, lease_ms=60_000)
    for _ in range(4):
        await bench.admit()
    bench.client.hset(keys.COUNTS + MODEL, "speed", 8)
    return bench


async def test_promises_are_as_far_apart_as_the_service_needs(full: Bench) -> None:
    waits = [(await refused(full, prompt_ids=(1, number))).retry_after_s for number in range(10, 15)]
    assert waits == [pytest.approx(1.5 * place, abs=0.2) for place in range(2, 7)]


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
    assert 2 < ((await refused(full, **patient)).retry_after_s or 0) <= 3, "it came too early; its time stands"
    now_ms = full.client.time()[0] * 1000
    full.client.zadd(keys.PROMISES + MODEL, {who: now_ms}, xx=True)  # its time has come
    await full.admit(**patient, sampling={"temperature": 1.0, "seed": 99})  # the seed was drawn anew
    assert full.client.zscore(keys.PROMISES + MODEL, who) is None
    assert (await refused(full, prompt_ids=(9, 9))).retry_after_s


async def test_room_is_not_kept_for_ever_nor_more_than_half_of_it(full: Bench) -> None:
    for number in range(10):
        await refused(full, prompt_ids=(1, number))
    now_ms = full.client.time()[0] * 1000
    promised = promises(full)
    full.client.zadd(keys.PROMISES + MODEL, dict.fromkeys(promised, now_ms))
    full.take(num_slots=3)
    await full.admit(prompt_ids=(8, 8))  # two of four are kept, one waits, and this is the second
    await refused(full, prompt_ids=(9, 9))
    full.client.zadd(keys.PROMISES + MODEL, dict.fromkeys(promised, now_ms - 10_000))
    await full.admit(prompt_ids=(9, 9))
    assert not full.client.exists(keys.PROMISES + MODEL)


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
