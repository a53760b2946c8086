"""The engine against the oracle: the same tokens alone, in any batch, in any order of arrival, after any resume."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from benchmarks.oracle import Cases, check_against_oracle, compare, random_engine, small_model, small_tokenizer
from service.engine.engine import Engine
from service.engine.sequence import Output, Sequence
from shared.drawing import Bits
from shared.errors import GenerationError, WeightsError
from shared.grammar import regex_grammar
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from tests.tiny import TINY, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def engine_of(model: SmolLM2 | None = None, **values: Any) -> Engine:
    return Engine(model or tiny_model(), tiny_tokenizer(), **{"num_slots": 4, "max_cached_tokens": 1_024, **values})


def sequence(prompt_ids: list[int], name: str = "one", **values: Any) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, **values.pop("params", {})})
    return Sequence(**{"id": name, "prompt_ids": prompt_ids, "params": params, "max_new_tokens": 8, **values})


def run(engine: Engine, *sequences: Sequence) -> list[Output]:
    for each in sequences:
        engine.add(each)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert engine.free_slots == engine.cache.num_slots and engine.free_tokens == engine.cache.max_cached_tokens
    return outputs


def ids_of(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_are_the_oracles(seed: int) -> None:
    """The quick version of `python -m benchmarks.oracle`."""
    draw, model, tokenizer = random.Random(seed), tiny_model(), tiny_tokenizer()
    cases_of = Cases(draw, model, tokenizer, (1, 2, 10, 40))
    cases = [cases_of.case(250) for _ in range(16)]
    for _ in range(3):
        check_against_oracle(draw, random_engine(draw, model, tokenizer), cases)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_a_thousand_long_random_requests_are_the_oracles() -> None:
    compare(small_model(), small_tokenizer(), 1_000, "small model")


def test_a_resume_at_every_index_continues_exactly() -> None:
    values: dict[str, Any] = {
        "params": {"temperature": 1.2, "seed": 5, "repetition_penalty": 1.2},
        "max_new_tokens": 24,
    }
    prompt_ids = tiny_tokenizer().encode("日本語 🙂 First")
    whole = run(engine_of(), sequence(prompt_ids, logprobs=2, **values))
    engine = engine_of()
    for index in range(24):
        resumed = run(engine, sequence(prompt_ids, completion_ids=ids_of(whole)[:index], logprobs=2, **values))
        assert [(it.first_index, it.token_ids, it.text, it.finish_reason) for it in resumed] == [
            (it.first_index, it.token_ids, it.text, it.finish_reason) for it in whole[index:]
        ]


def test_a_completion_that_was_already_whole_only_ends() -> None:
    whole = run(engine_of(), sequence([5, 6, 7]))
    [output] = run(engine_of(), sequence([5, 6, 7], completion_ids=ids_of(whole)))
    assert (output.first_index, output.token_ids, output.text, output.finish_reason) == (8, (), "", "length")


def test_a_sequence_whose_grammar_gives_up_ends_alone_and_the_engine_goes_on() -> None:
    class GivesUp:
        def allowed(self) -> Bits:
            raise GenerationError("the grammar became too complex")

    engine, doomed = engine_of(), sequence([5, 6, 7])
    engine.add(doomed)
    doomed.row.constraint = GivesUp()
    [output] = engine.step()
    assert (output.finish_reason, output.error) == ("error", "the grammar became too complex")
    assert not engine.has_work and len(ids_of(run(engine, sequence([5, 6, 7])))) == 8


def test_an_end_token_first_gives_an_empty_completion() -> None:
    [first, *_] = ids_of(run(engine_of(), sequence([5, 6, 7])))
    [output] = run(engine_of(), sequence([5, 6, 7], end_token_ids=(first,)))
    assert (output.token_ids, output.text, output.finish_reason) == ((), "", "stop")
    assert set(output.timings) == {"prefill_ms", "decode_ms", "cached_tokens"}
    ignoring = run(engine_of(), sequence([5, 6, 7], end_token_ids=(first,), ignore_eos=True))
    assert len(ids_of(ignoring)) == 8 and ignoring[-1].finish_reason == "length"


@pytest.mark.parametrize("max_cached_tokens", [100, 10_000])
def test_a_completion_ends_where_the_context_or_the_cache_does(max_cached_tokens: int) -> None:
    limit = min(TINY.max_position_embeddings, max_cached_tokens)
    for num_prompt_tokens, expected in ((limit - 3, 3), (limit, 0)):
        outputs = run(
            engine_of(max_cached_tokens=max_cached_tokens), sequence([9] * num_prompt_tokens, max_new_tokens=50)
        )
        assert len(ids_of(outputs)) == expected
        assert outputs[-1].finish_reason == "length"


def test_the_smallest_cache_there_is() -> None:
    """One slot of one token, then of two: room for no completion, then for one of one token."""
    [output] = run(engine_of(num_slots=1, max_cached_tokens=1), sequence([9]))
    assert (output.token_ids, output.finish_reason) == ((), "length")
    with pytest.raises(GenerationError, match="context is 1"):
        engine_of(num_slots=1, max_cached_tokens=1).add(sequence([9, 9]))
    outputs = run(engine_of(num_slots=1, max_cached_tokens=2), *(sequence([9], name) for name in "abc"))
    assert [(output.sequence_id, output.finish_reason) for output in outputs] == [(name, "length") for name in "abc"]
    expected = ids_of(run(engine_of(), sequence([9], max_new_tokens=1)))
    assert ids_of(outputs) == expected * 3


def test_min_tokens_passes_over_ends_and_stop_strings() -> None:
    whole = ids_of(run(engine_of(), sequence([5, 6, 7])))
    text = tiny_tokenizer().decode(whole)
    outputs = run(engine_of(), sequence([5, 6, 7], stop=tuple(text), params={"min_tokens": 5}))
    assert 5 <= len(ids_of(outputs)) <= 8
    barred = run(engine_of(), sequence([5, 6, 7], stop_token_ids=(whole[0],), params={"min_tokens": 2}))
    assert whole[0] not in ids_of(barred)[:2]


def test_a_grammar_that_no_token_can_follow_ends_one_sequence_alone() -> None:
    engine = engine_of()
    bad = sequence([5, 6, 7], "bad", grammar=regex_grammar("(a|b){1,9}c"))
    engine.add(bad)
    engine.add(sequence([5, 6, 7], "good"))
    assert bad.rules is not None
    bad.rules.matcher.consume_token(tiny_tokenizer().encode("z")[0])  # what its limits would do, without a long wait
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    ended = {output.sequence_id: output for output in outputs if output.finish_reason}
    assert ended["bad"].finish_reason == "error" and "grammar" in str(ended["bad"].error)
    assert ended["good"].finish_reason == "length"
    assert engine.cache.free_slots == engine.cache.num_slots


def test_what_does_not_fit_waits() -> None:
    engine = engine_of(num_slots=2, max_cached_tokens=64)
    names = [str(name) for name in range(5)]
    outputs = run(engine, *(sequence([3, 4], name, max_new_tokens=30) for name in names))
    assert [output.sequence_id for output in outputs if output.finish_reason] == names
    assert len(ids_of(outputs)) == 5 * 30


def test_a_cancelled_sequence_frees_its_slot_and_is_not_heard_of_again() -> None:
    engine = engine_of(num_slots=2)
    for name in "abc":
        engine.add(sequence([3, 4], name, max_new_tokens=20))
    assert engine.free_slots == 0 and len(engine.step()) == 2
    for name in "acx":  # running, waiting, unknown
        engine.cancel(name)
    assert engine.free_slots == 1
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert {output.sequence_id for output in outputs} == {"b"}
    assert ids_of(outputs) == ids_of(run(engine_of(), sequence([3, 4], max_new_tokens=20)))[1:]


def test_streams_go_on_while_a_long_prompt_comes_in() -> None:
    engine = engine_of(busy_prefill_chunk=16)
    engine.add(sequence([3, 4], "stream", max_new_tokens=200))
    engine.step()
    before = engine.statistics
    engine.add(sequence([7] * 160, "long", max_new_tokens=1))
    for step in range(1, 11):
        names = [output.sequence_id for output in engine.step()]
        assert names == ["stream"] if step < 10 else sorted(names) == ["long", "stream"]
    statistics = engine.statistics
    assert (statistics.num_running, statistics.num_prefill_tokens, statistics.num_drawn_tokens) == (1, 160, 12)
    assert statistics.cached_bytes == statistics.cached_tokens * engine.cache.bytes_per_token > 0
    assert (before.num_running, before.num_prefill_tokens, before.num_drawn_tokens) == (1, 1, 1), "of its moment"


def test_logprobs_are_the_models_own() -> None:
    [output] = run(engine_of(), sequence([5, 6, 7], max_new_tokens=1, logprobs=3))
    assert output.logprobs is not None
    [entry] = output.logprobs
    scores_V = tiny_model()(torch.tensor([[5, 6, 7]]))[0, -1].detach().log_softmax(-1)
    assert entry["token_id"] == output.token_ids[0] == int(scores_V.argmax())
    assert entry["logprob"] == pytest.approx(float(scores_V.max()), abs=1e-5)
    assert [token_id for token_id, _ in entry["top"]] == scores_V.topk(3).indices.tolist()


@pytest.mark.parametrize("prompt_ids", [[], [5] * 257, [TINY.vocab_size], [-1]])
def test_a_prompt_that_cannot_be_served_is_refused_by_name(prompt_ids: list[int]) -> None:
    engine = engine_of()
    with pytest.raises(GenerationError, match="the prompt"):
        engine.add(sequence(prompt_ids))
    assert not engine.has_work


def test_damaged_weights_are_an_error_not_a_token() -> None:
    model = tiny_model()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(WeightsError, match="damaged"):
        run(engine_of(model), sequence([5], params={"temperature": 1.0}))


def test_a_sequence_that_copies_all_but_its_last_token_may_guess_at_once() -> None:
    prompt_ids = [7, 8, 9] * 20
    expected = ids_of(run(engine_of(), sequence(prompt_ids)))
    engine = engine_of(prefill_chunk=32)
    first, second = sequence(prompt_ids, "first", max_new_tokens=1), sequence(prompt_ids, "second")
    outputs = run(engine, first, second)  # when the first has ended, nobody decodes and the second has one token to go
    assert engine.statistics.num_shared_tokens == len(prompt_ids) - 1
    assert ids_of([output for output in outputs if output.sequence_id == "second"]) == expected
