"""How a step's tokens look at the cache: the `Attend` that the network is given for serving.

The tokens of all sequences go through the network as one row, so every weight is read once. Only here they part:
sequences with one new token each attend in one operation over a view of their slots, pieces of prompts one by one.

Shape letters: N tokens of the step, R slots of a group, T new tokens of one sequence, S tokens looked at, H query
heads, K key-value heads, G query heads of one key-value head, E head_dim, P positions of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.engine.kv_cache import KVCache, Span

CALL_COST = 512
"""An operation of its own costs as much as reading this many tokens' keys and values of one layer (about 15 us)."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with one new token each that look at slots [low, high) in one operation."""

    tokens: slice
    low: int
    high: int
    length: int
    """Tokens of the longest."""
    token_of_slot: Tensor | None
    """Where some slots in between have no token: which token stands in for each slot (any, for those)."""
    slot_of_token: Tensor | None
    mask_R11S: Tensor | None
    """None where all are equally long."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several new tokens of one sequence."""

    tokens: slice
    slot: int
    end: int
    mask_TS: Tensor | None
    """None where the chunk begins the sequence: plainly causal."""


class StepAttention:
    """The `Attend` of one step. Of `spans`, those of one token come first, ordered by slot."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.device, self.dtype = cache.numbers_L2RKPE.device, cache.numbers_L2RKPE.dtype
        singles = [span for span in spans if span.count == 1]
        assert singles == sorted(spans[: len(singles)]), "single tokens come first, ordered by slot"
        self.places_KN = self.places(spans)
        self.groups = [self.group(singles[tokens], tokens) for tokens in split(singles)]
        self.chunks = []
        token = len(singles)
        for span in spans[len(singles) :]:
            self.chunks.append(self.chunk(span, token))
            token += span.count

    def places(self, spans: Sequence[Span]) -> Tensor:
        """Return where the keys of each head and token go among a layer's rows of E numbers."""
        num_heads, length = self.cache.config.num_key_value_heads, self.cache.slot_length
        of_first_head = [
            span.slot * num_heads * length + position for span in spans for position in range(span.start, span.end)
        ]
        return (torch.arange(num_heads).unsqueeze(1) * length + torch.tensor(of_first_head)).to(self.device)

    def group(self, spans: Sequence[Span], tokens: slice) -> Group:
        low, high = spans[0].slot, spans[-1].slot + 1
        length = max(span.end for span in spans)
        slots = [span.slot - low for span in spans]
        token_of_slot = slot_of_token = mask_R11S = None
        if len(slots) < high - low:
            stand_in = [0] * (high - low)
            for token, slot in enumerate(slots):
                stand_in[slot] = token
            token_of_slot = torch.tensor(stand_in, device=self.device)
            slot_of_token = torch.tensor(slots, device=self.device)
        if any(span.end < length for span in spans):
            ends = [length] * (high - low)
            for slot, span in zip(slots, spans, strict=True):
                ends[slot] = span.end
            mask_R11S = self.mask(torch.arange(length) < torch.tensor(ends).view(-1, 1, 1, 1))
        return Group(tokens, low, high, length, token_of_slot, slot_of_token, mask_R11S)

    def chunk(self, span: Span, token: int) -> Chunk:
        mask_TS = None
        if span.start:
            mask_TS = self.mask(torch.arange(span.end) <= torch.arange(span.start, span.end).unsqueeze(1))
        return Chunk(slice(token, token + span.count), span.slot, span.end, mask_TS)

    def mask(self, visible: Tensor) -> Tensor:
        return torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, -torch.inf).to(self.device)

    def __call__(self, layer: int, queries_1HNE: Tensor, keys_1KNE: Tensor, values_1KNE: Tensor, /) -> Tensor:
        """Write the layer's new keys and values, then look: the weighted values, shaped like the queries."""
        keys_RKPE, values_RKPE = self.cache.numbers_L2RKPE[layer]
        for cached_RKPE, new_1KNE in ((keys_RKPE, keys_1KNE), (values_RKPE, values_1KNE)):
            cached_RKPE.flatten(0, 2).index_copy_(0, self.places_KN.flatten(), new_1KNE.flatten(0, 2))
        # The query heads that share keys become rows, or a batch, so that keys are not copied for each of them.
        queries_KGNE = queries_1HNE.view(keys_RKPE.shape[1], -1, *queries_1HNE.shape[2:])
        parts = [look(group, queries_KGNE, keys_RKPE, values_RKPE) for group in self.groups]
        parts += [look_back(chunk, queries_KGNE, keys_RKPE, values_RKPE) for chunk in self.chunks]
        mixed_NKGE = parts[0] if len(parts) == 1 else torch.cat(parts)
        return mixed_NKGE.flatten(1, 2).transpose(0, 1).unsqueeze(0)


def look(group: Group, queries_KGNE: Tensor, keys_RKPE: Tensor, values_RKPE: Tensor) -> Tensor:
    """Attend with one token each of several sequences."""
    queries_RKGE = queries_KGNE[:, :, group.tokens].permute(2, 0, 1, 3)
    if group.token_of_slot is not None:
        queries_RKGE = queries_RKGE[group.token_of_slot]
    mixed_RKGE = F.scaled_dot_product_attention(
        queries_RKGE,
        keys_RKPE[group.low : group.high, :, : group.length],
        values_RKPE[group.low : group.high, :, : group.length],
        attn_mask=group.mask_R11S,
    )
    return mixed_RKGE if group.slot_of_token is None else mixed_RKGE[group.slot_of_token]


def look_back(chunk: Chunk, queries_KGNE: Tensor, keys_RKPE: Tensor, values_RKPE: Tensor) -> Tensor:
    """Attend with several tokens of one sequence."""
    queries_GKTE = queries_KGNE[:, :, chunk.tokens].transpose(0, 1)
    shape = (queries_GKTE.shape[0], -1, -1, -1)
    mixed_GKTE = F.scaled_dot_product_attention(
        queries_GKTE,
        keys_RKPE[chunk.slot, :, : chunk.end].expand(shape),
        values_RKPE[chunk.slot, :, : chunk.end].expand(shape),
        attn_mask=chunk.mask_TS,
        is_causal=chunk.mask_TS is None,
    )
    return mixed_GKTE.permute(2, 1, 0, 3)


def split(singles: Sequence[Span]) -> list[slice]:
    """Divide spans, ordered by slot, into runs: each costs a call, and its longest length for every slot it covers."""
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first i spans, and where the last run among them begins
    for end in range(1, len(singles) + 1):
        length, choices = 0, []
        for start in range(end - 1, -1, -1):
            length = max(length, singles[start].end)
            width = singles[end - 1].slot + 1 - singles[start].slot
            choices.append((best[start][0] + CALL_COST + width * length, start))
        best.append(min(choices))
    runs, end = [], len(singles)
    while end:
        start = best[end][1]
        runs.append(slice(start, end))
        end = start
    return runs[::-1]
