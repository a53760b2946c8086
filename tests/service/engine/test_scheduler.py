"""What a step computes: everybody who decodes, and a bounded piece of the prompts, fairly shared."""

from __future__ import annotations

import torch

from service.engine.kv_cache import KVCache
from service.engine.pace import Pace
from service.engine.scheduler import Scheduler, Work, share
from service.engine.sequence import Sequence
from shared.sampling import SamplingParams
from tests.tiny import TINY


def sequence(num_prompt_tokens: int, max_new_tokens: int = 10, name: str = "") -> Sequence:
    return Sequence(
        id=name or str(num_prompt_tokens),
        prompt_ids=[1] * num_prompt_tokens,
        params=SamplingParams(),
        max_new_tokens=max_new_tokens,
    )


def scheduler_of(
    num_slots: int = 4,
    max_cached_tokens: int = 1_000,
    chunk: int = 64,
    busy_chunk: int | None = 16,
    share_prefixes: bool = False,
) -> Scheduler:
    cache = KVCache(
        TINY,
        num_slots=num_slots,
        max_cached_tokens=max_cached_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return Scheduler(
        cache,
        prefill_chunk=chunk,
        pace=Pace(fixed_s=0.01, each_s=0.001),
        busy_prefill_chunk=busy_chunk,
        share_prefixes=share_prefixes,
    )


def compute(scheduler: Scheduler) -> list[Work]:
    """Plan a step and do as the engine would."""
    work = scheduler.plan()
    for item in work:
        item.sequence.num_cached = item.span.end
        if item.is_complete:
            item.sequence.completion_ids.append(1)
    return work


def test_a_long_prompt_takes_bounded_pieces_beside_those_who_decode() -> None:
    scheduler = scheduler_of()
    short, long = sequence(3), sequence(200)
    scheduler.add(short)
    compute(scheduler)
    scheduler.add(long)
    for _ in range(5):
        work = compute(scheduler)
        assert [(item.sequence, item.span.count) for item in work] == [(short, 1), (long, 16)]
    scheduler.remove(short)
    assert [item.span.count for item in compute(scheduler)] == [64]


def test_the_pace_bounds_the_pieces_and_they_grow_by_doubling() -> None:
    scheduler = scheduler_of(busy_chunk=None, chunk=256)
    scheduler.pace = Pace(fixed_s=0.1, each_s=0.001)  # 70 tokens lengthen a step of one stream by 70 %
    short, long = sequence(3, max_new_tokens=50), sequence(200)
    scheduler.add(short)
    compute(scheduler)
    scheduler.add(long)
    assert [compute(scheduler)[1].span.count for _ in range(4)] == [32, 64, 70, 34]


def test_a_slow_machine_still_gets_on_with_prompts() -> None:
    scheduler = scheduler_of(busy_chunk=None)
    scheduler.pace = Pace(fixed_s=0.001, each_s=0.1)
    scheduler.add(sequence(3))
    compute(scheduler)
    scheduler.add(sequence(200))
    assert compute(scheduler)[1].span.count == 8


def test_many_who_decode_leave_room_for_twice_their_number() -> None:
    scheduler = scheduler_of(num_slots=11, max_cached_tokens=2_000)
    for _ in range(10):
        scheduler.add(sequence(3))
    compute(scheduler)
    scheduler.add(sequence(200))
    assert [item.span.count for item in compute(scheduler)] == [1] * 10 + [20]


def test_many_short_prompts_start_in_one_step() -> None:
    scheduler = scheduler_of()
    for _ in range(4):
        scheduler.add(sequence(5))
    assert [item.span.count for item in compute(scheduler)] == [5] * 4
    assert [item.span.count for item in compute(scheduler)] == [1] * 4


def test_single_tokens_come_first_by_slot() -> None:
    scheduler = scheduler_of()
    scheduler.add(sequence(20))
    scheduler.add(sequence(1))
    work = scheduler.plan()
    assert [(item.span.slot, item.span.count) for item in work] == [(1, 1), (0, 16)]


def test_one_that_does_not_fit_waits_and_is_not_overtaken() -> None:
    scheduler = scheduler_of(num_slots=8, max_cached_tokens=100)
    first, second, third = sequence(50), sequence(60), sequence(2)
    for each in (first, second, third):
        scheduler.add(each)
    assert [item.sequence for item in compute(scheduler)] == [first]
    assert list(scheduler.waiting) == [second, third]
    scheduler.remove(second)
    assert {item.sequence for item in compute(scheduler)} == {first, third}


def test_the_first_keeps_half_of_the_step_and_short_prompts_go_before_long_ones() -> None:
    first, long, short = sequence(500), sequence(300), sequence(10)
    assert share([first, long, short], 64) == {first: 32, short: 10, long: 22}
    assert share([short, long], 64) == {short: 10, long: 54}
    assert share([first, short], 64) == {first: 54, short: 10}
    assert share([first, short], 1) == {first: 1}
    assert share([], 64) == {}


def test_a_resumed_completion_is_computed_with_its_prompt() -> None:
    scheduler = scheduler_of()
    resumed = sequence(30)
    resumed.completion_ids.extend([7, 8, 9])
    scheduler.add(resumed)
    [item] = scheduler.plan()
    assert (item.span.start, item.span.count, item.is_complete) == (0, 33, True)
    assert resumed.tokens(28, 5) == [1, 1, 7, 8, 9]
    assert resumed.tokens(31, 2) == [8, 9]
