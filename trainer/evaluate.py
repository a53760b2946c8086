"""How well the model predicts text it never trained on, per source. Draws no random numbers and changes no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.model import SmolLM2
from trainer.loss import IGNORED, RowLosses
from trainer.token_file import TokenFile


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One source's result."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """The same in bits per byte of text: comparable between tokenizers."""
    perplexity: float
    num_tokens: int

    def as_row(self) -> dict[str, float]:
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


def held_out_windows(
    tokens: NDArray[np.uint16], *, sequence_length: int, max_windows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut up to `max_windows` rows, evenly spread and always the same, as inputs and targets (B, T).

    Text shorter than one row gives one row, padded with ignored targets; fewer than two tokens give none.
    """
    num_targets = max(0, len(tokens) - 1)
    num_whole = num_targets // sequence_length
    if num_whole == 0:
        inputs = np.zeros((min(1, num_targets), sequence_length), dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        inputs[:, :num_targets] = tokens[:num_targets]
        targets[:, :num_targets] = tokens[1:]
        return inputs, targets
    count = min(max_windows, num_whole)
    firsts = np.arange(count) * num_whole // count * sequence_length
    rows = np.stack([tokens[first : first + sequence_length + 1] for first in firsts]).astype(np.int64)
    return rows[:, :-1], rows[:, 1:]


def evaluate(
    model: SmolLM2,
    token_files: Mapping[str, TokenFile],
    *,
    sequence_length: int,
    max_windows: int,
    rows_per_pass: int,
    dtype: torch.dtype,
    mask_documents: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, HeldOut] | None:
    """Return each source's held-out loss, or None where `should_stop` said so in between.

    Args:
        mask_documents: as in training: tokens look only at their own document.

    A source with no held-out text is left out. Bits per byte takes the source's mean bytes per token.
    """
    results = {}
    row_losses = RowLosses(mask_documents=mask_documents)
    for source, token_file in token_files.items():
        inputs_BT, targets_BT = held_out_windows(
            token_file.held_out, sequence_length=sequence_length, max_windows=max_windows
        )
        num_tokens = int((targets_BT != IGNORED).sum())
        if num_tokens == 0:
            continue
        total = 0.0
        for first in range(0, len(inputs_BT), rows_per_pass):
            if should_stop():
                return None
            rows = slice(first, first + rows_per_pass)
            inputs, targets = (torch.from_numpy(array[rows]).to(model.device) for array in (inputs_BT, targets_BT))
            with torch.inference_mode():
                total += float(row_losses(model, inputs, targets, dtype).sum())
        loss = total / num_tokens
        bytes_per_token = token_file.num_held_out_bytes / len(token_file.held_out)
        results[source] = HeldOut(
            loss=loss,
            bits_per_byte=loss / math.log(2) / bytes_per_token,
            perplexity=math.exp(min(loss, 100.0)),
            num_tokens=num_tokens,
        )
    return results


def mean_loss(results: Mapping[str, HeldOut]) -> float:
    """Mean over sources, each counting once however long: what "best" means. Infinite where there is no source."""
    return sum(result.loss for result in results.values()) / len(results) if results else math.inf
