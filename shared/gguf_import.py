"""Read SmolLM2 out of a GGUF file, llama.cpp's format: weights dequantised to fp32, tokenizer, chat template.

Field names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Reading needs the `gguf` package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import ModelConfig
from shared.errors import TokenizerError, WeightsError
from shared.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from shared.model import SmolLM2

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`."""

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def import_gguf(path: Path) -> tuple[SmolLM2, Tokenizer]:
    """Return the network in fp32 and its tokenizer.

    Raises:
        WeightsError: the file is missing, cut off, or of another architecture.
        TokenizerError: its tokenizer is not SmolLM2's kind.
    """
    import torch

    from shared.checkpoint import model_from_tensors

    reader = open_gguf(path)
    config = read_gguf_config(reader, path)
    tokenizer = read_gguf_tokenizer(reader, path)
    tokenizer.check_fits(config)
    tensors = GgufTensors(reader, config, path)
    model = model_from_tensors(tensors, config, path, device=torch.device("cpu"), dtype=torch.float32)
    return model.requires_grad_(True), tokenizer


class GgufTensors(Mapping[str, "Tensor"]):
    """A GGUF file's tensors under Hugging Face's names, dequantised one at a time when asked for."""

    def __init__(self, reader: Any, config: ModelConfig, path: Path) -> None:
        self.config, self.path = config, path
        self.stored = {hugging_face_name(tensor.name, path): tensor for tensor in reader.tensors}

    def __getitem__(self, name: str) -> Tensor:
        import torch

        return torch.from_numpy(read_gguf_tensor(self.stored[name], self.config, self.path))

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def open_gguf(path: Path) -> Any:
    import gguf

    if not path.is_file():
        raise WeightsError(f"{path} is missing; download it again")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # a cut-off file fails in many places
        raise WeightsError(f"{path} is no GGUF file, or only part of one ({error}); download it again") from error


def read_gguf_config(reader: Any, path: Path) -> ModelConfig:
    architecture = field(reader, "general.architecture")
    if architecture != "llama":
        raise WeightsError(f"{path} holds a {architecture!r} network; only 'llama' is supported")
    for name in ("rope.scaling.type", "rope.scaling.factor"):
        if (value := field(reader, f"llama.{name}")) not in (None, "none"):
            raise WeightsError(f"{path} has {name} = {value!r}; scaled RoPE is not supported")
    embedding = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise WeightsError(f"{path} has no token_embd.weight; download it again")
    num_heads = field(reader, "llama.attention.head_count")
    return ModelConfig(
        vocab_size=int(embedding.shape[1]),  # GGUF lists the fastest-running dimension first
        hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=field(reader, "llama.attention.head_count_kv") or num_heads,
        max_position_embeddings=field(reader, "llama.context_length"),
        rope_theta=float(field(reader, "llama.rope.freq_base") or 10_000.0),
        # Stored as fp32: 1e-5 reads back as 9.999999747e-06.
        rms_norm_eps=float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        tie_word_embeddings=not any(tensor.name == "output.weight" for tensor in reader.tensors),
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id") or 0,
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id") or 0,
    )


def hugging_face_name(name: str, path: Path) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in TENSOR_NAMES:
        raise WeightsError(f"{path} holds the unknown tensor {name!r}; only plain Llama networks are supported")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{TENSOR_NAMES[match[2]]}.weight"


def read_gguf_tensor(tensor: Any, config: ModelConfig, path: Path) -> NDArray[np.float32]:
    """Return one tensor dequantised, rows of queries and keys in Hugging Face's order."""
    import gguf
    import numpy as np

    try:
        values: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    except NotImplementedError as error:
        raise WeightsError(
            f"{path} stores {tensor.name} as {tensor.tensor_type.name}, which gguf cannot read"
        ) from error
    if tensor.name.endswith(".attn_q.weight"):
        return halves_from_pairs(values, config.num_attention_heads)
    if tensor.name.endswith(".attn_k.weight"):
        return halves_from_pairs(values, config.num_key_value_heads)
    return values


def halves_from_pairs(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's reordering: its RoPE turns neighbouring rows, Hugging Face's the two halves of a head.

    The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def read_gguf_tokenizer(reader: Any, path: Path) -> Tokenizer:
    """Build the tokenizer from a GGUF file's metadata.

    Raises:
        TokenizerError: it has none, or splits text otherwise than SmolLM2.
    """
    kind, split = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise TokenizerError(
            f"{path} has a tokenizer of kind {kind!r} that splits text as {split!r}; only 'gpt2' with 'smollm' is known"
        )
    texts: list[str] = field(reader, "tokenizer.ggml.tokens")
    types: list[int] = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]

    def name(key: str) -> str:
        token_id = field(reader, f"tokenizer.ggml.{key}_token_id")
        return END_OF_TEXT if token_id is None else texts[token_id]

    settings = {
        "bos_token": name("bos"),
        "eos_token": name("eos"),
        "unk_token": name("unknown"),
        "pad_token": name("padding"),
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(reader, "llama.context_length"),
    }
    if template := field(reader, "tokenizer.chat_template"):
        settings["chat_template"] = template
    return Tokenizer.from_vocabulary(
        {text: token_id for token_id, text in enumerate(texts)},
        [(merge[0], merge[1]) for merge in merges],
        special_tokens=[text for text, token_type in zip(texts, types, strict=True) if token_type == CONTROL],
        plain_added_tokens=[text for text, token_type in zip(texts, types, strict=True) if token_type == USER_DEFINED],
        settings=settings,
    )


def field(reader: Any, key: str) -> Any:
    """Return a metadata value, or None where the file does not have it."""
    found = reader.fields.get(key)
    return None if found is None else found.contents()
