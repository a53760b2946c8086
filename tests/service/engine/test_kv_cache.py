"""Slots: reserved, waited for, given back, and never more memory than allowed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.engine.kv_cache import KVCache
from service.engine.layouts import BLOCK_LENGTH, WholeSlots
from shared.config import ModelConfig
from tests.tiny import TINY

CPU = torch.device("cpu")


def cache_of(
    num_slots: int = 4, max_cached_tokens: int = 300, config: ModelConfig = TINY, *, in_blocks: bool = False
) -> KVCache:
    return KVCache(
        config,
        num_slots=num_slots,
        max_cached_tokens=max_cached_tokens,
        dtype=torch.float32,
        device=CPU,
        in_blocks=in_blocks,
    )


def tokens_of(cache: KVCache, slot: int, first: int, last: int) -> Tensor:
    """See keys and values of positions [first, last) of a slot that lie within one block."""
    if isinstance(cache.layout, WholeSlots):
        return cache.numbers_L2RKPE[:, :, slot, :, first:last]
    block, start = divmod(first, BLOCK_LENGTH)
    return cache.numbers_RCL2KBE[slot, block, ..., start : start + last - first, :]


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_slot_is_given_anothers_first_tokens_and_no_more_blocks(in_blocks: bool) -> None:
    cache = cache_of(in_blocks=in_blocks)
    for position in range(256):
        tokens_of(cache, 1, position, position + 1).fill_(position + 1.0)
    cache.copy(1, 3, 150)
    copied = 192 if in_blocks else 150  # whole blocks
    for position in range(256):
        expected = position + 1.0 if position < copied else 0.0
        assert (tokens_of(cache, 3, position, position + 1) == expected).all()
    assert not tokens_of(cache, 2, 0, 64).any()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not given back")
def test_blocks_are_given_back_whole_behind_what_is_kept() -> None:
    cache = cache_of(num_slots=2, in_blocks=True)
    cache.numbers_RCL2KBE.fill_(1.0)
    cache.layout.empty(0, 70, 256)  # the block of 64 to 127 stays
    cache.layout.empty(1, 0, 256)
    for first in (0, 64):
        assert (tokens_of(cache, 0, first, first + 64) == 1.0).all()
    for first in (128, 192):
        assert (tokens_of(cache, 0, first, first + 64) == 0.0).any()
    assert cache.bytes_per_token == tokens_of(cache, 0, 0, 1).numel() * 4


def test_slots_and_tokens_are_both_bounds() -> None:
    cache = cache_of()
    assert [cache.take(100), cache.take(100)] == [0, 1]
    assert cache.take(101) is None
    assert cache.take(100) == 2
    assert (cache.free_slots, cache.free_tokens) == (1, 0)
    cache.give(1)
    assert [cache.take(40), cache.take(40)] == [1, 3]
    assert cache.take(1) is None
    assert cache.free_slots == 0


def test_memory_in_blocks_is_counted_in_blocks() -> None:
    cache = cache_of(num_slots=3, max_cached_tokens=300, in_blocks=True)
    first, _, third = taken(cache, 1), taken(cache, 130), taken(cache, 160)
    assert cache.num_needed == 64 + 192 + 192
    assert cache.num_needed <= cache.most_needed == 300 + 3 * 63
    for slot in (first, third):
        cache.give(slot)
    assert cache.num_needed == 64 + 192 + 192  # kept for who begins alike
    cache.take(65, choose=lambda free: free[0])
    assert cache.num_needed == 128 + 192, "what nobody needs makes way"


def test_a_slot_is_no_longer_than_the_context_or_the_cache() -> None:
    assert cache_of(max_cached_tokens=5_000).slot_length == TINY.max_position_embeddings
    assert cache_of(max_cached_tokens=100).slot_length == 100


def test_bytes_per_token_is_what_a_token_takes() -> None:
    cache = cache_of()
    assert cache.bytes_per_token == cache.numbers_L2RKPE[:, :, 0, :, 0].numel() * 4


def taken(cache: KVCache, num_tokens: int) -> int:
    slot = cache.take(num_tokens)
    assert slot is not None
    return slot


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4_096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_follows_the_tokens_written_and_stays_below_the_bound() -> None:
    cache = cache_of(
        num_slots=16,
        max_cached_tokens=16_384,
        config=dataclasses.replace(
            TINY, max_position_embeddings=8_192, num_hidden_layers=4, num_attention_heads=2, hidden_size=128
        ),
    )
    bound = cache.max_cached_tokens * cache.bytes_per_token
    assert cache.numbers_L2RKPE.nbytes >= 4 * bound > 4 * 64e6
    before = resident_bytes()
    for turn in range(4):  # other slots each time, so that without giving back all of them would fill up
        slots = [taken(cache, 64) for _ in range(turn % 4)] + [taken(cache, 7_000) for _ in range(2)]
        for slot in slots:
            cache.numbers_L2RKPE[:, :, slot, :, : cache.reserved[slot]] = slot + 1.0
        assert resident_bytes() - before < 1.2 * bound
        for slot in slots:
            assert (cache.numbers_L2RKPE[:, :, slot, :, : cache.reserved[slot] : 97] == slot + 1.0).all()
            cache.give(slot)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not given back")
def test_giving_memory_back_empties_only_what_nobody_reserved() -> None:
    cache = cache_of(num_slots=3, max_cached_tokens=600)
    kept, freed = taken(cache, 200), taken(cache, 256)
    cache.numbers_L2RKPE.fill_(1.0)
    cache.give(freed)
    again = taken(cache, 100)
    other = taken(cache, 256)  # one more slot than the bound allows to stay warm
    assert (again, other) == (freed, 2)
    numbers = cache.numbers_L2RKPE
    assert (numbers[:, :, kept, :, :200] == 1.0).all()
    assert (numbers[:, :, again, :, :100] == 1.0).all()
    assert (numbers[:, :, again, :, 160:] == 0.0).any()
