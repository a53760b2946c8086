"""The oracle's loop: deterministic, bounded by the context, stopped by the end token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.errors import GenerationError
from shared.generate import generate
from shared.sampling import SamplingParams
from tests.tiny import TINY, tiny_model, tiny_tokenizer

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tiny_tokenizer().encode("First Citizen:")


def run(params: SamplingParams, prompt: list[int] = PROMPT, count: int = 20, ends: tuple[int, ...] = ()) -> list[int]:
    return list(generate(tiny_model(), prompt, params, max_new_tokens=count, end_token_ids=ends))


def test_greedy_equals_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tiny_model()
    theirs: Any = LlamaForCausalLM(LlamaConfig(**TINY.to_hf()))
    theirs.load_state_dict(model.state_dict())
    prompt = torch.tensor([PROMPT])
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert run(GREEDY) == expected[0, len(PROMPT) :].tolist()


def test_the_same_seed_gives_the_same_tokens() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7)
    assert run(params) == run(params)
    assert run(params) != run(SamplingParams(temperature=0.8, top_p=0.9, seed=8))


def test_a_completion_continued_is_the_one_never_broken() -> None:
    """What a worker relies on that takes over: penalties and draws go by what is written, not by who wrote it."""
    params = SamplingParams(temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.1, seed=3)
    whole = run(params)
    shorter = run(params, count=8)
    assert whole[:8] == shorter


def test_the_end_token_stops_and_is_not_yielded() -> None:
    tokens = run(GREEDY)
    end = tokens[5]
    assert run(GREEDY, ends=(end,)) == tokens[: tokens.index(end)]


def test_the_context_bounds_the_completion() -> None:
    prompt = (PROMPT * TINY.max_position_embeddings)[: TINY.max_position_embeddings - 3]
    assert len(run(GREEDY, prompt, count=50)) == 3
    assert run(GREEDY, prompt + PROMPT[:3], count=50) == []


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "prompt is empty"),
        ([1] * 257, "257 tokens; the model's context is 256"),
        ([0, 512], "outside 0..511"),
        ([-1], "outside 0..511"),
    ],
)
def test_a_wrong_prompt_is_refused(prompt: list[int], sentence: str) -> None:
    with pytest.raises(GenerationError, match=sentence):
        run(GREEDY, prompt)
