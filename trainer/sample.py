"""What the model writes: the recipe's prompts continued with a fixed seed. Uses none of the training's randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shared.generate import generate
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from shared.tokenizer import Tokenizer
from trainer.config import PromptSection


def sample_texts(
    model: SmolLM2,
    tokenizer: Tokenizer,
    prompts: Sequence[PromptSection],
    *,
    step: int,
    max_new_tokens: int,
    trained_length: int,
    temperature: float,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """Continue each prompt and return rows of samples.jsonl, or None where `should_stop` said so in between.

    A text ends at `trained_length` tokens, prompt included: the model has seen no position beyond.
    """
    rows = []
    params = SamplingParams(temperature=temperature, top_p=0.95, seed=seed)
    for prompt in prompts:
        prompt_ids = tokenizer.encode(prompt.text)[: trained_length - 1]
        room = min(max_new_tokens, trained_length - len(prompt_ids))
        completion = []
        for token_id in generate(
            model, prompt_ids, params, max_new_tokens=room, end_token_ids=(tokenizer.end_of_text_id,)
        ):
            if should_stop():
                return None
            completion.append(token_id)
        rows.append(
            {
                "step": step,
                "source": prompt.source,
                "prompt": prompt.text,
                "text": tokenizer.decode(completion),
                "seed": seed,
            }
        )
    return rows
