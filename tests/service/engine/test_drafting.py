"""Guesses: where they come from, how many are worth making, and that they change nothing but the number of steps."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.oracle import EagerPace
from service.engine.drafting import MOST, Drafter
from service.engine.engine import Engine
from service.engine.kv_cache import Span
from service.engine.pace import Load, Pace
from service.engine.sequence import Sequence
from shared.grammar import regex_grammar
from shared.sampling import SamplingParams
from tests.tiny import tiny_model, tiny_tokenizer

EAGER = EagerPace(fixed_s=0.01, each_s=0.001)


def drafter_of(token_ids: list[int]) -> Drafter:
    drafter = Drafter()
    drafter.read(token_ids)
    return drafter


def test_what_followed_the_last_time_is_guessed() -> None:
    drafter = drafter_of([1, 2, 3, 4, 5, 6, 9, 2, 3, 4])
    assert drafter.guess(EAGER, 1, 3) == (5, 6, 9)
    assert drafter.guess(EAGER, 1, 12)[:6] == (5, 6, 9, 2, 3, 4)
    assert drafter_of([1, 2, 3]).guess(EAGER, 1, 12) == ()
    assert drafter_of([5] * 6).guess(EAGER, 1, 4) == (5,) * 4


def test_the_longest_and_the_latest_run_decides() -> None:
    assert drafter_of([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]).guess(EAGER, 1, 1) == (7,), "three tokens tell more than two"
    assert drafter_of([2, 3, 7, 9, 2, 3, 8, 5, 2, 3]).guess(EAGER, 1, 1) == (8,)


def test_guesses_that_prove_wrong_are_made_less_and_tried_again_later() -> None:
    pace, drafter = Pace(fixed_s=0.010, each_s=0.001), drafter_of([1, 2] * 10)
    first = len(drafter.guess(pace, 1, MOST))
    assert 0 < first < MOST
    drafter.learn(3, 3)
    drafter.learn(8, 8)
    assert len(drafter.guess(pace, 1, MOST)) > first
    for _ in range(100):
        drafter.learn(1, 0)
    assert drafter.guess(pace, 1, MOST) == ()
    assert any(drafter.guess(pace, 1, MOST) for _ in range(100))


def test_pace_learns_the_line_and_what_follows_from_it() -> None:
    pace = Pace(fixed_s=0.1, each_s=0.01)
    for _ in range(30):
        for num_tokens in (1, 9, 20):
            pace.observe(Load(num_tokens), 0.008 + 0.0005 * num_tokens)
    assert pace.fixed_s == pytest.approx(0.008, rel=0.02) and pace.each_s == pytest.approx(0.0005, rel=0.02)
    assert 0.5 * 17 <= pace.prompt_tokens_beside(1) <= 17, "so many double the step"
    assert pace.prompt_tokens_beside(32) > pace.prompt_tokens_beside(1)
    assert pace.num_drafts_worth(1, 0.9, MOST) == MOST
    assert pace.num_drafts_worth(32, 0.5, MOST) == 0, "with many streams the arithmetic is what costs"
    assert pace.num_drafts_worth(1, 1.0, 5) == 5
    pace.observe(Load(1), 10.0)  # the machine slept
    assert pace.expected_s(Load(1)) < 0.02


def test_tokens_that_look_back_at_more_cost_more_so_fewer_stand_beside_streams() -> None:
    assert Load.of([Span(0, 700, 1), Span(1, 100, 20)]) == Load(21, 19 * 120)
    pace = Pace(fixed_s=0.1, each_s=0.01)
    for start in range(0, 1_500, 20):
        load = Load.of([Span(0, 30, 1), Span(1, start, 20)])
        pace.observe(load, 0.008 + 0.0003 * 21 + 2e-7 * load.num_positions)
        pace.observe(Load(1), 0.0083)
    assert pace.look_s == pytest.approx(2e-7, rel=0.05)
    assert pace.prompt_tokens_beside(1, position=0) == int(0.7 * 0.0083 / 0.0003)
    assert pace.prompt_tokens_beside(1, position=1_500) == int(0.7 * 0.0083 / 0.0006)
    assert pace.num_drafts_worth(8, 0.5, MOST, position=1_500) < pace.num_drafts_worth(8, 0.5, MOST)


def test_what_a_gpu_takes_can_be_read_in_the_log() -> None:
    pace = Pace(fixed_s=0.0008, each_s=2e-6, look_s=3e-11)
    assert str(pace) == "0.8 ms a step, 2 us a token and 0.03 us a thousand positions it looks back at"


def test_steps_that_are_all_alike_leave_the_slope() -> None:
    pace = Pace(fixed_s=0.01, each_s=0.001)
    for _ in range(500):
        pace.observe(Load(4), 0.020)
    assert pace.expected_s(Load(4)) == pytest.approx(0.020, rel=0.05)
    assert pace.each_s == pytest.approx(0.001, rel=0.5)


def run(engine: Engine, **values: Any) -> tuple[list[int], int]:
    """Return the tokens and the steps they took."""
    params = SamplingParams(**{"temperature": 0.0, **values.pop("params", {})})
    engine.add(Sequence(**{"id": "one", "prompt_ids": [5, 6, 7], "params": params, "max_new_tokens": 60, **values}))
    token_ids: list[int] = []
    while engine.has_work:
        for output in engine.step():
            token_ids += output.token_ids
    return token_ids, engine.statistics.num_steps


@pytest.fixture
def two_engines(one_thread: None) -> list[Engine]:
    engines = [
        Engine(tiny_model(), tiny_tokenizer(), num_slots=1, max_cached_tokens=256, speculate=on) for on in (False, True)
    ]
    engines[1].pace = engines[1].scheduler.pace = EagerPace(fixed_s=0.01, each_s=0.001)
    return engines


def test_repeating_text_takes_fewer_steps_and_the_same_tokens(two_engines: list[Engine]) -> None:
    plain, guessing = (run(engine, params={"logit_bias": {9: 3.0, 8: 2.9}}) for engine in two_engines)
    assert plain[0] == guessing[0] and guessing[1] < plain[1] == 60
    statistics = two_engines[1].statistics
    assert statistics.num_steps + statistics.num_right_drafts == 60
    assert statistics.num_right_drafts <= statistics.num_drafts


def test_what_a_grammar_forces_takes_few_steps(two_engines: list[Engine]) -> None:
    values = {"grammar": regex_grammar("First Citizen: Before we proceed any further, [0-9]{2}"), "params": {"seed": 4}}
    plain, guessing = (run(engine, **values) for engine in two_engines)
    assert plain[0] == guessing[0] and guessing[1] < plain[1] / 2
    assert tiny_tokenizer().decode(plain[0]).startswith("First Citizen: Before we proceed any further, ")
