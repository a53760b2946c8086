"""A whole model in milliseconds: a tokenizer of 512 ids, a network of 30 thousand numbers, a real export of both."""

from __future__ import annotations

import functools
from pathlib import Path

from shared.catalog import ModelFolder, read_model_folder
from shared.checkpoint import write_export
from shared.config import ModelConfig
from shared.model import SmolLM2
from shared.tokenizer import Tokenizer

TINY = ModelConfig(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
)

TINY_TEXTS = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n",
    "def add(first: int, second: int) -> int:\n    return first + second\n",
    "Question: 12 + 30 = ?\nAnswer: 12 + 30 = 42. The total is 42 apples.\n",
    "She sells sea shells by the sea shore; the shells she sells are sea shells, I am sure.\n",
    "Größe, naïve, 日本語のテキスト, 🙂 and 👩‍👩‍👧 end.\n",
)


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 ids trained on `TINY_TEXTS`; ids not needed are padded by added repeats of the text."""
    return Tokenizer.train([text * 3 for text in TINY_TEXTS] + [FILLER], vocab_size=TINY.vocab_size)


def tiny_model(seed: int = 0) -> SmolLM2:
    """A network with fresh random weights, the same for the same seed."""
    model = SmolLM2(TINY)
    model.initialize(seed)
    return model.eval()


@functools.cache
def other_tokenizer() -> Tokenizer:
    """As many ids, most of which stand for other text."""
    return Tokenizer.train([FILLER[::-1], *TINY_TEXTS], vocab_size=TINY.vocab_size)


def write_tiny_export(
    models_dir: Path, name: str = "tiny", *, seed: int = 0, tokenizer: Tokenizer | None = None
) -> ModelFolder:
    """Write a real export folder `models_dir/name` and describe it. Another seed gives another revision."""
    models_dir.mkdir(parents=True, exist_ok=True)
    write_export(
        models_dir / name,
        tiny_model(seed),
        tokenizer or tiny_tokenizer(),
        trained_length=64,
        details={"step": 3, "recipe": "tiny"},
    )
    return read_model_folder(models_dir / name)


FILLER = " ".join(f"{first}{second}ing" for first in "bcdfghklmnprstvw" for second in ("al", "en", "or", "ust", "ind"))
