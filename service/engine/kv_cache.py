"""Keys and values of every live sequence: one slot each, up to the model's context long, written in place.

Memory follows the tokens that were written, not the size of the slots, and is bounded by `max_cached_tokens` and what
rounding to blocks adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.layouts import BlockedSlots, Layout, WholeSlots
from shared.config import ModelConfig


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """Tokens [start, start + count) of the sequence in `slot`, computed in one step."""

    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class KVCache:
    """The slots of one model."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        max_cached_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        in_blocks: bool = False,
        spare_slots: int = 0,
    ) -> None:
        """Make room for `num_slots` sequences of together `max_cached_tokens` tokens, `in_blocks` for the kernels.

        `spare_slots` stand behind those of sequences, for what the network writes and nobody reads.
        """
        assert num_slots > 0 and max_cached_tokens > 0, (num_slots, max_cached_tokens)
        self.config = config
        self.num_slots = num_slots
        self.max_cached_tokens = max_cached_tokens
        self.slot_length = min(config.max_position_embeddings, max_cached_tokens)
        self.dtype = dtype
        kind = BlockedSlots if in_blocks else WholeSlots
        self.layout: Layout = kind(config, num_slots + spare_slots, self.slot_length, dtype, device)
        self.reserved: dict[int, int] = {}
        self.touched = [0] * num_slots  # tokens of each slot whose memory may be taken

    @property
    def numbers_L2RKPE(self) -> Tensor:
        """Keys and values as PyTorch's attention takes them, where they are not in blocks."""
        assert isinstance(self.layout, WholeSlots)
        return self.layout.numbers

    @property
    def numbers_RCL2KBE(self) -> Tensor:
        """Keys and values as the kernels take them."""
        assert isinstance(self.layout, BlockedSlots)
        return self.layout.numbers

    @property
    def bytes_per_token(self) -> int:
        config, size = self.config, self.dtype.itemsize
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size

    @property
    def free_slots(self) -> int:
        return self.num_slots - len(self.reserved)

    @property
    def reserved_tokens(self) -> int:
        return sum(self.reserved.values())

    @property
    def free_tokens(self) -> int:
        return self.max_cached_tokens - self.reserved_tokens

    @property
    def free(self) -> list[int]:
        """The free slots, lowest first."""
        return [slot for slot in range(self.num_slots) if slot not in self.reserved]

    def take(
        self, num_tokens: int, choose: Callable[[list[int]], int] = min, oldest_first: Callable[[int], int] = int
    ) -> int | None:
        """Reserve a slot for `num_tokens` tokens; None while there is no room.

        Args:
            choose: picks one of the free slots. The lowest, if nobody cares: those in use stay together, so that a step
                looks at few that are not.
            oldest_first: rank of a free slot; while memory is short, those of low rank are emptied first.
        """
        assert 0 < num_tokens <= self.slot_length, (num_tokens, self.slot_length)
        if not self.free_slots or num_tokens > self.free_tokens:
            return None
        slot = choose(self.free)
        self.reserved[slot] = num_tokens
        for other in [*sorted(self.free, key=oldest_first), *self.reserved]:
            if self.num_needed <= self.max_cached_tokens:
                break
            self.give_back_memory(other)
        self.touched[slot] = max(self.touched[slot], num_tokens)
        return slot

    @property
    def num_needed(self) -> int:
        """Tokens for which memory is taken or promised, in whole blocks."""
        length = self.layout.block_length
        needed = (max(touched, self.reserved.get(slot, 0)) for slot, touched in enumerate(self.touched))
        return sum(-(-num_tokens // length) * length for num_tokens in needed)

    @property
    def most_needed(self) -> int:
        """What `num_needed` never exceeds: every slot may begin a block that it does not fill."""
        return self.max_cached_tokens + self.num_slots * (self.layout.block_length - 1)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Give one slot the first keys and values of another; what stood behind them in the last block is lost."""
        self.layout.copy(source, target, num_tokens)

    def give(self, slot: int) -> None:
        """Free a slot. What it holds stays until others need it, for sequences that begin alike."""
        del self.reserved[slot]

    def give_back_memory(self, slot: int) -> None:
        """Return to the system what a free slot holds, or what lies behind the reservation of a used one."""
        kept, touched = self.reserved.get(slot, 0), self.touched[slot]
        if touched > kept:
            self.layout.empty(slot, kept, touched)
            self.touched[slot] = kept
