"""Draws where the scores stand, as on a GPU, are those of the CPU, for every parameter and any mixture of rows."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from shared.device_drawing import choose_on_device, draw
from shared.drawing import Bits, draw_all
from shared.errors import WeightsError
from shared.sampling import SamplingParams, SamplingRow, choose_on_cpu

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    {"repetition_penalty": 1.5, "top_p": 0.95},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"logit_bias": {3: 4.0, 4: -100.0}},
    {"min_tokens": 30},
]


class Some:
    """Allows every third id."""

    def allowed(self) -> Bits:
        return np.packbits(np.arange(1_000) % 3 == 1, bitorder="little")


def rows_of(chance: random.Random, count: int, size: int) -> list[SamplingRow]:
    rows = []
    for _ in range(count):
        params = SamplingParams(seed=chance.getrandbits(40), **chance.choice(PARAMS))
        prompt, completion = ([chance.randrange(size) for _ in range(chance.randrange(20))] for _ in range(2))
        constraint = Some() if chance.random() < 0.3 else None
        rows.append(SamplingRow(params, prompt, completion, end_token_ids=(1, 4), constraint=constraint))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 257, 1_000])
def test_draws_are_those_of_the_cpu(size: int, dtype: torch.dtype) -> None:
    chance, counts = random.Random(size), Counter[bool]()
    for number in range(40):
        scores_BV = (3 * torch.randn(24, size, generator=torch.Generator().manual_seed(number))).to(dtype)
        before_BV = scores_BV.clone()
        places = chance.sample(range(24), 16) if number % 2 else [*range(24)]
        rows = rows_of(chance, len(places), size)
        found = choose_on_device(scores_BV, rows, places)
        assert torch.equal(scores_BV, before_BV), "the scores are the caller's"
        expected = choose_on_cpu(scores_BV, rows, places, draw_all)
        counts.update(one == other for one, other in zip(found, expected, strict=True))
    assert counts[False] <= counts.total() // 500, counts  # where two ways to round put a border apart


def test_the_largest_quantile_draws_the_last_token_that_is_left() -> None:
    powers_DV = torch.linspace(0.0, -3.0, 200).repeat(2, 1)
    powers_DV[:, 150:] = -torch.inf
    largest = 1.0 - 2.0**-53
    assert draw(powers_DV, [SamplingParams(), SamplingParams(top_k=7)], [largest] * 2).tolist() == [149, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_say_so(value: float) -> None:
    scores_BV = torch.zeros(2, 50)
    scores_BV[1, 7] = value
    for values in PARAMS:
        with pytest.raises(WeightsError, match="not numbers"):
            choose_on_device(scores_BV, [SamplingRow(SamplingParams(**values))] * 2, [0, 1])


def test_where_nothing_may_be_drawn_it_says_so() -> None:
    scores_BV = torch.full((1, 50), -torch.inf)
    for values in PARAMS:
        with pytest.raises(WeightsError, match="not numbers"):
            choose_on_device(scores_BV, [SamplingRow(SamplingParams(**values))], [0])
