"""Admission: exact bounds, refusals that say when to come back, and one job per idempotency key."""

from __future__ import annotations

import asyncio
import random
from dataclasses import fields

import pytest

from service.errors import IdempotencyConflict, NotReady, QueueFull
from service.queue import keys
from service.queue.job import Finish, JobState
from service.queue.job_queue import Application
from service.queue.scripts import source
from tests.service.queue.conftest import MODEL, Bench, chunk, with_limits, worker_info

pytestmark = pytest.mark.anyio


async def test_admitted_job_is_queued_with_its_place(bench: Bench) -> None:
    first, second = await bench.admit(), await bench.admit()
    assert (first.position, second.position) == (1, 2)
    assert first.is_new
    record = await bench.queue.get(second.id)
    assert record is not None
    assert record.state is JobState.QUEUED
    assert record.position == 2
    assert record.request.prompt_ids == (1, 2)
    assert record.finish is None


async def test_bound_by_jobs_is_exact_under_a_burst(bench: Bench) -> None:
    answers = await asyncio.gather(*(bench.admit() for _ in range(30)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, QueueFull)]
    assert len(refused) == 30 - 8
    assert all(refusal.retry_after_s and 1 <= refusal.retry_after_s <= 120 for refusal in refused)
    assert (await bench.queue.statistics())[MODEL].queued == 8
    assert "8 of 8 jobs" in str(refused[0])


async def test_bound_by_cost_is_exact(bench: Bench) -> None:
    with_limits(bench, max_queued_tokens=100)
    await bench.admit(max_new_tokens=58)
    await bench.admit(max_new_tokens=38)
    with pytest.raises(QueueFull):
        await bench.admit(max_new_tokens=1, prompt_ids=(1,))
    assert (await bench.queue.statistics(MODEL))[MODEL].queued_cost == 100


async def test_refused_jobs_leave_nothing_behind(bench: Bench) -> None:
    with_limits(bench, max_queued_jobs=0)
    before = sorted(bench.client.keys())
    with pytest.raises(QueueFull):
        await bench.admit(idempotency=("key", "body"), cancel_on_disconnect=True)
    assert sorted(bench.client.keys()) == before


async def test_room_returns_with_every_kind_of_ending(bench: Bench) -> None:
    worker = bench.workers["worker"]
    queued, running = await bench.admit(), await bench.admit()
    [job] = bench.take()
    await bench.queue.cancel(running.id)
    worker.finish(job, Finish(reason="length"), chunk=chunk(0, 5))
    expired = await bench.admit(timeout_s=0.001)
    await asyncio.sleep(0.003)
    await bench.queue.reap()
    failed = await bench.admit()
    [job] = bench.take()
    worker.finish(job, Finish(reason="error", error="The model cannot serve this."))
    statistics = (await bench.queue.statistics())[MODEL]
    assert (statistics.queued, statistics.queued_cost, statistics.running, statistics.running_cost) == (0, 0, 0, 0)
    states = [(await bench.queue.get(each.id)).state for each in (queued, running, expired, failed)]  # type: ignore[union-attr]
    assert states == ["succeeded", "cancelled", "expired", "failed"]


async def test_speed_is_measured_from_finished_jobs(bench: Bench) -> None:
    await bench.admit(max_new_tokens=98)
    [job] = bench.take()
    await asyncio.sleep(0.02)
    bench.workers["worker"].finish(job, Finish(reason="length"), chunk=chunk(0, 5))
    speed = (await bench.queue.statistics())[MODEL].tokens_per_second
    assert speed is not None
    assert 10 < speed <= 100 / 0.02
    assert (await bench.admit()).eta_s == pytest.approx(12 / speed, abs=0.001)


async def test_jobs_that_end_together_ran_beside_each_other(bench: Bench) -> None:
    for _ in range(4):
        await bench.admit(max_new_tokens=98)
    jobs = bench.take(num_slots=4)
    await asyncio.sleep(0.05)
    bench.workers["worker"].finish_many([(job, Finish(reason="length"), chunk(0, 5), None) for job in jobs])
    speed = (await bench.queue.statistics())[MODEL].tokens_per_second
    [started, ended] = [
        float(str(bench.client.hget(keys.JOB + jobs[0].id, name))) / 1000 for name in ("leased", "finished")
    ]
    assert speed == pytest.approx(4 * 100 / (ended - started), rel=0.05)


async def test_model_without_a_live_worker_is_not_ready(bench: Bench) -> None:
    with pytest.raises(NotReady, match="'other'") as refusal:
        await bench.admit(model="other")
    assert refusal.value.retry_after_s
    bench.workers["worker"].withdraw()
    with pytest.raises(NotReady):
        await bench.admit()


async def test_draining_worker_admits_nothing_and_stays_visible(bench: Bench) -> None:
    bench.workers["worker"].announce(worker_info("worker", draining=True))
    with pytest.raises(NotReady):
        await bench.admit()
    [info] = await bench.queue.workers()
    assert info.draining
    assert info.age_ms < 5_000


async def test_one_of_two_workers_is_enough(bench: Bench) -> None:
    bench.worker("second", models={MODEL: "revision-1", "other": "revision-9"})
    bench.workers["worker"].withdraw()
    await bench.admit()
    await bench.admit(model="other")
    assert {info.id: info.models for info in await bench.queue.workers()} == {
        "second": {MODEL: "revision-1", "other": "revision-9"}
    }
    statistics = await bench.queue.statistics()
    assert (statistics[MODEL].workers, statistics["other"].queued) == (1, 1)


async def test_same_key_and_body_attach_to_the_same_job(bench: Bench) -> None:
    first = await bench.admit(idempotency=("key", "body"))
    again = await bench.admit(idempotency=("key", "body"))
    assert (again.id, again.is_new, again.position) == (first.id, False, 1)
    [job] = bench.take()
    bench.workers["worker"].finish(job, Finish(reason="stop"), chunk=chunk(0, 5))
    afterwards = await bench.admit(idempotency=("key", "body"))
    assert (afterwards.id, afterwards.is_new, afterwards.position) == (first.id, False, 0)


async def test_same_key_with_another_body_conflicts(bench: Bench) -> None:
    await bench.admit(idempotency=("key", "body"))
    with pytest.raises(IdempotencyConflict):
        await bench.admit(idempotency=("key", "another"))
    await bench.admit(idempotency=("key", "another"), key="another client")


async def test_same_key_at_once_makes_one_job(bench: Bench) -> None:
    answers = await asyncio.gather(*(bench.admit(idempotency=("key", "body")) for _ in range(10)))
    assert len({answer.id for answer in answers}) == 1
    assert sum(answer.is_new for answer in answers) == 1


async def test_forgotten_job_frees_its_idempotency_key(bench: Bench) -> None:
    first = await bench.admit(idempotency=("key", "body"))
    await bench.queue.cancel(first.id)
    bench.client.delete(keys.JOB + first.id)
    assert (await bench.admit(idempotency=("key", "another"))).is_new


async def test_request_survives_any_text(bench: Bench) -> None:
    text = 'nul \0 quote " emoji 🙂 surrogate \ud800 line\u2028'
    admission = await bench.admit(stop=("\n\n", "🙂"), options={"prompt": text}, key="clé", trace="00-abc-def-01")
    record = await bench.queue.get(admission.id)
    assert record is not None
    assert record.request.options == {"prompt": text}
    assert record.request.stop == ("\n\n", "🙂")
    assert record.trace == "00-abc-def-01"


def test_an_application_has_the_names_and_the_order_that_the_script_reads() -> None:
    header = [line.removeprefix("--") for line in source("admit").splitlines() if line.startswith("--")]
    names = " ".join(header).partition("ARGV:")[2].split()
    assert [field.name.rstrip("_") for field in fields(Application)] == names


async def test_a_host_that_seeds_the_global_generator_does_not_give_all_refused_the_same_wait(bench: Bench) -> None:
    for _ in range(bench.limits.max_queued_jobs):
        await bench.admit()
    waits = set()
    for seed in range(5):
        random.seed(0)
        with pytest.raises(QueueFull) as refused:
            await bench.admit(prompt_ids=(seed,))
        waits.add(refused.value.retry_after_s)
    assert len(waits) == 5
