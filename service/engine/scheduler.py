"""Which tokens the next step computes: one of every decoding sequence, and a bounded number of prompt tokens.

Sequences start in the order they came. Room for prompt and completion is reserved before a sequence starts, so one
that runs never has to make way; one that does not fit waits, and those behind it wait with it. What begins as another
sequence did is copied instead of computed; where that one is still at it, it is waited for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.engine.drafting import FORCED
from service.engine.drafting import MOST as MOST_DRAFTS
from service.engine.kv_cache import KVCache, Span
from service.engine.pace import Pace
from service.engine.prefixes import SHORTEST, Prefixes
from service.engine.sequence import Sequence

FIRST_BUDGET = 16
"""Prompt tokens beside streams in the first such step."""
LEAST_PROMPT_TOKENS = 8
"""However slow each is: a prompt must come to its end."""


@dataclass(slots=True, eq=False)
class Work:
    """Tokens of one sequence to compute in this step."""

    sequence: Sequence
    span: Span
    drafts: tuple[int, ...] = ()
    """Guesses of what comes next, computed behind the known tokens; `span` covers them too."""
    num_known: int = field(init=False)
    """Tokens of the sequence, from its first on, that are computed after this step, guesses aside."""
    is_complete: bool = field(init=False)
    """Whether the next token can be drawn after it."""
    num_scored: int = field(init=False)
    """Tokens whose successor stands in a prompt that is to be scored."""
    num_scores: int = field(init=False)
    """Tokens, the last of the span, whose successor's scores are wanted: `num_scored`, then the last known one and
    every guess."""

    def __post_init__(self) -> None:
        sequence, end = self.sequence, self.span.end
        self.num_known = end - len(self.drafts)
        self.is_complete = self.num_known == sequence.num_tokens
        self.num_scored = 0
        if sequence.prompt_scores is not None:
            self.num_scored = max(0, min(end, len(sequence.prompt_ids) - 1) - self.span.start)
        self.num_scores = self.num_scored + (1 + len(self.drafts) if self.is_complete else 0)

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.tokens(self.span.start, self.num_known - self.span.start), *self.drafts]


class Scheduler:
    """Waiting and running sequences."""

    def __init__(
        self,
        cache: KVCache,
        *,
        prefill_chunk: int,
        pace: Pace,
        busy_prefill_chunk: int | None = None,
        share_prefixes: bool = True,
    ) -> None:
        """Bound the prompt tokens of a step.

        Args:
            prefill_chunk: while nothing decodes.
            pace: says how many lengthen the step bearably for sequences that decode.
            busy_prefill_chunk: a fixed number instead; with many who decode twice their number, as a step that takes
                longer anyway hides more.
            share_prefixes: whether to copy what stands in the cache already.
        """
        assert prefill_chunk > 0 and (busy_prefill_chunk is None or busy_prefill_chunk > 0)
        self.cache = cache
        self.prefill_chunk = prefill_chunk
        self.busy_prefill_chunk = busy_prefill_chunk
        self.pace = pace
        self.share_prefixes = share_prefixes
        self.prefixes = Prefixes(cache)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_shared_tokens = 0
        self.last_budget = FIRST_BUDGET

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, waiting or running, and free its slot; what it holds stays of use."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.prefixes.write(sequence.slot, sequence.tokens(0, sequence.num_cached))
        self.cache.give(sequence.slot)
        sequence.slot = None

    def forget_prefixes(self) -> None:
        """Hold no beginnings of ended sequences."""
        self.prefixes = Prefixes(self.cache)
        self.num_shared_tokens = 0

    def plan(self) -> list[Work]:
        """Return the next step's work: single tokens first, ordered by slot, then pieces of prompts."""
        self.start_waiting()
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for one in self.running:
            # One that waited may copy all but its last token here, and decodes then.
            if one.num_missing > 1 and self.waits_for_another(one):
                continue
            (decoding if one.num_missing == 1 else prefilling).append(one)
        counts = dict.fromkeys(decoding, 1)
        budget = self.prompt_budget(len(decoding), position=max((one.num_cached for one in prefilling), default=0))
        if prefilling and decoding:
            self.last_budget = budget
        counts |= share(prefilling, budget)
        work = [
            self.work_on(sequence, sequence.slot, count, len(decoding))
            for sequence in self.running
            if sequence.slot is not None and (count := counts.get(sequence))
        ]
        return sorted(work, key=lambda item: (item.span.count > 1, item.span.slot))

    def prompt_budget(self, num_decoding: int, position: int) -> int:
        """Prompt tokens of a step beside so many who decode, where the longest prompt has come to that position."""
        if not num_decoding:
            return self.prefill_chunk
        if self.busy_prefill_chunk is not None:
            return max(self.busy_prefill_chunk, 2 * num_decoding)
        # Twice the last number at most: a pace learnt from steps all alike can be far off, and is put right on the way.
        bearable = min(self.pace.prompt_tokens_beside(num_decoding, position), 2 * self.last_budget, self.prefill_chunk)
        return max(bearable, LEAST_PROMPT_TOKENS)

    def work_on(self, sequence: Sequence, slot: int, count: int, num_decoding: int) -> Work:
        drafts = self.guess(sequence, num_decoding) if sequence.num_missing == 1 else ()
        return Work(sequence, Span(slot, sequence.num_cached, count + len(drafts)), drafts)

    def guess(self, sequence: Sequence, num_decoding: int) -> tuple[int, ...]:
        """Return what probably comes next, where computing it at once saves time."""
        most = sequence.max_new_tokens - len(sequence.completion_ids) - 1
        if sequence.drafter is None or most <= 0:
            return ()
        if sequence.rules is not None:
            worth = self.pace.num_drafts_worth(num_decoding, FORCED, min(most, MOST_DRAFTS), sequence.num_tokens)
            if forced := tuple(sequence.rules.forced()[:worth]):
                return forced
        return sequence.drafter.guess(self.pace, num_decoding, most)

    def start_waiting(self) -> None:
        while self.waiting and self.start(self.waiting[0]):
            self.running.append(self.waiting.popleft())

    def start(self, sequence: Sequence) -> bool:
        """Give a sequence a slot, with what it shares with others; False while there is no room."""
        ids = np.array(sequence.tokens(0, sequence.num_tokens), dtype=np.int64)
        may_copy = self.share_prefixes and sequence.prompt_scores is None  # scores come of computing alone
        match = self.prefixes.find(ids, self.computed()) if may_copy else None
        if match is not None:
            self.prefixes.touch(match.slot)
        slot = self.cache.take(
            sequence.cost,
            choose=lambda free: self.prefixes.choose_slot(free, match),
            oldest_first=self.prefixes.used_at.__getitem__,
        )
        if slot is None:
            return False
        sequence.slot = slot
        if match is not None and match.slot != slot and self.cache.touched[match.slot] >= match.count:
            self.cache.copy(match.slot, slot, match.count)
        elif match is None or match.slot != slot:  # none, or emptied to make room
            match = None
        self.adopt(sequence, 0 if match is None else match.count)
        self.prefixes.write(slot, ids.tolist())
        return True

    def adopt(self, sequence: Sequence, count: int) -> None:
        """Note that the first tokens of a sequence need no computing."""
        self.num_shared_tokens += count - sequence.num_shared
        sequence.num_cached = sequence.num_shared = count

    def computed(self) -> list[tuple[int, int]]:
        """Slots and how many of their tokens' keys and values can be read."""
        running = {sequence.slot: sequence.num_cached for sequence in self.running}
        return [(slot, running.get(slot, touched)) for slot, touched in enumerate(self.cache.touched) if touched]

    def waits_for_another(self, sequence: Sequence) -> bool:
        """Whether a sequence that came before is just computing the beginning of this one's tokens.

        When that is over, what stands there is copied. The first of those who prefill never waits, so all get on.
        """
        if not self.share_prefixes or sequence.num_cached > sequence.num_shared or sequence.slot is None:
            return False  # has begun by itself
        if sequence.prompt_scores is not None:
            return False  # must compute all of it
        head = sequence.tokens(0, SHORTEST)
        ids: NDArray[np.int64] = self.prefixes.ids_RP[sequence.slot, : sequence.num_tokens]
        for other in self.running:
            if other is sequence:
                break
            if other.num_missing > 1 and other.slot is not None and other.tokens(0, SHORTEST) == head:
                common = min(self.prefixes.common(other.slot, ids), len(ids) - 1)
                if common > max(other.num_cached, sequence.num_cached, SHORTEST):
                    sequence.is_following = True
                    return True
        if sequence.is_following:
            sequence.is_following = False
            others = [(slot, count) for slot, count in self.computed() if slot != sequence.slot]
            match = self.prefixes.find(ids, others)
            if match is not None and match.count > sequence.num_cached:
                self.cache.copy(match.slot, sequence.slot, match.count)
                self.adopt(sequence, match.count)
        return False


def share(prefilling: list[Sequence], budget: int) -> dict[Sequence, int]:
    """Divide a step's prompt tokens.

    Half belongs to the sequence that came first, so that a long prompt goes on; the rest goes to the shortest first,
    so that a short prompt does not wait behind a long one. What they leave is the first one's too.
    """
    if not prefilling:
        return {}
    first, *others = prefilling
    counts = {first: min(first.num_missing, (budget + 1) // 2)}
    left = budget - counts[first]
    for sequence in sorted(others, key=lambda other: other.num_missing):
        if not left:
            break
        counts[sequence] = min(sequence.num_missing, left)
        left -= counts[sequence]
    counts[first] = min(first.num_missing, counts[first] + left)
    return counts
