"""Who is served next: classes, keys, and jobs too large for the room that is left."""

from __future__ import annotations

from itertools import pairwise

import pytest

from service.queue import keys
from service.queue.job import Finish
from tests.service.queue.conftest import MODEL, Bench, with_limits

pytestmark = pytest.mark.anyio


@pytest.fixture
def roomy(bench: Bench) -> Bench:
    with_limits(bench, max_queued_jobs=1_000, max_queued_tokens=1_000_000, lease_ms=60_000)
    return bench


async def order_of_service(bench: Bench) -> list[str]:
    """Take everything, one at a time; return the keys in order."""
    served = []
    while jobs := bench.take():
        served.append(bench.client.hget(keys.JOB + jobs[0].id, "key"))
    return [str(key) for key in served]


async def test_one_key_is_served_in_order_of_arrival(roomy: Bench) -> None:
    admitted = [(await roomy.admit(max_new_tokens=size)).id for size in (50, 1, 20, 3)]
    assert [roomy.take()[0].id for _ in range(4)] == admitted


async def test_equal_keys_are_served_in_order_of_arrival(roomy: Bench) -> None:
    admitted = [(await roomy.admit(key=str(i))).id for i in range(8)]
    assert [job.id for job in roomy.take(num_slots=8)] == admitted


async def test_flooding_key_lines_up_behind_itself(roomy: Bench) -> None:
    for _ in range(50):
        await roomy.admit(key="flood")
    for _ in range(5):
        await roomy.admit(key="modest")
    served = await order_of_service(roomy)
    places = [i for i, key in enumerate(served) if key == "modest"]
    assert places[0] <= 1
    assert all(later - earlier <= 2 for earlier, later in pairwise(places))


async def test_late_key_neither_waits_for_nor_overtakes_what_others_had(roomy: Bench) -> None:
    for _ in range(20):
        await roomy.admit(key="early")
    roomy.take(num_slots=10)
    for _ in range(10):
        await roomy.admit(key="late")
    served = await order_of_service(roomy)
    assert served[:10].count("late") == 5


async def test_share_is_by_cost_not_by_jobs(roomy: Bench) -> None:
    for _ in range(12):
        await roomy.admit(key="long", max_new_tokens=98)
        await roomy.admit(key="short", max_new_tokens=23)
    assert (await order_of_service(roomy))[:10].count("short") == 8


async def test_cancelled_jobs_are_not_owed(roomy: Bench) -> None:
    await roomy.admit(key="patient")
    for _ in range(20):
        await roomy.queue.cancel((await roomy.admit(key="fickle")).id)
    await roomy.admit(key="patient")
    await roomy.admit(key="fickle")
    assert await order_of_service(roomy) == ["patient", "fickle", "patient"]


async def test_empty_line_forgets_its_debts(roomy: Bench) -> None:
    await roomy.admit(key="a", max_new_tokens=500)
    roomy.take()
    assert not roomy.client.exists(keys.SHARE + MODEL + ":1")


async def test_classes_in_order_and_none_starves(roomy: Bench) -> None:
    for _ in range(60):
        for priority, key in ((0, "high"), (1, "normal"), (2, "batch")):
            await roomy.admit(key=key, priority=priority)
    served = (await order_of_service(roomy))[:48]
    assert [served.count(key) for key in ("high", "normal", "batch")] == [42, 3, 3]
    assert served[0] == "high"


async def test_position_counts_all_that_is_served_before(roomy: Bench) -> None:
    await roomy.admit(priority=2)
    await roomy.admit(priority=1)
    assert (await roomy.admit(priority=1)).position == 2
    assert (await roomy.admit(priority=0)).position == 1
    assert (await roomy.admit(priority=2)).position == 5


async def test_wait_is_the_cost_in_front_at_the_measured_speed(roomy: Bench) -> None:
    await roomy.admit()
    assert (await roomy.admit()).eta_s is None
    roomy.client.hset(keys.COUNTS + MODEL, "speed", 12)
    assert (await roomy.admit()).eta_s == 3.0


async def test_large_job_at_the_head_is_not_passed_by(roomy: Bench) -> None:
    large = await roomy.admit(max_new_tokens=498)
    await roomy.admit()
    worker = roomy.workers["worker"]
    assert worker.next(MODEL, "revision-1", num_slots=4, num_tokens=499) == []
    first, second = worker.next(MODEL, "revision-1", num_slots=4, num_tokens=512)
    assert first.id == large.id
    assert worker.finish(second, Finish(reason="stop")) == "ok"


async def test_a_key_with_most_of_what_runs_leaves_a_slot_to_others(roomy: Bench) -> None:
    def take(num_slots: int) -> list[str]:
        jobs = roomy.workers["worker"].next(MODEL, "revision-1", num_slots=num_slots, num_tokens=10_000, num_spare=1)
        return [str(roomy.client.hget(keys.JOB + job.id, "key")) for job in jobs]

    for _ in range(5):
        await roomy.admit(key="flood")
    assert take(4) == ["flood"] * 3
    assert take(1) == []
    await roomy.admit(key="other")
    assert take(1) == ["other"]
    for _ in range(4):
        await roomy.admit(key="other")
    assert take(3) == ["flood", "flood", "other"], "two by its share; the last is not for it"


async def test_without_keys_every_slot_is_for_everybody(roomy: Bench) -> None:
    for _ in range(4):
        await roomy.admit()
    assert len(roomy.workers["worker"].next(MODEL, "revision-1", num_slots=4, num_tokens=10_000, num_spare=1)) == 4
