"""Where the keys and values of all slots lie in memory: as PyTorch's attention reads them, or as the kernels do.

Shape letters: L layers, 2 keys and values, R slots, K key-value heads, P positions of a slot, E head_dim; a slot of C
blocks of B positions each.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from service.engine.slot_memory import SlotMemory
from shared.config import ModelConfig

BLOCK_LENGTH = 64
"""Positions of a block; `cache_and_queries.h` knows it too. At 135M a block takes 1.4 MiB: about a huge page."""


class Layout(Protocol):
    """Memory for R slots of P positions."""

    numbers: Tensor
    block_length: int
    """Positions that are taken and given back together."""

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Give one slot the first keys and values of another; behind them, up to the end of a block, anything."""

    def empty(self, slot: int, first: int, last: int) -> None:
        """Return to the system what positions [first, last) of a slot hold, as far as it lies by itself."""


class WholeSlots:
    """(L, 2, R, K, P, E): each head of a layer sees its positions in one piece."""

    block_length = 1

    def __init__(
        self, config: ModelConfig, num_slots: int, slot_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, 2, num_slots, heads, slot_length, size)
        # A huge page would take 2 MiB for the first token of each layer, slot and head.
        self.memory = SlotMemory(shape, dtype, device, huge_pages=False)
        self.numbers = self.memory.tensor

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        self.numbers[:, :, target, :, :num_tokens] = self.numbers[:, :, source, :, :num_tokens]

    def empty(self, slot: int, first: int, last: int) -> None:
        for keys_or_values_RKPE in self.numbers.flatten(0, 1):
            for head_PE in keys_or_values_RKPE[slot]:
                self.memory.empty(head_PE[first:last])


class BlockedSlots:
    """(R, C, L, 2, K, B, E): all that belongs to 64 tokens lies together, so huge pages hold nothing else.

    How keys lie in a block is the kernels' own affair: not every level has one position after the other.

    In `WholeSlots` a step of 32 sequences touches 17,000 small pages, and waits for the processor to find each.
    """

    block_length = BLOCK_LENGTH

    def __init__(
        self, config: ModelConfig, num_slots: int, slot_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_blocks = -(-slot_length // BLOCK_LENGTH)
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (num_slots, num_blocks, config.num_hidden_layers, 2, heads, BLOCK_LENGTH, size)
        self.memory = SlotMemory(shape, dtype, device, huge_pages=True)
        self.numbers = self.memory.tensor

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // BLOCK_LENGTH)  # whole: some kernels mix the positions of a block
        self.numbers[target, :num_blocks] = self.numbers[source, :num_blocks]

    def empty(self, slot: int, first: int, last: int) -> None:
        self.memory.empty(self.numbers[slot, -(-first // BLOCK_LENGTH) : -(-last // BLOCK_LENGTH)])
