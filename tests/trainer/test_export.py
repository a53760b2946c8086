"""An export answers as the network it was made from, or it is not made."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from shared.errors import WeightsError
from shared.model import SmolLM2
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.test_evaluate import token_file
from trainer.export import Export, export_model


def matrix(model: SmolLM2, layer: int, name: str) -> torch.Tensor:
    return model.get_parameter(f"model.layers.{layer}.mlp.{name}.weight")


def exported(folder: Path, model: SmolLM2, gguf: tuple[str, ...] = ()) -> Export:
    result = export_model(
        folder,
        model,
        tiny_tokenizer(),
        {"input": token_file(1000)},
        trained_length=32,
        details={"step": 1},
        gguf_kinds=gguf,  # type: ignore[arg-type]
    )
    assert result is not None
    return result


def test_the_figures_are_in_the_manifest_and_the_summary(tmp_path: Path) -> None:
    result = exported(tmp_path / "tiny", tiny_model(), ("f16", "q8_0"))
    assert result.parity.num_tokens == 8 * 32
    assert result.parity.top1_agreement_but_ties >= 0.999
    assert 0 < result.parity.largest_activation < 100
    assert result.manifest["fp16_parity"]["top1_agreement"] == result.parity.top1_agreement
    assert {"tiny-F16.gguf", "tiny-Q8_0.gguf", "model.safetensors", "tiny_half.pt"} <= result.manifest["files"].keys()
    for words in ("top-1 agreement", "largest weight", "FP16 holds 65,504", "tiny-Q8_0.gguf"):
        assert words in result.summary()


def test_weights_too_small_for_16_bits_are_refused(tmp_path: Path) -> None:
    """Values below 3e-8 become zero in FP16. Here one projection of such undoes two as much too large."""
    model = tiny_model()
    with torch.no_grad():
        for layer in range(2):
            matrix(model, layer, "gate_proj").mul_(1e3)
            matrix(model, layer, "up_proj").mul_(5e4)
            matrix(model, layer, "down_proj").mul_(2e-8)
    with pytest.raises(WeightsError, match=r"not exported: FP16 keeps the likeliest token at .* of 256 held-out"):
        exported(tmp_path / "tiny", model)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_weights_that_16_bits_cannot_hold_are_named(tmp_path: Path, value: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        matrix(model, 0, "up_proj")[0, 0] = value
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.up_proj\.weight holds"):
        exported(tmp_path / "tiny", model)
    assert not (tmp_path / "tiny").exists()


def test_activations_beyond_fp16_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that FP16 holds may still overflow FP16 arithmetic on the way."""
    model = tiny_model()
    with torch.no_grad():
        matrix(model, 0, "up_proj").mul_(1000)
        matrix(model, 0, "down_proj").mul_(1000)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        result = exported(tmp_path / "tiny", model)
    assert result.parity.largest_activation > 65_504
    assert "serve with bf16 or fp32" in caplog.text
