"""The compiled network: weights packed once at load, then one call per step for the new tokens of all sequences."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from service.engine.kernels.library import Drawing, Library, Shape, Step
from service.engine.kv_cache import KVCache, Span
from shared.config import ModelConfig
from shared.drawing import Candidates, check_numbers
from shared.model import SmolLM2
from shared.sampling import SamplingParams

QKV, OUT, GATE_UP, DOWN, HEAD = range(5)
INPUT_NORM, POST_NORM, LAST_NORM = range(3)
LONGEST_HEAD_DIM = 256
LARGEST_GROUP = 64
"""`Queries::MOST`."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unknown_shape(config: ModelConfig) -> str | None:
    """Say what of such a network the kernels cannot compute; None where they can."""
    if config.head_dim > LONGEST_HEAD_DIM:
        return f"the kernels know heads of up to {LONGEST_HEAD_DIM} numbers, not {config.head_dim}"
    group = config.num_attention_heads // config.num_key_value_heads
    if group > LARGEST_GROUP:
        return f"in the kernels up to {LARGEST_GROUP} query heads share one for keys and values, not {group}"
    return None


class CompiledDecoder:
    """One model in the kernels' own layout."""

    wants_blocks = True
    spare_slots = 0

    def __init__(self, model: SmolLM2, library: Library, *, is_int8: bool = False) -> None:
        """Pack a model's weights. Its matrices are emptied on the way, so that there is never a second copy of all."""
        config = model.config
        self.config = config
        self.library = library
        self.is_int8 = is_int8
        shape = Shape(
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.max_position_embeddings,
            config.rms_norm_eps,
            is_int8,
        )
        self.functions = library.functions
        self.handle = self.functions.smollm_new(ctypes.byref(shape))
        if not self.handle:
            raise MemoryError("no memory for the packed weights")
        weakref.finalize(self, self.functions.smollm_delete, self.handle)
        self.width: int = self.functions.smollm_logits_width(self.handle)
        self.logits_BV = torch.empty(0, self.width)
        self.pack(model)

    @property
    def description(self) -> str:
        return f"{'int8' if self.is_int8 else 'bfloat16'} weights"

    def prepare(self, cache: KVCache) -> None:
        """Nothing waits: the weights are packed."""

    def pack(self, model: SmolLM2) -> None:
        config, decoder = model.config, model.model
        layer: Any  # an nn.Module to mypy, which does not know its parts
        for number, layer in enumerate(decoder.layers):
            attention, mlp = layer.self_attn, layer.mlp
            kv_size = config.num_key_value_heads * config.head_dim
            self.set_matrix(attention.q_proj, QKV, layer=number)
            self.set_matrix(attention.k_proj, QKV, layer=number, first=config.hidden_size)
            self.set_matrix(attention.v_proj, QKV, layer=number, first=config.hidden_size + kv_size)
            self.set_matrix(attention.o_proj, OUT, layer=number)
            self.set_matrix(mlp.gate_proj, GATE_UP, layer=number, first=0)
            self.set_matrix(mlp.up_proj, GATE_UP, layer=number, first=1)
            self.set_matrix(mlp.down_proj, DOWN, layer=number)
            self.set_norm(layer.input_layernorm, INPUT_NORM, layer=number)
            self.set_norm(layer.post_attention_layernorm, POST_NORM, layer=number)
        self.set_norm(decoder.norm, LAST_NORM)
        # The embedding keeps its rows: the kernels look tokens up in them.
        self.embedding = decoder.embed_tokens.weight.detach().to(torch.bfloat16, copy=True).contiguous()
        self.set_matrix(model.lm_head, HEAD)
        decoder.embed_tokens.weight = nn.Parameter(self.embedding, requires_grad=False)
        half = config.head_dim // 2
        cos, sin = (table_PE[:, :half].float().contiguous() for table_PE in model.rope)
        self.functions.smollm_set_tables(self.handle, self.embedding.data_ptr(), cos.data_ptr(), sin.data_ptr())

    def set_matrix(self, linear: nn.Linear, part: int, *, layer: int = 0, first: int = 0) -> None:
        weight = linear.weight.detach().contiguous()
        if weight.dtype not in KINDS:  # float64 or one of 8 bits: fp32 holds more than the kernels keep of either
            weight = weight.float()
        kind = KINDS[weight.dtype]
        self.functions.smollm_set_matrix(self.handle, layer, part, first, len(weight), kind, weight.data_ptr())
        linear.weight = nn.Parameter(torch.empty(0, dtype=linear.weight.dtype), requires_grad=False)

    def set_norm(self, norm: Any, which: int, *, layer: int = 0) -> None:
        weight = norm.weight.detach().float().contiguous()
        self.functions.smollm_set_norm(self.handle, layer, which, weight.data_ptr())

    def scores(self, cache: KVCache, token_ids: Sequence[int], spans: Sequence[Span], places: Sequence[int]) -> Tensor:
        """Compute a step: see `Network`. The scores are fp32."""
        blocks = cache.numbers_RCL2KBE
        assert blocks.dtype == torch.bfloat16 and blocks.is_contiguous()
        assert len(token_ids) == sum(span.count for span in spans) > 0
        if len(places) > len(self.logits_BV):
            self.logits_BV = torch.empty(len(places), self.width)
        ids = np.array(token_ids, dtype=np.int32)
        flat = np.array([(span.slot, span.start, span.count) for span in spans], dtype=np.int32)
        wanted = np.array(places, dtype=np.int32)
        step = Step(
            len(ids),
            len(spans),
            len(wanted),
            ids.ctypes.data,
            flat.ctypes.data,
            wanted.ctypes.data,
            blocks.data_ptr(),
            blocks.shape[1],
            self.logits_BV.data_ptr(),
        )
        self.functions.smollm_step(self.handle, ctypes.byref(step), torch.get_num_threads())
        return self.logits_BV[: len(places), : self.config.vocab_size]

    def draw(
        self, rows: Sequence[Candidates], params: Sequence[SamplingParams], quantiles: Sequence[float]
    ) -> list[int]:
        """Draw a token from each row: `shared.drawing.draw_all`, all rows at once."""
        return draw_with(self.library, rows, params, quantiles)


def draw_with(
    library: Library, rows: Sequence[Candidates], params: Sequence[SamplingParams], quantiles: Sequence[float]
) -> list[int]:
    """As `shared.drawing.draw_all`; `draw.h` says how. Its weights differ from NumPy's in their last bits.

    Raises:
        WeightsError: the scores are not numbers.
    """
    if not rows:
        return []
    size = len(rows[0].scores_V)
    drawings = (Drawing * len(rows))()
    for drawing, row, of, quantile in zip(drawings, rows, params, quantiles, strict=True):
        scores_V, allowed = row.scores_V, row.allowed
        assert scores_V.dtype == np.float32 and scores_V.flags.c_contiguous and len(scores_V) == size
        assert allowed is None or (allowed.flags.c_contiguous and len(allowed) == 2 * -(-size // 16))
        drawing.scores, drawing.quantile = scores_V.ctypes.data, quantile
        drawing.allowed = None if allowed is None else allowed.ctypes.data
        drawing.temperature, drawing.top_k, drawing.top_p, drawing.min_p = of.temperature, of.top_k, of.top_p, of.min_p
    library.functions.smollm_draw(drawings, len(drawings), size, torch.get_num_threads())
    token_ids = [drawing.token for drawing in drawings]
    check_numbers(min(token_ids) >= 0)
    return token_ids
