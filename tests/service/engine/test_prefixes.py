"""What prompts have in common is computed once, copied exactly, and forgotten when its memory is needed."""

from __future__ import annotations

from typing import Any

import pytest

from service.engine.engine import Engine
from service.engine.sequence import Sequence
from shared.sampling import SamplingParams
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SYSTEM = [7 + place % 300 for place in range(100)]


def engine_of(**values: Any) -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), **{"num_slots": 4, "max_cached_tokens": 1_024, **values})


def run(engine: Engine, *prompts: list[int], max_new_tokens: int = 5) -> list[list[int]]:
    """Answer prompts that come together."""
    answers: dict[str, list[int]] = {}
    for place, prompt_ids in enumerate(prompts):
        answers[str(place)] = []
        engine.add(
            Sequence(
                id=str(place),
                prompt_ids=prompt_ids,
                params=SamplingParams(temperature=1.0, seed=place),
                max_new_tokens=max_new_tokens,
            )
        )
    while engine.has_work:
        for output in engine.step():
            answers[output.sequence_id] += output.token_ids
    return list(answers.values())


def computed_by(engine: Engine, *prompts: list[int], max_new_tokens: int = 5) -> tuple[int, int]:
    """Prompt tokens computed and copied for some prompts; the answers are those of an engine that shares nothing."""
    statistics = engine.statistics
    before = statistics.num_prefill_tokens + len(prompts), statistics.num_shared_tokens
    answers = run(engine, *prompts, max_new_tokens=max_new_tokens)
    assert answers == run(engine_of(share_prefixes=False), *prompts, max_new_tokens=max_new_tokens)
    statistics = engine.statistics
    drawn_first = 2 * len(prompts)  # each prompt's last token is counted as drawn from, not as prefilled
    return statistics.num_prefill_tokens + drawn_first - before[0], statistics.num_shared_tokens - before[1]


def test_a_shared_system_prompt_is_computed_once() -> None:
    engine = engine_of()
    assert computed_by(engine, [*SYSTEM, 1, 2, 3]) == (103, 0)
    assert computed_by(engine, [*SYSTEM, 4, 5]) == (2, 100), "of one that has ended"
    assert computed_by(engine, [*SYSTEM, 6], [*SYSTEM, 7, 8], [*SYSTEM, 9, 9, 9]) == (6, 300)


def test_choices_that_come_together_compute_their_prompt_once() -> None:
    engine = engine_of(prefill_chunk=32)
    assert computed_by(engine, *[[*SYSTEM, 1, 2]] * 4) == (102 + 3, 3 * 101)


def test_the_next_turn_of_a_conversation_goes_on_where_the_last_one_ended() -> None:
    engine = engine_of()
    [answer] = run(engine, SYSTEM, max_new_tokens=20)
    # The last token drawn was never computed, so the turn begins with it.
    assert computed_by(engine, [*SYSTEM, *answer, 3, 4]) == (3, 119)


def test_a_prompt_met_again_computes_its_last_token_only() -> None:
    engine = engine_of()
    run(engine, SYSTEM)
    assert computed_by(engine, SYSTEM) == (1, 99)


def test_short_beginnings_are_not_looked_after() -> None:
    engine = engine_of()
    run(engine, SYSTEM[:20])
    assert computed_by(engine, [*SYSTEM[:7], 1, 2, 3]) == (10, 0)


def test_a_slot_of_no_use_is_taken_before_a_useful_one() -> None:
    engine = engine_of(num_slots=2)
    run(engine, SYSTEM)
    for place in range(3):  # others come and go in the second slot
        run(engine, [400 + place] * 30)
        assert computed_by(engine, [*SYSTEM, place])[1] == 100


def test_memory_that_is_needed_is_taken_from_the_longest_unused() -> None:
    engine = engine_of(num_slots=4, max_cached_tokens=330)
    run(engine, SYSTEM)
    run(engine, [400] * 100)
    assert engine.cache.num_needed == 210
    run(engine, [401] * 200)  # room for one of the two
    assert engine.cache.num_needed <= 330
    assert computed_by(engine, [*([400] * 100), 5]) == (1, 100)
    assert computed_by(engine, [*SYSTEM, 5]) == (101, 0)


def test_a_cancelled_prompt_leaves_what_it_computed_and_no_more() -> None:
    engine = engine_of(prefill_chunk=30)
    engine.add(Sequence(id="gone", prompt_ids=SYSTEM, params=SamplingParams(), max_new_tokens=5))
    engine.add(Sequence(id="waits", prompt_ids=[*SYSTEM, 1], params=SamplingParams(temperature=0.0), max_new_tokens=5))
    engine.step()
    engine.step()
    engine.cancel("gone")
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert engine.statistics.num_shared_tokens == 60
    expected = engine_of(share_prefixes=False)
    expected.add(Sequence(id="one", prompt_ids=[*SYSTEM, 1], params=SamplingParams(temperature=0.0), max_new_tokens=5))
    fresh = []
    while expected.has_work:
        fresh += expected.step()
    assert [output.token_ids for output in outputs] == [output.token_ids for output in fresh]
