"""The plain generation loop: the whole prefix anew for every token. Slow, obviously right: the oracle of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set

import torch
from torch import Tensor

from shared.errors import GenerationError
from shared.grammar import Grammar
from shared.model import SmolLM2
from shared.sampling import SamplingParams, SamplingRow, sample


def generate(
    model: SmolLM2,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    max_new_tokens: int,
    end_token_ids: Set[int] | Sequence[int] = (),
    grammar: Grammar | None = None,
    scores: Callable[[list[int]], Tensor] | None = None,
) -> Iterator[int]:
    """Yield the completion's tokens one by one; the end token stops it and is not yielded.

    Positions end with the model's: a prompt of `max_position_embeddings` tokens yields nothing. A grammar, fresh, ends
    the completion as soon as nothing can follow. `scores` returns what may follow these tokens, (1, V); the model's own
    answer unless another network computes it.

    Raises:
        GenerationError: the prompt is empty, too long, or holds an id the model does not know; so does `logit_bias`.
    """
    config = model.config
    check_prompt(prompt_ids, config.vocab_size, config.max_position_embeddings)
    params.check_ids(config.vocab_size)
    completion: list[int] = []
    row = SamplingRow(params, prompt_ids, completion, tuple(end_token_ids), grammar)
    for _ in range(min(max_new_tokens, config.max_position_embeddings - len(prompt_ids))):
        with torch.inference_mode():
            ids = [*prompt_ids, *completion]
            logits_1V = last_scores(model, ids) if scores is None else scores(ids)
            token_id = sample(logits_1V, [row])[0].token_id
        if token_id in end_token_ids:
            return
        completion.append(token_id)
        yield token_id
        if grammar is not None and not grammar.push(token_id):
            return


def last_scores(model: SmolLM2, ids: list[int]) -> Tensor:
    """Return what may follow these tokens, (1, V)."""
    last_1D = model.hidden_states(torch.tensor([ids], device=model.device))[:, -1]
    return model.logits(last_1D)


def check_prompt(prompt_ids: Sequence[int], vocab_size: int, max_positions: int) -> None:
    if not prompt_ids:
        raise GenerationError("the prompt is empty; give at least one token")
    if len(prompt_ids) > max_positions:
        raise GenerationError(f"the prompt has {len(prompt_ids)} tokens; the model's context is {max_positions}")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise GenerationError(f"the prompt holds a token id outside 0..{vocab_size - 1}")
