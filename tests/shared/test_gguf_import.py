"""A GGUF file, written as llama.cpp's converter writes it, comes back as the network and the tokenizer it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.strings import awkward_strings
from shared.errors import TokenizerError, WeightsError
from shared.gguf_import import TENSOR_NAMES, import_gguf, open_gguf, read_gguf_tokenizer
from shared.model import SmolLM2
from tests.tiny import TINY, tiny_model, tiny_tokenizer

GGUF_NAMES = {theirs: ours for ours, theirs in TENSOR_NAMES.items()}


def permuted(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """llama.cpp's own reordering of query and key rows, as its converter does it."""
    shape = (num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: SmolLM2, *, quantization: str = "F32", **changes: Any) -> None:
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    content = json.loads(tiny_tokenizer().backend.to_str())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if text in tiny_tokenizer().special_tokens else 1 for text in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, parameter in model.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        layer = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        kind = GGUF_NAMES[".".join(parts[3:] if layer else parts)]
        values = parameter.detach().numpy()
        if kind in ("attn_q", "attn_k"):
            values = permuted(values, config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads)
        dtype = gguf.GGMLQuantizationType[quantization if values.ndim == 2 and values.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(f"{layer}{kind}.weight", gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    if "tensor" in changes:
        writer.add_tensor(changes["tensor"], np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_network_comes_back(tmp_path: Path) -> None:
    path, model = tmp_path / "tiny.gguf", tiny_model()
    write_gguf(path, model)
    again, _ = import_gguf(path)
    assert again.config.to_hf() == {**TINY.to_hf(), "bos_token_id": 1, "eos_token_id": 2}
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(("quantization", "limit"), [("F16", 1e-3), ("Q8_0", 0.02), ("Q4_1", 0.3)])
def test_quantised_weights_come_back_nearly(tmp_path: Path, quantization: str, limit: float) -> None:
    path, model = tmp_path / "tiny.gguf", tiny_model()
    write_gguf(path, model, quantization=quantization)
    again, _ = import_gguf(path)
    largest = 0.0
    for name, parameter in model.requires_grad_(False).named_parameters():
        largest = max(
            largest, float((again.get_parameter(name).detach() - parameter).abs().max() / parameter.abs().max())
        )
    assert 0 < largest < limit


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model())
    tokenizer = read_gguf_tokenizer(open_gguf(path), path)
    strings = awkward_strings(300, seed=3)
    assert tokenizer.encode_batch(strings) == tiny_tokenizer().encode_batch(strings)
    assert tokenizer.special_tokens == tiny_tokenizer().special_tokens
    assert tokenizer.settings["eos_token"] == "<|im_end|>"
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi"


def test_other_tokenizers_and_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(path, tiny_model(), pre="llama-bpe")
    with pytest.raises(TokenizerError, match="splits text as 'llama-bpe'"):
        import_gguf(path)
    write_gguf(path, tiny_model(), architecture="qwen2")
    with pytest.raises(WeightsError, match="'qwen2' network"):
        import_gguf(path)
    write_gguf(path, tiny_model(), tensor="blk.0.attn_q_norm.weight")
    with pytest.raises(WeightsError, match=r"unknown tensor 'blk\.0\.attn_q_norm\.weight'"):
        import_gguf(path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, while the package reads past the end
@pytest.mark.parametrize("keep", [0, 3, 100, 20_000, -10])
def test_a_file_cut_off_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"tiny\.gguf"):
        import_gguf(path)
    with pytest.raises(WeightsError, match="is missing"):
        import_gguf(tmp_path / "absent.gguf")
