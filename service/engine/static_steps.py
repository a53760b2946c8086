"""Steps of a fixed shape, so that a GPU can replay them: launching each operation anew takes longer than computing it.

A step of N rows reads ids, slots and positions from buffers that stay where they are, and every row looks at the first
S positions of its own slot; N and S are rounded up to a few sizes. On CUDA each is captured once as a graph, and one
launch replays it. Larger steps, pieces of prompts mostly, are launched as ever.

Shape letters: N rows of a step, S positions looked at, R slots, H query heads, K key-value heads, G query heads of one
key-value head, P positions of a slot, E head_dim, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from service.engine.kv_cache import KVCache, Span
from service.engine.network import TorchNetwork, positions_of
from shared.model import SmolLM2

log = logging.getLogger(__name__)

SHORTEST = 256
"""Positions of the smallest step; the next ones look at twice as many."""

Compute = Callable[[], Tensor]
Capture = Callable[[Compute], Compute]
"""Makes a function that does again, on the same buffers, what its argument does."""


class StaticAttention:
    """The `Attend` of a step whose slots and positions (N,) stand in tensors. Rows see those of their slot before."""

    def __init__(self, cache: KVCache, slots_N: Tensor, positions_N: Tensor, num_positions: int) -> None:
        self.cache, self.slots_N, self.num_positions = cache, slots_N, num_positions
        num_heads, length = cache.config.num_key_value_heads, cache.slot_length
        heads_K1 = torch.arange(num_heads, device=slots_N.device).unsqueeze(1)
        self.places_KN = (slots_N * num_heads + heads_K1) * length + positions_N
        is_seen_NS = torch.arange(num_positions, device=slots_N.device) <= positions_N.unsqueeze(1)
        mask_NS = torch.zeros(is_seen_NS.shape, dtype=cache.dtype, device=slots_N.device)
        self.mask_N11S = mask_NS.masked_fill(~is_seen_NS, -torch.inf)[:, None, None]

    def __call__(self, layer: int, queries_1HNE: Tensor, keys_1KNE: Tensor, values_1KNE: Tensor, /) -> Tensor:
        """Write the layer's new keys and values, then look: the weighted values, shaped like the queries."""
        seen: list[Tensor] = []  # keys and values, (N, K, S, E)
        for cached_RKPE, new_1KNE in zip(self.cache.numbers_L2RKPE[layer], (keys_1KNE, values_1KNE), strict=True):
            cached_RKPE.flatten(0, 2).index_copy_(0, self.places_KN.flatten(), new_1KNE.flatten(0, 2))
            seen.append(cached_RKPE[:, :, : self.num_positions].index_select(0, self.slots_N))
        keys_NKSE, values_NKSE = seen
        queries_KGNE = queries_1HNE.view(keys_NKSE.shape[1], -1, *queries_1HNE.shape[2:])
        queries_NKGE = queries_KGNE.permute(2, 0, 1, 3)
        mixed_NKGE = F.scaled_dot_product_attention(queries_NKGE, keys_NKSE, values_NKSE, attn_mask=self.mask_N11S)
        return mixed_NKGE.flatten(1, 2).transpose(0, 1).unsqueeze(0)


class StaticStep:
    """A step of N rows that look at S positions."""

    def __init__(self, model: SmolLM2, cache: KVCache, num_rows: int, num_positions: int, capture: Capture) -> None:
        self.spare_slot = cache.num_slots
        self.inputs_3N = torch.zeros(3, num_rows, dtype=torch.int64, device=model.device)
        self.inputs_3N[1] = self.spare_slot

        def compute() -> Tensor:
            ids_N, slots_N, positions_N = self.inputs_3N
            attend = StaticAttention(cache, slots_N, positions_N, num_positions)
            hidden_1ND = model.hidden_states(ids_N.unsqueeze(0), positions_N.unsqueeze(0), attend)
            return model.logits(hidden_1ND[0])

        self.compute = capture(compute)

    def run(self, token_ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the scores (n, V) behind each of n <= N tokens. Good until the next run."""
        count = len(token_ids)
        # Rows that nobody asked for write where nobody looks.
        unasked = [0] * (self.inputs_3N.shape[1] - count)
        unasked_slots = [self.spare_slot] * len(unasked)
        given_3N = torch.tensor([[*token_ids, *unasked], [*slots, *unasked_slots], [*positions, *unasked]])
        self.inputs_3N.copy_(given_3N)
        return self.compute()[:count]


class StaticSteps:
    """The steps of one cache: one of every size."""

    def __init__(self, model: SmolLM2, cache: KVCache, capture: Capture) -> None:
        self.row_sizes, self.position_sizes = doubling(1, cache.num_slots), doubling(SHORTEST, cache.slot_length)
        self.by_size = {
            (num_rows, num_positions): StaticStep(model, cache, num_rows, num_positions, capture)
            for num_rows in reversed(self.row_sizes)  # the largest first: the others fit into its memory
            for num_positions in reversed(self.position_sizes)
        }

    def find(self, num_rows: int, num_positions: int) -> StaticStep | None:
        """Return the smallest step that holds so many rows and positions; None where no step holds so many rows."""
        if num_rows > self.row_sizes[-1]:
            return None
        rows, positions = (
            next(size for size in sizes if size >= wanted)
            for sizes, wanted in ((self.row_sizes, num_rows), (self.position_sizes, num_positions))
        )
        return self.by_size[rows, positions]


class StaticNetwork(TorchNetwork):
    """PyTorch in steps of a few fixed shapes, captured ahead."""

    spare_slots = 1

    def __init__(self, model: SmolLM2, new_capture: Callable[[], Capture] | None = None) -> None:
        """`new_capture` makes, for each cache, what makes steps quick to repeat; by default they become CUDA graphs."""
        super().__init__(model)
        self.new_capture = new_capture or functools.partial(GraphCapture, model.device)
        self.steps_of: WeakKeyDictionary[KVCache, StaticSteps] = WeakKeyDictionary()
        """A graph reads and writes the memory that it was captured with, so every cache has its own."""

    def prepare(self, cache: KVCache) -> None:
        """Capture a step of every size; where that fails, say so and launch every operation by itself."""
        started_s = time.monotonic()
        try:
            with torch.inference_mode():
                steps = StaticSteps(self.model, cache, self.new_capture())
        except RuntimeError as error:
            log.warning("steps cannot be captured, so every operation is launched by itself: %s", str(error)[:300])
            return
        self.steps_of[cache] = steps
        log.info(
            "captured %d steps of up to %d rows and %d positions in %.1f s",
            len(steps.by_size),
            steps.row_sizes[-1],
            steps.position_sizes[-1],
            time.monotonic() - started_s,
        )

    def scores(self, cache: KVCache, token_ids: Sequence[int], spans: Sequence[Span], places: Sequence[int]) -> Tensor:
        steps = self.steps_of.get(cache)
        step = None if steps is None else steps.find(len(token_ids), max(span.end for span in spans))
        if step is None:
            return super().scores(cache, token_ids, spans, places)
        slots = [span.slot for span in spans for _ in range(span.count)]
        scores_NV = step.run(token_ids, slots, positions_of(spans))
        return scores_NV if len(places) == len(token_ids) else scores_NV[list(places)]


def doubling(first: int, last: int) -> list[int]:
    """Return `first`, twice that and so on, and at the end `last` itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]


class GraphCapture:
    """Captures the steps of one cache as CUDA graphs in one pool of memory, as no two run at once.

    PyTorch frees a pool with its last graph, and then asserts that none is captured into it. Not yet run on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool: Any = None

    def __call__(self, compute: Compute) -> Compute:
        """Run a step as often as its libraries need to settle, then record it."""
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):  # its device is the current one; left again whatever happens
            for _ in range(2):
                compute()
            graph = torch.cuda.CUDAGraph()
            # What a capture forbids, it is to forbid this thread alone: models load while another thread serves.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = compute()
        outer.wait_stream(self.stream)
        self.pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
