"""A prompt's own log-probabilities are transformers', whatever its chunks and its neighbours, and come once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from service.engine.engine import Engine
from service.engine.kv_cache import KVCache, Span
from service.engine.network import TorchNetwork
from service.engine.networks import load_network
from service.engine.sequence import Output
from service.engine.sequence import Sequence as Job
from shared.catalog import read_model_folder
from shared.checkpoint import load_export
from shared.errors import WeightsError
from shared.sampling import SamplingParams
from shared.scores import PromptScores
from tests.tiny import TINY, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' Llama with the tiny weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**TINY.to_hf())).eval()  # type: ignore[no-untyped-call]
    model.load_state_dict(tiny_model().state_dict())
    return model


class Recorder(TorchNetwork):
    """The network, and how many rows of scores each step asked it for."""

    rows: list[int]

    def scores(self, cache: KVCache, token_ids: Sequence[int], spans: Sequence[Span], places: Sequence[int]) -> Tensor:
        self.rows = [*getattr(self, "rows", []), len(places)]
        return super().scores(cache, token_ids, spans, places)


def engine_of(**values: Any) -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), **{"num_slots": 4, "max_cached_tokens": 1_024, **values})


def job(prompt_ids: Sequence[int], name: str = "one", **values: Any) -> Job:
    values = {"max_new_tokens": 1, "logprobs": 2, "scores_prompt": True, **values}
    return Job(id=name, prompt_ids=prompt_ids, params=SamplingParams(temperature=0.0), **values)


def run(engine: Engine, *jobs: Job) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {each.id: [] for each in jobs}
    for each in jobs:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            outputs[output.sequence_id].append(output)
    assert not engine.cache.reserved
    return outputs


def scores_of(outputs: list[Output]) -> PromptScores:
    """Those of a job's first output; no other may have any."""
    assert all(output.prompt_scores is None for output in outputs[1:])
    assert outputs[0].prompt_scores is not None
    return outputs[0].prompt_scores


def exact_scores(theirs: Any, prompt_ids: Sequence[int]) -> Tensor:
    """(T, V): log-probabilities of what follows each token but the last."""
    with torch.inference_mode():
        return theirs(torch.tensor([prompt_ids])).logits[0, :-1].float().log_softmax(-1)  # type: ignore[no-any-return]


def check(scores: PromptScores, exact_TV: Tensor, prompt_ids: Sequence[int], num_top: int, limit: float) -> None:
    following = torch.tensor(prompt_ids[1:], dtype=torch.long).unsqueeze(1)
    assert scores.top_ids_TK.shape == scores.top_logprobs_TK.shape == (len(prompt_ids) - 1, num_top)
    np.testing.assert_allclose(scores.logprobs_T, exact_TV.gather(1, following).squeeze(1), atol=limit, rtol=0)
    np.testing.assert_allclose(scores.top_logprobs_TK, exact_TV.topk(num_top).values, atol=limit, rtol=0)
    told = exact_TV.gather(1, torch.from_numpy(scores.top_ids_TK.astype(np.int64)))
    np.testing.assert_allclose(scores.top_logprobs_TK, told, atol=limit, rtol=0)
    chosen = scores.top_ids_TK == np.array(prompt_ids[1:]).reshape(-1, 1)
    same = np.broadcast_to(scores.logprobs_T.reshape(-1, 1), chosen.shape)
    assert (scores.top_logprobs_TK[chosen] == same[chosen]).all(), "one token, two numbers"


@pytest.mark.parametrize("seed", range(4))
def test_prompts_in_pieces_beside_others_are_scored_as_transformers_does(seed: int, theirs: Any) -> None:
    draw = random.Random(seed)
    beginning = [draw.randrange(512) for _ in range(60)]
    jobs = []
    for number in range(12):
        rest = [draw.randrange(512) for _ in range(draw.choice([1, 2, 9, 120]))]
        prompt_ids = (beginning + rest) if draw.random() < 0.5 else rest  # some begin alike, and must be computed anew
        values = {"logprobs": draw.choice([0, 1, 5]), "max_new_tokens": draw.choice([0, 1, 20])}
        scores_prompt = draw.random() < 0.6 or not values["max_new_tokens"]
        jobs.append(job(prompt_ids, str(number), scores_prompt=scores_prompt, **values))
    chunk = draw.choice([1, 7, 64, 300])
    engine = engine_of(prefill_chunk=chunk, busy_prefill_chunk=draw.choice([None, 5, 64]))
    outputs = run(engine, *jobs)
    for each in jobs:
        told = outputs[each.id]
        if each.scores_prompt:
            assert each.logprobs is not None
            exact_TV = exact_scores(theirs, each.prompt_ids)
            check(scores_of(told), exact_TV, each.prompt_ids, each.logprobs, 1e-4)
        else:
            assert all(output.prompt_scores is None for output in told)
        assert sum(len(output.token_ids) for output in told) == each.max_new_tokens
        assert told[-1].finish_reason == "length" and set(told[-1].timings) >= {"prefill_ms", "cached_tokens"}
        plain = job(each.prompt_ids, scores_prompt=False, max_new_tokens=max(1, each.max_new_tokens))
        [expected] = run(engine_of(), plain).values()
        drawn = [token_id for output in told for token_id in output.token_ids]
        assert drawn == [token_id for output in expected for token_id in output.token_ids][: each.max_new_tokens]


def test_scores_are_reduced_chunk_by_chunk_and_only_for_those_who_ask() -> None:
    model = tiny_model()
    network = Recorder(model)
    prompt_ids = [number % 512 for number in range(200)]
    engine = Engine(
        model,
        tiny_tokenizer(),
        num_slots=4,
        max_cached_tokens=1_024,
        prefill_chunk=32,
        network=network,
        speculate=False,
    )
    run(engine, job(prompt_ids, logprobs=None, scores_prompt=False))
    assert set(network.rows) == {0, 1}
    network.rows = []
    run(engine, job(prompt_ids, logprobs=3))
    assert max(network.rows) <= 32 and sum(network.rows) == 200, "each token's row once, never more than a chunk's"
    assert engine.statistics.num_shared_tokens == 0, "what stood in the cache has no scores"
    run(engine, job(prompt_ids, scores_prompt=False))
    assert engine.statistics.num_shared_tokens == 199, "but what was computed for scores is of use to others"


def test_a_resumed_job_repeats_no_scores_and_loses_none() -> None:
    prompt_ids = [number * 7 % 512 for number in range(90)]
    [whole] = run(engine_of(), job(prompt_ids, max_new_tokens=12)).values()
    scores = scores_of(whole)
    [again] = run(engine_of(prefill_chunk=11), job(prompt_ids, max_new_tokens=12)).values()  # it died before any output
    np.testing.assert_allclose(scores_of(again).logprobs_T, scores.logprobs_T, atol=1e-5)
    drawn = [token_id for output in whole for token_id in output.token_ids]
    for index in range(1, 12):  # it died later: they were delivered with its first token
        [rest] = run(engine_of(), job(prompt_ids, max_new_tokens=12, completion_ids=drawn[:index])).values()
        assert all(output.prompt_scores is None for output in rest)
        assert [output.token_ids for output in rest] == [output.token_ids for output in whole[index:]]


def test_the_end_token_is_scored_too() -> None:
    """Who asks for one token behind a prompt cuts off one entry: it must be there."""
    prompt_ids = [5, 6, 7]
    [[first]] = run(engine_of(), job(prompt_ids)).values()
    assert first.logprobs is not None
    [[ended]] = run(engine_of(), job(prompt_ids, end_token_ids=first.token_ids)).values()
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((), "", "stop")
    assert ended.logprobs == first.logprobs
    [[plain]] = run(engine_of(), job(prompt_ids, end_token_ids=first.token_ids, scores_prompt=False)).values()
    assert plain.logprobs is None


def test_a_prompt_as_long_as_the_context_is_scored_whole(theirs: Any) -> None:
    prompt_ids = [number * 3 % 512 for number in range(TINY.max_position_embeddings)]
    [[output]] = run(engine_of(), job(prompt_ids, max_new_tokens=0)).values()
    check(scores_of([output]), exact_scores(theirs, prompt_ids), prompt_ids, 2, 1e-4)
    assert (output.token_ids, output.finish_reason) == ((), "length")


def test_a_prompt_of_one_token_has_no_scores() -> None:
    for max_new_tokens in (0, 1):
        [[output]] = run(engine_of(), job([9], max_new_tokens=max_new_tokens)).values()
        scores = scores_of([output])
        assert len(scores.logprobs_T) == 0 and scores.top_ids_TK.shape == (0, 2)
        assert PromptScores.from_text(scores.to_text()).entries([9]) == [{"token_id": 9, "logprob": None, "top": []}]


def test_a_cancelled_job_leaves_nothing(theirs: Any) -> None:
    engine = engine_of(prefill_chunk=8)
    prompt_ids = [number % 512 for number in range(100)]
    engine.add(job(prompt_ids, "gone", max_new_tokens=0))
    engine.step()
    engine.cancel("gone")
    [[output]] = run(engine, job(prompt_ids)).values()
    check(scores_of([output]), exact_scores(theirs, prompt_ids), prompt_ids, 2, 1e-4)


def test_damaged_weights_are_an_error_not_a_score() -> None:
    model = tiny_model()
    model.model.norm.weight.data.fill_(torch.nan)
    engine = Engine(model, tiny_tokenizer(), num_slots=4, max_cached_tokens=1_024)
    with pytest.raises(WeightsError, match="damaged"):
        run(engine, job([5, 6, 7], max_new_tokens=0))


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_the_text_holds_every_bit(num_top: int) -> None:
    draw = np.random.default_rng(num_top)
    logprobs = -draw.exponential(size=50).astype(np.float32)
    logprobs[3] = -np.inf
    ids = draw.integers(0, 2**32, (50, num_top), dtype=np.uint32)
    scores = PromptScores(logprobs, ids, -draw.exponential(size=(50, num_top)).astype(np.float32))
    text = scores.to_text()
    assert len(text) <= 6 + 50 * (4 + 8 * num_top) * 4 / 3
    read = PromptScores.from_text(text)
    for name in ("logprobs_T", "top_ids_TK", "top_logprobs_TK"):
        assert np.array_equal(getattr(read, name), getattr(scores, name))
    halves = [
        PromptScores(logprobs[part], ids[part], scores.top_logprobs_TK[part]) for part in (slice(20), slice(20, 50))
    ]
    assert PromptScores.join(halves, num_top).to_text() == text
    entry = read.entries(range(51))[4]
    assert entry["logprob"] == -np.inf and len(entry["top"]) == num_top


@pytest.mark.weights
def test_the_real_weights_are_scored_as_transformers_does(instruct_folder: Path) -> None:
    """In fp32 to 1e-4; by the 16-bit kernels within what their rounding makes of the scores: 0.02 in the mean, up
    to 0.5 for the one token in a thousand where it shows most."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    exact_model, tokenizer = load_export(instruct_folder, device=CPU, dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(instruct_folder, dtype=torch.float32)
    theirs.eval()
    served, network = load_network(read_model_folder(instruct_folder), device=CPU, dtype=torch.bfloat16)
    text = (Path(__file__).parents[3] / "LICENSE").read_text()
    prompts = [tokenizer.encode(text)[start : start + 300] for start in (0, 900)] + [tokenizer.encode("Tokyo is the")]
    engines = [
        (Engine(exact_model, tokenizer, num_slots=4, max_cached_tokens=4_000, prefill_chunk=100), 1e-4, 1e-4),
        (Engine(served, tokenizer, num_slots=4, max_cached_tokens=4_000, network=network.value), 0.03, 0.5),
    ]
    for engine, mean_limit, limit in engines:
        jobs = [job(ids, str(place), logprobs=3) for place, ids in enumerate(prompts)]
        outputs = run(engine, *jobs, job(prompts[0][:50], "stream", scores_prompt=False, max_new_tokens=30))
        for each in jobs:
            scores, exact_TV = scores_of(outputs[each.id]), exact_scores(theirs, each.prompt_ids)
            if limit < 0.01:
                check(scores, exact_TV, each.prompt_ids, 3, limit)
            exact = exact_TV.gather(1, torch.tensor(each.prompt_ids[1:]).unsqueeze(1)).squeeze(1).numpy()
            differences = np.abs(scores.logprobs_T - exact)
            assert differences.mean() < mean_limit
            assert differences.max() < limit
            assert abs(float((scores.logprobs_T - exact).mean())) < limit / 10
