"""From a trained network to models/NAME: the FP16 file and its folder, checked against the fp32 weights first."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.checkpoint import half_tensors, model_from_tensors, write_export
from shared.errors import WeightsError
from shared.gguf_export import GgufKind
from shared.model import DecoderLayer, SmolLM2
from shared.tokenizer import Tokenizer
from trainer.config import TrainConfig
from trainer.evaluate import held_out_windows
from trainer.loss import IGNORED
from trainer.run_folder import RunFolder
from trainer.token_file import TokenFile

logger = logging.getLogger("trainer")

WINDOWS_COMPARED = 8
TOKENS_PER_PASS = 1_024
LEAST_AGREEMENT = 0.999
NEAR_TIE = 0.01
"""Nats. Two tokens this close are as good as one another, and any rounding may swap them."""

LARGEST_FP16 = 65_504


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far rounding the weights to 16 bits moves the answers, on held-out text; both compute in fp32."""

    largest_logit_difference: float
    top1_agreement: float
    """Share of positions whose likeliest next token stays the same."""
    top1_agreement_but_ties: float
    """The same, where a swap of two tokens within `NEAR_TIE` counts as agreement."""
    num_tokens: int
    largest_activation: float
    """Largest absolute value between any two layers: FP16 arithmetic overflows above 65,504."""

    @property
    def is_faithful(self) -> bool:
        return self.num_tokens == 0 or self.top1_agreement_but_ties >= LEAST_AGREEMENT

    def summary(self) -> str:
        return (
            f"FP16 against fp32 on {self.num_tokens:,} held-out tokens: largest logit difference "
            f"{self.largest_logit_difference:.2e}, top-1 agreement {self.top1_agreement:.3%} "
            f"({self.top1_agreement_but_ties:.3%} but for near ties), largest activation {self.largest_activation:.3g}"
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written where, and how it compares."""

    folder: Path
    manifest: dict[str, Any]
    parity: Parity

    def summary(self) -> str:
        sizes = {name: entry["bytes"] for name, entry in self.manifest["files"].items() if not name.endswith(".json")}
        files = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
        return (
            f"exported to {self.folder}: {files}\n"
            f"{self.parity.summary()}, largest weight {self.manifest['largest_weight']:.3g} (FP16 holds 65,504)"
        )


def export_model(
    folder: Path,
    model: SmolLM2,
    tokenizer: Tokenizer,
    token_files: Mapping[str, TokenFile],
    *,
    trained_length: int,
    details: Mapping[str, Any],
    gguf_kinds: Sequence[GgufKind] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Export | None:
    """Compare, then write; None where `should_stop` said so in between.

    The folder appears as a whole; an earlier export of that name stands until then.

    Args:
        trained_length: tokens per training row.
        details: what the manifest says besides: run, step, recipe, data hash.
        gguf_kinds: GGUF files to write besides.

    Raises:
        WeightsError: a weight is not finite or beyond FP16, or FP16 answers otherwise than fp32.
        StorageError: the disk refused.
    """
    parity = compare_halves(model, token_files, folder, sequence_length=trained_length, should_stop=should_stop)
    if parity is None:
        return None
    if not parity.is_faithful:
        raise WeightsError(
            f"not exported: FP16 keeps the likeliest token at {parity.top1_agreement_but_ties:.2%} of "
            f"{parity.num_tokens:,} held-out positions, and {LEAST_AGREEMENT:.1%} are needed; some weights are too "
            "small or too large for 16 bits: export an earlier checkpoint (--checkpoint best), or train with a lower "
            "learning_rate"
        )
    if parity.largest_activation > LARGEST_FP16:
        logger.warning(
            "activations reach %.3g, above FP16's %s: serve with bf16 or fp32 arithmetic",
            parity.largest_activation,
            f"{LARGEST_FP16:,}",
        )
    manifest = write_export(
        folder,
        model,
        tokenizer,
        trained_length=trained_length,
        details={**details, "fp16_parity": asdict(parity)},
        gguf_kinds=gguf_kinds,
    )
    return Export(folder=folder, manifest=manifest, parity=parity)


def export_details(folder: RunFolder, config: TrainConfig, state: Mapping[str, Any]) -> dict[str, Any]:
    """What an export's manifest says of where its weights come from."""
    return {
        "run": folder.name,
        "step": state["step"],
        "data_hash": state["data_hash"],
        "recipe": config.name,
        "recipe_settings": config.model_dump(mode="json", exclude_none=True),
    }


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
    largest, num_same, num_as_good, num_tokens = 0.0, 0, 0, 0
    activations: list[Tensor] = []
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
                with largest_activations(model, activations):
                    exact_NV = model(inputs)[counted]
                rounded_NV = rounded(inputs)[counted]
            largest = max(largest, float((exact_NV - rounded_NV).abs().max()))
            best_N, chosen_N = exact_NV.argmax(dim=-1), rounded_NV.argmax(dim=-1)
            loss_N = (exact_NV.amax(dim=-1) - exact_NV.gather(-1, chosen_N[:, None])[:, 0]).float()
            num_same += int((best_N == chosen_N).sum())
            num_as_good += int(((best_N == chosen_N) | (loss_N <= NEAR_TIE)).sum())
            num_tokens += len(exact_NV)
    return Parity(
        largest_logit_difference=largest,
        top1_agreement=num_same / max(1, num_tokens),
        top1_agreement_but_ties=num_as_good / max(1, num_tokens),
        num_tokens=num_tokens,
        largest_activation=max(map(float, activations), default=0.0),
    )


@contextlib.contextmanager
def largest_activations(model: SmolLM2, found: list[Tensor]) -> Iterator[None]:
    """Append the largest absolute value that goes into and comes out of each layer and projection in the block."""

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        found.extend(tensor.detach().abs().amax() for tensor in (inputs[0], output))

    watched = [module for module in model.modules() if isinstance(module, (nn.Linear, DecoderLayer))]
    hooks = [module.register_forward_hook(note) for module in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
