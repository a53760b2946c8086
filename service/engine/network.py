"""What computes a step's scores: the protocol, and PyTorch's way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from service.engine.attention import StepAttention
from service.engine.kv_cache import KVCache, Span
from shared.drawing import Candidates, draw_all
from shared.model import SmolLM2
from shared.sampling import SamplingParams


class Network(Protocol):
    """Scores of the next tokens, given the new tokens of a step."""

    wants_blocks: bool
    """How its cache must lie in memory: see `layouts`."""
    spare_slots: int
    """Slots that its cache has beside those of sequences."""

    def prepare(self, cache: KVCache) -> None:
        """Do once what the first steps on this cache would wait for."""

    def scores(self, cache: KVCache, token_ids: Sequence[int], spans: Sequence[Span], places: Sequence[int]) -> Tensor:
        """Compute the tokens of `spans`, one span after the other; write their keys and values into the cache.

        Returns:
            (B, V): what may follow each token in `places`, which counts in `token_ids`. Good until the next call.
        """

    def draw(
        self, rows: Sequence[Candidates], params: Sequence[SamplingParams], quantiles: Sequence[float]
    ) -> list[int]:
        """Draw a token from each row as `shared.drawing.draw_all` does."""


class TorchNetwork:
    """The network as PyTorch computes it, on any device and in any dtype; in fp32 it is the oracle's own."""

    wants_blocks = False
    spare_slots = 0

    def __init__(self, model: SmolLM2) -> None:
        self.model = model

    def prepare(self, cache: KVCache) -> None:
        """Nothing waits."""

    def scores(self, cache: KVCache, token_ids: Sequence[int], spans: Sequence[Span], places: Sequence[int]) -> Tensor:
        device = self.model.device
        ids_1N = torch.tensor([token_ids], device=device)
        positions_1N = torch.tensor([positions_of(spans)], device=device)
        hidden_ND = self.model.hidden_states(ids_1N, positions_1N, StepAttention(cache, spans))[0]
        return self.model.logits(hidden_ND if len(places) == len(token_ids) else hidden_ND[list(places)])

    def draw(
        self, rows: Sequence[Candidates], params: Sequence[SamplingParams], quantiles: Sequence[float]
    ) -> list[int]:
        return draw_all(rows, params, quantiles)


def positions_of(spans: Sequence[Span]) -> list[int]:
    """Return where in its sequence each token of a step stands."""
    return [position for span in spans for position in range(span.start, span.end)]
