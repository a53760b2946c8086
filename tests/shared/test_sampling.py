"""Sampling means what transformers' processors mean, and a row's draw depends on its seed and index alone."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from shared.drawing import Bits, draw, quantile, survivors
from shared.errors import GenerationError, WeightsError
from shared.sampling import SamplingParams, SamplingRow, sample
from shared.uniform import uniform

V = 40

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5),
    SamplingParams(top_k=1),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.95, temperature=0.7),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=10, top_p=0.7, min_p=0.2, temperature=1.3),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(repetition_penalty=0.7, top_k=7),
]


def scores(seed: int, rows: int = 1, size: int = V) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 2.5


def transformers_distribution(logits_V: Tensor, params: SamplingParams, ids: list[int]) -> NDArray[np.float64]:
    """The exact distribution by transformers' own processors, in their order, in fp64."""
    import transformers.generation.logits_process as processors

    chain: list[Any] = [processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    chain.append(processors.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(processors.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(processors.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(processors.MinPLogitsWarper(params.min_p))
    logits_1V = logits_V.double().unsqueeze(0)
    for processor in chain:
        logits_1V = processor(torch.tensor([ids]), logits_1V)
    distribution: NDArray[np.float64] = logits_1V.softmax(-1)[0].numpy()
    return distribution


@pytest.mark.parametrize("params", PARAMS)
def test_draws_follow_transformers_distribution(params: SamplingParams) -> None:
    logits_V, prompt, count = scores(3)[0], [1, 5, 5, 9], 4_000
    expected = transformers_distribution(logits_V, params, prompt)
    rows = [SamplingRow(SamplingParams(**{**as_dict(params), "seed": seed}), prompt, []) for seed in range(count)]
    drawn = np.bincount([token.token_id for token in sample(logits_V.expand(count, V), rows)], minlength=V)
    check_chi_squared(drawn, expected)


def check_chi_squared(drawn: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    """The draws, counted by token, could well come from the distribution; nothing of probability 0 was drawn."""
    count = drawn.sum()
    assert not drawn[expected == 0].any(), "a token was drawn that the filters remove"
    # Chi-squared over the tokens that are expected often enough, the rest as one; 99.99 % quantile by Wilson-Hilferty.
    often = expected * count >= 5
    observed = np.append(drawn[often], drawn[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * count
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom:
        statistic = float(((observed - wanted) ** 2 / wanted).sum())
        limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
        assert statistic < limit


def as_dict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_the_same_tokens_survive_as_in_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_BV = scores(seed)
    expected = transformers_distribution(logits_BV[0], params, [0])
    weights_V = torch.exp((logits_BV[0] - logits_BV.max()) / temperature).numpy()
    probabilities_V = weights_V / weights_V.sum()
    kept = survivors(weights_V, params)
    ours = set(range(V)) if kept is None else set(kept.tolist())
    theirs = set(np.flatnonzero(expected).tolist())
    # A token within rounding of a border may fall on either side; nothing else may differ.
    assert sum(float(probabilities_V[token_id]) for token_id in ours ^ theirs) < 0.02
    for token_id in ours ^ theirs:
        mass = probabilities_V[np.argsort(-probabilities_V)].cumsum()
        borders = [min_p * probabilities_V.max() - probabilities_V[token_id], *(mass - top_p)]
        whole = sum(sorted(probabilities_V, reverse=True)[: top_k or V])
        borders += list(mass / whole - top_p)
        assert probabilities_V[token_id] < 1e-6 or min(abs(border) for border in borders) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1_000])
def test_quantiles_are_those_of_the_running_sum(size: int) -> None:
    weights = np.random.default_rng(size).random(size, dtype=np.float32)
    weights[: size // 3] = 0.0
    running = np.cumsum(weights, dtype=np.float64)
    for u in (0.0, 1e-9, 0.25, 0.5, 0.999, 1.0 - 2.0**-53):
        place = quantile(weights, u)
        assert weights[place] > 0.0, "a token without weight is never drawn"
        assert running[place] >= u * running[-1] * (1 - 1e-12)
        assert place == 0 or running[place - 1] <= u * running[-1] * (1 + 1e-12)


def test_greedy_is_the_likeliest_whatever_the_filters() -> None:
    logits_BV = scores(1, rows=3)
    rows = [SamplingRow(SamplingParams(temperature=0.0, top_k=3, top_p=0.1, seed=seed)) for seed in range(3)]
    assert [token.token_id for token in sample(logits_BV, rows)] == logits_BV.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-320, 1e-9, 1e-4])
def test_tiny_temperatures_do_not_overflow(temperature: float) -> None:
    logits_BV = scores(1)
    (token,) = sample(logits_BV, [SamplingRow(SamplingParams(temperature=temperature))])
    assert token.token_id == int(logits_BV.argmax())


def test_penalties_by_hand() -> None:
    logits_BV = torch.tensor([[2.0, -1.0, 3.0, 2.9, 0.0]])

    def greedy(prompt: list[int], completion: list[int], **penalties: float) -> int:
        params = SamplingParams(temperature=0.0, **penalties)  # type: ignore[arg-type]
        return sample(logits_BV, [SamplingRow(params, prompt, completion)])[0].token_id

    assert greedy([], []) == 2
    assert greedy([2], [], repetition_penalty=1.1) == 3, "the prompt counts for repetition"
    assert greedy([], [2], repetition_penalty=1.1) == 3
    assert greedy([2, 3], [], repetition_penalty=100.0) == 0
    assert greedy([2], [], presence_penalty=2.0, frequency_penalty=2.0) == 2, "the prompt does not count for these"
    assert greedy([], [2], presence_penalty=0.2) == 3
    assert greedy([], [2, 3, 3], frequency_penalty=0.2) == 2
    assert greedy([], [2, 2, 3], frequency_penalty=0.2) == 3
    assert greedy([], [0], presence_penalty=-2.0) == 0, "a negative penalty is a reward"
    assert logits_BV.tolist() == [[2.0, -1.0, 3.0, pytest.approx(2.9), 0.0]], "the scores given are not changed"


def test_bias_is_added_before_penalties_and_travels_as_json() -> None:
    logits_BV = torch.tensor([[2.0, 1.0, 3.0]])

    def greedy(completion: list[int], **values: Any) -> int:
        params = SamplingParams(**{"temperature": 0.0, **json.loads(json.dumps(values))})
        return sample(logits_BV, [SamplingRow(params, [], completion)])[0].token_id

    assert greedy([], logit_bias={0: 1.5}) == 0
    assert greedy([], logit_bias={2: -100}) == 0
    assert greedy([], logit_bias={0: 0.9}) == 2
    assert greedy([2], logit_bias={2: 3}, repetition_penalty=3.1) == 0, "6 / 3.1 < 2, as vLLM orders them"
    with pytest.raises(GenerationError, match="logit_bias of token 3 is 101"):
        SamplingParams(logit_bias={3: 101.0})
    with pytest.raises(GenerationError, match="a token id of logit_bias is 40"):
        SamplingParams(logit_bias={V: 1.0}).check_ids(V)


def test_biased_draws_follow_the_biased_distribution() -> None:
    logits_V, count, bias = scores(4)[0], 4_000, {3: 2.0, 7: -100.0, 9: 5.0}
    biased_V = logits_V.clone()
    for token_id, value in bias.items():
        biased_V[token_id] += value
    expected = transformers_distribution(biased_V, SamplingParams(temperature=0.8, top_p=0.9), [0])
    rows = [
        SamplingRow(SamplingParams(temperature=0.8, top_p=0.9, logit_bias=bias, seed=seed)) for seed in range(count)
    ]
    drawn = np.bincount([token.token_id for token in sample(logits_V.expand(count, V), rows)], minlength=V)
    check_chi_squared(drawn, expected)


def test_a_weight_in_another_last_bit_moves_no_other_token() -> None:
    """What filters keep is walked by id, but the lightest last."""
    weights_V = np.geomspace(1.0, 0.2, 300).astype(np.float32)[np.random.default_rng(3).permutation(300)]

    def kept() -> list[int]:
        ids = survivors(weights_V, SamplingParams(top_p=0.9))
        assert ids is not None
        return [int(token_id) for token_id in ids]

    before = kept()
    assert before[:-1] == sorted(before[:-1]) and weights_V[before].min() == weights_V[before[-1]]
    for place in np.flatnonzero(weights_V < 1.0):
        exact = weights_V[place]
        for direction in (0.0, 2.0):
            weights_V[place] = np.nextafter(exact, np.float32(direction))
            assert kept() == before
        weights_V[place] = exact


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 5, "min_p": 0.01}])
def test_which_of_two_equals_comes_last_changes_the_draw_of_these_two_alone(filters: dict[str, Any]) -> None:
    weights_V = np.array([0.3, 0.2, 1.0, 0.2, 0.5, 0.4, 0.1], dtype=np.float32)
    quantiles = np.linspace(0.0, 0.999, 500)
    drawn = []
    for heavier in (1, 3):
        changed_V = weights_V.copy()
        changed_V[heavier] = np.nextafter(weights_V[heavier], np.float32(1))
        drawn.append([draw(changed_V, SamplingParams(**filters), u) for u in quantiles])
    differing = {pair for pair in zip(*drawn, strict=True) if pair[0] != pair[1]}
    assert differing <= {(1, 3)}


def test_end_tokens_are_barred_until_min_tokens() -> None:
    logits_BV = torch.tensor([[2.0, 1.0, 3.0]])
    for params in (
        SamplingParams(temperature=0.0, min_tokens=2),
        SamplingParams(min_tokens=2, seed=3, logit_bias={2: 50}),
    ):
        drawn = [
            sample(logits_BV, [SamplingRow(params, [], [1] * index, end_token_ids=(2,))])[0].token_id
            for index in range(4)
        ]
        assert 2 not in drawn[:2] and drawn[2:] == [2, 2]


def test_a_constraint_bars_what_it_does_not_allow() -> None:
    class Odd:
        def allowed(self) -> Bits:
            return np.packbits(np.resize([False, True], 20), bitorder="little")

    logits_V, count = scores(5)[0], 3_000
    expected = logits_V.double().softmax(-1).numpy()
    expected[::2] = expected[20:] = 0.0
    rows = [SamplingRow(SamplingParams(seed=seed), constraint=Odd()) for seed in range(count)]
    drawn = np.bincount([token.token_id for token in sample(logits_V.expand(count, V), rows)], minlength=V)
    check_chi_squared(drawn, expected / expected.sum())
    greedy = SamplingRow(SamplingParams(temperature=0.0), constraint=Odd())
    assert sample(logits_V.unsqueeze(0), [greedy])[0].token_id == int(expected.argmax())


def test_a_row_gives_the_same_token_in_any_batch() -> None:
    draw = random.Random(0)
    size = 3_000
    logits_BV = scores(7, rows=12, size=size)
    rows = [
        SamplingRow(
            SamplingParams(**{**as_dict(draw.choice(PARAMS)), "seed": draw.randrange(2**64)}),
            [draw.randrange(size) for _ in range(5)],
            [draw.randrange(size) for _ in range(draw.randrange(6))],
        )
        for _ in range(12)
    ]
    rows[3].params = SamplingParams(temperature=0.0)
    counts = [draw.choice((None, 0, 3)) for _ in rows]
    together = sample(logits_BV, rows, logprobs=counts)
    for _ in range(10):
        places = draw.sample(range(12), draw.randint(1, 12))
        some = sample(
            logits_BV[places], [rows[place] for place in places], logprobs=[counts[place] for place in places]
        )
        assert some == [together[place] for place in places]


def test_seed_and_index_decide_the_draw() -> None:
    assert uniform(0, 0) == 0.011546754286331562  # known for ever: another value would change every seeded answer
    assert uniform(2**64 - 1, 10**6) == 0.4614255439484173
    values = [uniform(seed, index) for seed in range(60) for index in range(60)]
    assert len(set(values)) == len(values)
    assert all(0.0 <= value < 1.0 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    logits_BV = torch.zeros(1, V)
    tokens = {
        sample(logits_BV, [SamplingRow(SamplingParams(seed=5), [], [0] * index)])[0].token_id for index in range(30)
    }
    assert len(tokens) > 10


def test_logprobs_are_the_models_own() -> None:
    logits_BV = scores(2, rows=3)
    rows = [SamplingRow(SamplingParams(temperature=0.1, top_k=2, presence_penalty=1.0), [], [1])] * 3
    expected_BV = logits_BV.log_softmax(-1)
    none, chosen, top = sample(logits_BV, rows, logprobs=[None, 0, 4])
    assert none.logprob is None
    assert none.top_logprobs == chosen.top_logprobs == ()
    assert chosen.logprob == pytest.approx(float(expected_BV[1, chosen.token_id]))
    assert [token_id for token_id, _ in top.top_logprobs] == expected_BV[2].topk(4).indices.tolist()
    assert [value for _, value in top.top_logprobs] == pytest.approx(expected_BV[2].topk(4).values.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_16_bits_are_taken(dtype: torch.dtype) -> None:
    rows = [SamplingRow(SamplingParams(seed=seed, repetition_penalty=1.2), [1], [2]) for seed in range(4)]
    tokens = sample(scores(0, rows=4).to(dtype), rows, logprobs=[1] * 4)
    assert all(0 <= token.token_id < V and token.logprob is not None for token in tokens)


def test_an_empty_batch_gives_nothing() -> None:
    assert sample(torch.empty(0, V), []) == []
    assert sample(scores(1, rows=2), [], places=[]) == [], "scores of which none are wanted"


def test_scores_that_are_not_numbers_say_so() -> None:
    for params in (SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, min_tokens=1)):
        with pytest.raises(WeightsError, match="not numbers"):
            sample(torch.full((1, V), math.nan), [SamplingRow(params)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("min_tokens", -1),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_wrong_parameter_is_named(name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=f"^{name} is {value}; it must be"):
        SamplingParams(**{name: value})
