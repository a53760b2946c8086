"""The kernels draw the tokens that `shared.sampling` draws, at every level of instructions this machine has."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.engine.kernels.build import usable_levels
from service.engine.kernels.decoder import draw_with
from service.engine.kernels.library import load_library
from shared.drawing import Candidates, Draw, all_ids, draw_from_scores, first_ids, without
from shared.errors import WeightsError
from shared.sampling import SamplingParams

LEVELS = [level.name for level in usable_levels("auto")]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.95},
    {"top_p": 0.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 300},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.9},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.1},
    {"top_p": 1e-9},
    {"min_p": 1.0},
]


@pytest.fixture(params=LEVELS)
def draw(request: pytest.FixtureRequest) -> Draw:
    return functools.partial(draw_with, load_library(request.param))


def rows(size: int) -> list[NDArray[np.float32]]:
    """Scores like a model's, flat and steep ones, with ties, and with tokens that are barred."""
    random = np.random.default_rng(size)
    normal = random.standard_normal(size).astype(np.float32)
    barred = np.where(random.random(size) < 0.7, np.float32(-np.inf), normal)
    barred[size // 2] = 0.0
    return [normal, 3 * normal, 12 * normal - 30, np.round(2 * normal), np.zeros(size, np.float32), barred]


@pytest.mark.parametrize("size", [1, 2, 15, 16, 257, 515, 5_003, 49_152])
def test_draws_are_those_of_the_reference(draw: Draw, size: int) -> None:
    random, num_drawn, differing = np.random.default_rng(1), 0, []
    for place, scores_V in enumerate(rows(size)):
        for number, filters in enumerate(FILTERS):
            for temperature in (0.7, 1.0, 2.5):
                params = SamplingParams(temperature=temperature, **filters)
                quantiles = [0.0, 1.0 - 2.0**-53, *random.random(3)]
                before_V = scores_V.copy()
                drawn = draw([Candidates(scores_V)] * 5, [params] * 5, quantiles)
                assert np.array_equal(scores_V, before_V), "the scores are the caller's"
                assert drawn[:3] == draw([Candidates(scores_V)] * 3, [params] * 3, quantiles[:3]), (
                    "alone or side by side"
                )
                num_drawn += 5
                for u, token_id in zip(quantiles, drawn, strict=True):
                    expected = draw_from_scores(scores_V, params, u)
                    if token_id != expected:
                        differing.append((place, number, temperature, u, token_id, expected))
    # Two ways to round put a border between two tokens some 1e-7 apart: a u that falls there is drawn otherwise.
    assert len(differing) <= num_drawn // 500, differing


def test_a_tiny_temperature_leaves_the_likeliest(draw: Draw) -> None:
    scores_V = np.array([1.0, 3.0, 2.999, -1e30, -np.inf] * 30, dtype=np.float32)
    drawn = draw([Candidates(scores_V)] * 3, [SamplingParams(temperature=1e-5)] * 3, [0.0, 0.3, 0.999])
    assert [token_id % 5 for token_id in drawn] == [1, 1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_numbers_say_so(draw: Draw, value: float) -> None:
    scores_V = np.zeros(600, dtype=np.float32)
    scores_V[577] = value
    with pytest.raises(WeightsError, match="not numbers"):
        draw([Candidates(np.zeros(600, dtype=np.float32)), Candidates(scores_V)], [SamplingParams()] * 2, [0.5] * 2)
    with pytest.raises(WeightsError, match="not numbers"):
        draw([Candidates(np.full(600, -np.inf, dtype=np.float32))], [SamplingParams()], [0.5])


@pytest.mark.parametrize("size", [1, 7, 16, 17, 515, 49_152])
def test_what_may_not_be_drawn_counts_as_if_it_were_impossible(draw: Draw, size: int) -> None:
    random = np.random.default_rng(size)
    scores_V = 3 * random.standard_normal(size).astype(np.float32)
    for share in (0.01, 0.5, 1.0):
        is_allowed_V = random.random(size) < share
        is_allowed_V[random.integers(size)] = True
        row = Candidates(scores_V, first_ids(np.packbits(is_allowed_V, bitorder="little"), size))
        assert np.array_equal(np.isfinite(row.barred()), is_allowed_V)
        for filters in FILTERS:
            params, quantiles = [SamplingParams(**filters)] * 4, [*random.random(4)]
            drawn = draw([row] * 4, params, quantiles)
            assert drawn == draw([Candidates(row.barred())] * 4, params, quantiles)
            assert is_allowed_V[drawn].all()


def test_where_nothing_may_be_drawn_it_says_so(draw: Draw) -> None:
    nothing = without(all_ids(5), range(5))
    with pytest.raises(WeightsError, match="not numbers"):
        draw([Candidates(np.zeros(5, dtype=np.float32), nothing)], [SamplingParams()], [0.5])
