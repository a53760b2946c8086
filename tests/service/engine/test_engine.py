"""The engine against the oracle: the same tokens alone, in any batch, in any order of arrival, after any resume."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from service.engine.engine import Engine
from service.engine.sequence import Output, Sequence
from shared.errors import GenerationError, WeightsError
from shared.generate import generate
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from tests.tiny import TINY, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread and lose much where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine_of(model: SmolLM2 | None = None, **values: int) -> Engine:
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


@dataclass
class Case:
    """A request and what the oracle answers it."""

    values: dict[str, Any]
    token_ids: list[int]
    pieces: list[str]
    """Text released with each token; one more entry where the end brought text without a token."""
    ended: tuple[str, str | None]

    def from_index(self, index: int, name: str) -> Sequence:
        return Sequence(id=name, completion_ids=self.token_ids[:index], **self.values)


def random_case(draw: random.Random, model: SmolLM2, *, longest_prompt: int) -> Case:
    prompt_ids = [draw.randrange(TINY.vocab_size) for _ in range(draw.choice([1, 2, 7, 30, longest_prompt]))]
    params = SamplingParams(
        temperature=draw.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=draw.choice([0, 5]),
        top_p=draw.choice([1.0, 0.9]),
        min_p=draw.choice([0.0, 0.02]),
        repetition_penalty=draw.choice([1.0, 1.3]),
        presence_penalty=draw.choice([0.0, 0.5]),
        frequency_penalty=draw.choice([0.0, -0.3]),
        seed=draw.randrange(2**64),
    )
    max_new_tokens = draw.choice([1, 2, 10, 40])
    end_token_ids = tuple(draw.sample(range(TINY.vocab_size), draw.choice([0, 15])))
    token_ids = list(generate(model, prompt_ids, params, max_new_tokens=max_new_tokens, end_token_ids=end_token_ids))
    room = min(max_new_tokens, model.config.max_position_embeddings - len(prompt_ids))
    stop: tuple[str, ...] = ()
    text = tiny_tokenizer().decode(token_ids)
    if len(text) > 2 and draw.random() < 0.5:
        start = draw.randrange(len(text) - 1)
        stop = (text[start : start + draw.randint(1, 4)], "never seen")
    values = {
        "prompt_ids": prompt_ids,
        "params": params,
        "max_new_tokens": max_new_tokens,
        "end_token_ids": end_token_ids,
        "stop": stop,
    }
    return Case(values, *expected_end(token_ids, stop, room))


def expected_end(
    token_ids: list[int], stop: tuple[str, ...], room: int
) -> tuple[list[int], list[str], tuple[str, str | None]]:
    """Cut the oracle's tokens at the first stop string, looking at the text of every prefix."""
    decoder = tiny_tokenizer().stream_decoder()
    seen = ""
    pieces: list[str] = []
    for count, token_id in enumerate(token_ids, start=1):
        seen += decoder.push(token_id)
        if count == room:
            seen += decoder.flush()
        found = [(seen.index(string) + len(string), -len(string), string) for string in stop if string in seen]
        if found:
            end, negative_length, string = min(found)
            shown = len("".join(pieces))
            return token_ids[:count], [*pieces, seen[shown : end + negative_length]], ("stop", string)
        held = max((n for string in stop for n in range(len(string)) if seen.endswith(string[:n])), default=0)
        certain = len(seen) if count == room else len(seen) - held
        pieces.append(seen[len("".join(pieces)) : certain])
    if len(token_ids) == room:
        return token_ids, pieces, ("length", None)
    whole = seen + decoder.flush()
    return token_ids, [*pieces, whole[len("".join(pieces)) :]], ("stop", None)


def check_against_oracle(draw: random.Random, engine: Engine, cases: list[Case]) -> None:
    """Add the cases in any order at any time, each from any index on; every output must be the oracle's."""
    todo = []
    for place, case in enumerate(cases):
        ends_with_a_token = case.ended[0] == "length" or case.ended[1] is not None
        last_index = max(0, len(case.token_ids) - ends_with_a_token)
        todo.append((case, draw.choice([0, draw.randint(0, last_index)]), str(place)))
    draw.shuffle(todo)
    by_name = {name: (case, index) for case, index, name in todo}
    outputs: dict[str, list[Output]] = defaultdict(list)
    while todo or engine.has_work:
        while todo and (not engine.has_work or draw.random() < 0.3):
            case, index, name = todo.pop()
            engine.add(case.from_index(index, name))
        for output in engine.step():
            outputs[output.sequence_id].append(output)
    for name, (case, index) in by_name.items():
        assert ids_of(outputs[name]) == case.token_ids[index:]
        assert [output.text for output in outputs[name]] == case.pieces[index:]
        ends = [(output.finish_reason, output.stop_sequence) for output in outputs[name]]
        assert ends == [(None, None)] * (len(ends) - 1) + [case.ended]
        places = [output.first_index for output in outputs[name]]
        assert places == list(range(index, index + len(places)))
    assert not engine.cache.reserved


def random_engine(draw: random.Random, model: SmolLM2) -> Engine:
    return engine_of(
        model,
        num_slots=draw.choice([1, 2, 5, 9]),
        max_cached_tokens=model.config.max_position_embeddings + draw.choice([0, 100, 1_000]),
        prefill_chunk=draw.choice([1, 7, 64, 512]),
        busy_prefill_chunk=draw.choice([1, 5, 64]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_are_the_oracles(seed: int) -> None:
    draw, model = random.Random(seed), tiny_model()
    cases = [random_case(draw, model, longest_prompt=250) for _ in range(16)]
    for _ in range(3):
        check_against_oracle(draw, random_engine(draw, model), cases)


@pytest.mark.slow
def test_a_thousand_long_random_requests_are_the_oracles() -> None:
    draw = random.Random(99)
    model = SmolLM2(dataclasses.replace(TINY, max_position_embeddings=1_600))
    model.initialize(5)
    model.eval()
    for _ in range(50):
        cases = [random_case(draw, model, longest_prompt=draw.randint(31, 1_500)) for _ in range(20)]
        check_against_oracle(draw, random_engine(draw, model), cases)


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


def test_an_end_token_first_gives_an_empty_completion() -> None:
    [first, *_] = ids_of(run(engine_of(), sequence([5, 6, 7])))
    [output] = run(engine_of(), sequence([5, 6, 7], end_token_ids=(first,)))
    assert (output.token_ids, output.text, output.finish_reason) == ((), "", "stop")
    assert set(output.timings) == {"prefill_ms", "decode_ms"}
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
    engine.add(sequence([7] * 160, "long", max_new_tokens=1))
    for step in range(1, 11):
        names = [output.sequence_id for output in engine.step()]
        assert names == ["stream"] if step < 10 else sorted(names) == ["long", "stream"]
    statistics = engine.statistics
    assert (statistics.num_running, statistics.num_prefill_tokens, statistics.num_drawn_tokens) == (1, 160, 12)
    assert statistics.cached_bytes == statistics.cached_tokens * engine.cache.bytes_per_token > 0


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
