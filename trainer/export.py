"""From a trained network to models/NAME: the FP16 file and its folder, checked against the fp32 weights first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shared.checkpoint import half_tensors, model_from_tensors, write_export
from shared.model import SmolLM2
from shared.tokenizer import Tokenizer
from trainer.evaluate import held_out_windows
from trainer.loss import IGNORED
from trainer.token_file import TokenFile

logger = logging.getLogger("trainer")

WINDOWS_COMPARED = 8
TOKENS_PER_PASS = 1_024
LEAST_AGREEMENT = 0.999


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far rounding the weights to 16 bits moves the answers, on held-out text; both compute in fp32."""

    largest_logit_difference: float
    top1_agreement: float
    """Share of positions whose likeliest next token stays the same."""
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written where, and how it compares."""

    folder: Path
    manifest: dict[str, Any]
    parity: Parity

    def summary(self) -> str:
        files = ", ".join(f"{name} {entry['bytes'] / 2**20:.1f} MiB" for name, entry in self.manifest["files"].items())
        return (
            f"exported to {self.folder}: {files}\n"
            f"FP16 against fp32 on {self.parity.num_tokens:,} held-out tokens: largest logit difference "
            f"{self.parity.largest_logit_difference:.2e}, top-1 agreement {self.parity.top1_agreement:.3%}, "
            f"largest weight {self.manifest['largest_weight']:.3g} (FP16 holds 65,504)"
        )


def export_model(
    folder: Path,
    model: SmolLM2,
    tokenizer: Tokenizer,
    token_files: Mapping[str, TokenFile],
    *,
    trained_length: int,
    details: Mapping[str, Any],
    should_stop: Callable[[], bool] = lambda: False,
) -> Export | None:
    """Compare, then write; None where `should_stop` said so in between.

    The folder appears as a whole; an earlier export of that name stands until then.

    Args:
        trained_length: tokens per training row.
        details: what the manifest says besides: run, step, recipe, data hash.

    Raises:
        WeightsError: a weight is not finite or beyond FP16.
        StorageError: the disk refused.
    """
    parity = compare_halves(model, token_files, folder, sequence_length=trained_length, should_stop=should_stop)
    if parity is None:
        return None
    if parity.top1_agreement < LEAST_AGREEMENT:
        logger.warning(
            "FP16 changes the likeliest token at %.2f%% of positions (%.1f%% is usual)",
            100 * (1 - parity.top1_agreement),
            100 * (1 - LEAST_AGREEMENT),
        )
    manifest = write_export(
        folder, model, tokenizer, trained_length=trained_length, details={**details, "fp16_parity": asdict(parity)}
    )
    return Export(folder=folder, manifest=manifest, parity=parity)


def compare_halves(
    model: SmolLM2,
    token_files: Mapping[str, TokenFile],
    origin: Path,
    *,
    sequence_length: int,
    should_stop: Callable[[], bool],
) -> Parity | None:
    """Run the weights as they are and rounded to FP16, both in fp32, over the same held-out rows."""
    rounded = model_from_tensors(half_tensors(model), model.config, origin, device=model.device, dtype=torch.float32)
    largest, num_same, num_tokens = 0.0, 0, 0
    rows_per_pass = max(1, TOKENS_PER_PASS // sequence_length)
    for token_file in token_files.values():
        inputs_BT, targets_BT = held_out_windows(
            token_file.held_out, sequence_length=sequence_length, max_windows=WINDOWS_COMPARED
        )
        for first in range(0, len(inputs_BT), rows_per_pass):
            if should_stop():
                return None
            rows = slice(first, first + rows_per_pass)
            inputs = torch.from_numpy(inputs_BT[rows]).to(model.device)
            counted = torch.from_numpy(targets_BT[rows] != IGNORED).to(model.device)
            with torch.inference_mode():
                exact_NV, rounded_NV = model(inputs)[counted], rounded(inputs)[counted]
            largest = max(largest, float((exact_NV - rounded_NV).abs().max()))
            num_same += int((exact_NV.argmax(dim=-1) == rounded_NV.argmax(dim=-1)).sum())
            num_tokens += len(exact_NV)
    return Parity(largest_logit_difference=largest, top1_agreement=num_same / max(1, num_tokens), num_tokens=num_tokens)
