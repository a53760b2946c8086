"""Write SmolLM2 as a GGUF file, which llama.cpp and what builds on it run: weights, tokenizer, chat template.

The counterpart of `shared.gguf_import`. Field names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the
layout is that of llama.cpp's convert_hf_to_gguf.py. Needs the `gguf` package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shared.config import ModelConfig
from shared.errors import WeightsError
from shared.files import storage_errors
from shared.gguf_import import CONTROL, TENSOR_NAMES, USER_DEFINED
from shared.tokenizer import END_OF_TEXT, Tokenizer, token_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

GgufKind = Literal["f16", "q8_0"]
GGUF_KINDS: tuple[GgufKind, ...] = ("f16", "q8_0")

NORMAL, UNUSED = 1, 5
"""Values of `tokenizer.ggml.token_type`, beside those of the import."""

OUR_NAMES = {theirs: ours for ours, theirs in TENSOR_NAMES.items()}
Q8_0_BLOCK = 32
"""Weights of a row that share one scale: 34 bytes for 32 of them."""


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    name: str,
    kind: GgufKind = "f16",
    end_token_id: int | None = None,
) -> None:
    """Write `path` from weights named as Hugging Face names them; norms stay fp32, as llama.cpp wants them.

    Args:
        kind: "f16" keeps FP16 weights to the bit; "q8_0" takes 8.5 bits a weight. A matrix whose rows are no multiple
            of 32 stays FP16.
        end_token_id: what ends a completion; the configuration's unless given.

    Raises:
        TokenizerError: the tokenizer is not the model's.
        WeightsError: it is not a byte-level BPE as SmolLM2's, so llama.cpp would cut text otherwise.
        StorageError: the disk refused.
    """
    import gguf

    tokenizer.check_fits(config)
    with storage_errors(path):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_sizes(writer, config)
        add_tokenizer(writer, tokenizer, config, end_token_id=end_token_id)
        for tensor_name, tensor in tensors.items():
            values, dtype = gguf_tensor(tensor_name, tensor, config, kind)
            writer.add_tensor(gguf_name(tensor_name), values, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_sizes(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, config: ModelConfig, *, end_token_id: int | None) -> None:
    """Describe the tokenizer so that llama.cpp cuts text into the same ids."""
    content = json.loads(tokenizer.backend.to_str())
    check_splitting(content)
    added = {token["id"]: token for token in content["added_tokens"]}
    texts = [tokenizer.backend.id_to_token(token_id) for token_id in range(config.vocab_size)]
    types = [
        UNUSED
        if text is None
        else NORMAL
        if token_id not in added
        else CONTROL
        if added[token_id]["special"]
        else USER_DEFINED
        for token_id, text in enumerate(texts)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    # A model may have more ids than its tokenizer; llama.cpp wants a name for each.
    writer.add_token_list([f"[PAD{token_id}]" if text is None else text for token_id, text in enumerate(texts)])
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id if end_token_id is None else end_token_id)
    for key, add in (("unk_token", writer.add_unk_token_id), ("pad_token", writer.add_pad_token_id)):
        token_id = tokenizer.backend.token_to_id(token_text(tokenizer.settings.get(key)) or END_OF_TEXT)
        add(tokenizer.end_of_text_id if token_id is None else token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def check_splitting(content: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that does not split text as llama.cpp's "smollm": digits alone, then GPT-2's expression."""
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    known = (
        [step.get("type") for step in steps] == ["Digits", "ByteLevel"]
        and steps[0].get("individual_digits") is True
        and steps[1].get("use_regex") is True
        and steps[1].get("add_prefix_space") is False
    )
    if not known or content.get("normalizer") or content["model"]["type"] != "BPE":
        raise WeightsError(
            "the tokenizer does not split text as SmolLM2's does, so llama.cpp would give other ids; "
            "GGUF is written for SmolLM2's kind of tokenizer only"
        )


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.weight", name)
    return (
        f"blk.{match[1]}.{OUR_NAMES[match[2]]}.weight" if match else f"{OUR_NAMES[name.removesuffix('.weight')]}.weight"
    )


def gguf_tensor(name: str, tensor: Tensor, config: ModelConfig, kind: GgufKind) -> tuple[NDArray[Any], Any]:
    """Return one tensor's bytes as llama.cpp stores them, and their type."""
    import gguf
    import numpy as np

    values: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    if values.ndim == 1:
        return values, gguf.GGMLQuantizationType.F32
    if name.endswith("q_proj.weight"):
        values = pairs_from_halves(values, config.num_attention_heads)
    if name.endswith("k_proj.weight"):
        values = pairs_from_halves(values, config.num_key_value_heads)
    fits = values.shape[1] % Q8_0_BLOCK == 0
    dtype = gguf.GGMLQuantizationType.Q8_0 if kind == "q8_0" and fits else gguf.GGMLQuantizationType.F16
    return gguf.quants.quantize(np.ascontiguousarray(values), dtype), dtype


def pairs_from_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Reorder the rows of queries or keys: llama.cpp's RoPE turns neighbours, Hugging Face's the halves of a head."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
