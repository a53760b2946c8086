"""What stands in the slots, so that a prompt which begins as another did is not computed again.

A slot's keys and values stay readable after its sequence ended, until another one needs the slot or its memory. A new
sequence copies the longest beginning it shares with any slot, running or free: 23 KB a token in bf16, some thousand
times faster than computing it. Keys depend on the tokens before them alone, so a copy is what computing would give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine.kv_cache import KVCache

SHORTEST = 8
"""Fewer tokens are computed sooner than looked after."""


@dataclass(frozen=True, slots=True)
class Match:
    """The first `count` tokens of a sequence stand in `slot`."""

    slot: int
    count: int


class Prefixes:
    """The token ids behind the keys and values of every slot."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.ids_RP: NDArray[np.int64] = np.full((cache.num_slots, cache.slot_length), -1, dtype=np.int64)
        self.used_at = [0] * cache.num_slots
        self.clock = 0

    def write(self, slot: int, token_ids: Sequence[int]) -> None:
        """Note the tokens a slot holds or will hold; what is beyond them is unknown."""
        self.ids_RP[slot, : len(token_ids)] = token_ids
        self.ids_RP[slot, len(token_ids) :] = -1
        self.touch(slot)

    def touch(self, slot: int) -> None:
        """Note that a slot was of use just now."""
        self.clock += 1
        self.used_at[slot] = self.clock

    def common(self, slot: int, token_ids: NDArray[np.int64]) -> int:
        """Tokens from the first on that a slot's, computed or to come, share with these."""
        equal = self.ids_RP[slot, : len(token_ids)] == token_ids
        return len(token_ids) if equal.all() else int(equal.argmin())

    def find(self, token_ids: NDArray[np.int64], computed: Iterable[tuple[int, int]]) -> Match | None:
        """Return the longest beginning of `token_ids` among slots of which so many tokens are computed.

        At least the last token is left to compute: its scores are wanted.
        """
        best: Match | None = None
        for slot, num_computed in computed:
            count = min(self.common(slot, token_ids), num_computed, len(token_ids) - 1)
            if count >= SHORTEST and (best is None or count > best.count):
                best = Match(slot, count)
        return best

    def choose_slot(self, free: Sequence[int], match: Match | None) -> int:
        """Return the free slot whose loss hurts least: continued whole, empty, else the longest unused."""

        def loss(slot: int) -> tuple[bool, int, int]:
            kept = match.count if match is not None and match.slot == slot else 0
            lost = self.cache.touched[slot] > 0 and int((self.ids_RP[slot] >= 0).sum()) > kept
            return lost, self.used_at[slot] if lost else -kept, slot

        return min(free, key=loss)
