"""The whole network: SmolLM2, a Llama-style decoder whose logits equal transformers' `LlamaForCausalLM`.

Parameter names are Hugging Face's, so weights need no conversion. What a token may look at is not fixed here: every
layer hands its queries, keys and values to an `Attend` function. Training passes the causal one below; the engine
passes one that reads and writes its key-value slots. One network serves both.

Shape letters: B sequences, T new tokens, S tokens looked at, D hidden_size, F intermediate_size, H query heads,
K key-value heads, E head_dim, V vocab_size, P max_position_embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.config import ModelConfig

INITIAL_LOGIT_STD = 0.5
"""Spread of the logits of an untrained model: its loss is ln(V) + 0.5²/2, close to a uniform guess."""


class Attend(Protocol):
    """How one layer's new tokens look at what came before."""

    def __call__(self, layer: int, queries_BHTE: Tensor, keys_BKTE: Tensor, values_BKTE: Tensor, /) -> Tensor:
        """Return the weighted values, shaped like the queries."""


def attend_causally(layer: int, queries_BHTE: Tensor, keys_BKTE: Tensor, values_BKTE: Tensor) -> Tensor:  # noqa: ARG001
    """Every token looks at itself and all before it, within the tokens given."""
    return F.scaled_dot_product_attention(queries_BHTE, keys_BKTE, values_BKTE, is_causal=True, enable_gqa=True)


def rope_tables(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, fp32, each (P, E). Su et al. 2021, arXiv 2104.09864, eq. 34.

    Laid out as Llama's checkpoints expect: the two halves of a head rotate together, not neighbouring pairs.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / config.rope_theta**exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(heads_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Turn each head by its token's position."""
    first, second = heads_BHTE.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return heads_BHTE * cos_BTE.unsqueeze(1) + turned * sin_BTE.unsqueeze(1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean of squares is taken in fp32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: H query heads share K key-value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, attend: Attend) -> Tensor:
        queries, keys, values = (self.split_heads(p(x_BTD)) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attend(self.layer, rotate(queries, cos_BTE, sin_BTE), rotate(keys, cos_BTE, sin_BTE), values)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def split_heads(self, x_BTX: Tensor) -> Tensor:
        return x_BTX.reshape(*x_BTX.shape[:2], -1, self.head_dim).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each on a normed copy and added back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTD: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BTE, sin_BTE, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))  # type: ignore[no-any-return]


class RunLayer(Protocol):
    """How a layer is run: training passes a compiled way, or one that keeps only the layer's input."""

    def __call__(self, layer: nn.Module, x_BTD: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, attend: Attend, /) -> Tensor:
        """Return the layer's output, shaped like `x_BTD`."""


def run_layer(layer: nn.Module, x_BTD: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, attend: Attend) -> Tensor:
    """Run a layer as it is."""
    return layer(x_BTD, cos_BTE, sin_BTE, attend)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The part Hugging Face names `model`: embedding, layers, last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class SmolLM2(nn.Module):
    """Token ids in, logits out. `config.num_parameters` numbers; the head shares the embedding's where tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = rope_tables(config, self.device)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let the RoPE tables follow the weights to their device but never to their dtype: they stay fp32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.rope[0].device != self.device:
            self.rope = rope_tables(self.config, self.device)
        return self

    def initialize(self, seed: int, *, residual_scale: float = 1.0) -> None:
        """Draw fresh weights: normal with std 1/sqrt(D) for every matrix, ones for every norm.

        The embedding gets `INITIAL_LOGIT_STD` times that: it is the head as well where tied, and with the full std
        the logits' spread alone would put the first loss 0.5 above ln(V).

        Args:
            seed: the same seed gives the same weights on any device: they are drawn on the CPU.
            residual_scale: factor on the two projections that write into the residual stream, per layer;
                1/sqrt(2 * num_hidden_layers) is GPT-2's choice.
        """
        generator = torch.Generator().manual_seed(seed)
        std = 1.0 / math.sqrt(self.config.hidden_size)
        scales = {"embed_tokens": INITIAL_LOGIT_STD, "o_proj": residual_scale, "down_proj": residual_scale}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                    continue
                scale = scales.get(name.split(".")[-2], 1.0)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (std * scale))

    def hidden_states(
        self,
        token_ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        attend: Attend = attend_causally,
        run_layer: RunLayer = run_layer,
    ) -> Tensor:
        """Run all layers and the last norm: (B, T) ids -> (B, T, D). Positions count from 0 unless given."""
        x_BTD = self.model.embed_tokens(token_ids_BT)
        if positions_BT is None:
            positions_BT = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device).unsqueeze(0)
        cos_BTE, sin_BTE = (table_PE[positions_BT].to(x_BTD.dtype) for table_PE in self.rope)
        for layer in self.model.layers:
            x_BTD = run_layer(layer, x_BTD, cos_BTE, sin_BTE, attend)
        return self.model.norm(x_BTD)  # type: ignore[no-any-return]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores of every next token: (..., D) -> (..., V)."""
        return self.lm_head(hidden_BTD)  # type: ignore[no-any-return]

    def forward(
        self, token_ids_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend = attend_causally
    ) -> Tensor:
        """Return logits (B, T, V) in the weights' dtype."""
        return self.logits(self.hidden_states(token_ids_BT, positions_BT, attend))
