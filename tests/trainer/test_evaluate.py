"""Held-out windows and the figures drawn from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.model import SmolLM2
from tests.tiny import tiny_model
from trainer.evaluate import HeldOut, evaluate, held_out_windows, mean_loss
from trainer.loss import IGNORED
from trainer.token_file import TokenFile


def token_file(num_tokens: int, *, num_bytes: int | None = None) -> TokenFile:
    tokens = (np.arange(num_tokens) * 7 % 500).astype(np.uint16)
    return TokenFile(
        source="input",
        train=tokens,
        held_out=tokens,
        num_train_bytes=num_bytes or num_tokens,
        num_held_out_bytes=num_bytes or num_tokens,
        manifest={},
    )


@given(st.integers(0, 400), st.integers(1, 50), st.integers(1, 20))
def test_windows_are_fixed_and_predict_the_next_token(num_tokens: int, length: int, most: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    inputs, targets = held_out_windows(tokens, sequence_length=length, max_windows=most)
    again, _ = held_out_windows(tokens, sequence_length=length, max_windows=most)
    assert np.array_equal(inputs, again)
    assert inputs.shape == targets.shape
    assert len(inputs) <= most
    counted = targets != IGNORED
    assert np.array_equal(targets[counted], inputs[counted] + 1)
    firsts = inputs[:, 0].tolist()
    assert len(set(firsts)) == len(firsts), "no row twice"
    assert (num_tokens < 2) == (counted.sum() == 0)
    if num_tokens > length:
        assert counted.all()


def test_figures_agree_with_each_other() -> None:
    model = tiny_model()
    result = evaluated(model, rows_per_pass=3)["input"]
    assert result.loss == pytest.approx(math.log(512), abs=0.4)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 4)  # four bytes per token
    assert result.num_tokens == 10 * 32
    assert mean_loss({"input": result}) == result.loss


def evaluated(model: SmolLM2, *, rows_per_pass: int) -> dict[str, HeldOut]:
    results = evaluate(
        model,
        {"input": token_file(1000, num_bytes=4000), "empty": token_file(0)},
        sequence_length=32,
        max_windows=10,
        rows_per_pass=rows_per_pass,
        dtype=torch.float32,
    )
    assert results is not None
    assert list(results) == ["input"]
    return results


def test_the_number_of_rows_per_pass_changes_nothing() -> None:
    model = tiny_model()
    assert evaluated(model, rows_per_pass=1)["input"].loss == pytest.approx(
        evaluated(model, rows_per_pass=10)["input"].loss, rel=1e-6
    )


def test_stops_when_asked() -> None:
    answers = iter([False, False, True])
    stopped = evaluate(
        tiny_model(),
        {"input": token_file(1000)},
        sequence_length=32,
        max_windows=10,
        rows_per_pass=1,
        dtype=torch.float32,
        should_stop=lambda: next(answers),
    )
    assert stopped is None


def test_draws_no_random_numbers() -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    evaluated(model, rows_per_pass=4)
    assert torch.equal(before, torch.get_rng_state())
