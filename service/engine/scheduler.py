"""Which tokens the next step computes: one of every decoding sequence, and a bounded number of prompt tokens.

Sequences start in the order they came. Room for prompt and completion is reserved before a sequence starts, so one
that runs never has to make way; one that does not fit waits, and those behind it wait with it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from service.engine.kv_cache import KVCache, Span
from service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one sequence to compute in this step."""

    sequence: Sequence
    span: Span
    drafts: tuple[int, ...] = ()
    """Guesses of what comes next, computed behind the known tokens; `span` covers them too."""

    @property
    def num_known(self) -> int:
        """Tokens of the sequence, from its first on, that are computed after this step, guesses aside."""
        return self.span.end - len(self.drafts)

    @property
    def is_complete(self) -> bool:
        """Whether the next token can be drawn after it."""
        return self.num_known == self.sequence.num_tokens

    @property
    def num_scores(self) -> int:
        """Tokens whose successor's scores are wanted: the last known one and every guess."""
        return 1 + len(self.drafts) if self.is_complete else 0

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.tokens(self.span.start, self.num_known - self.span.start), *self.drafts]


class Scheduler:
    """Waiting and running sequences."""

    def __init__(self, cache: KVCache, *, prefill_chunk: int, busy_prefill_chunk: int) -> None:
        """Bound the prompt tokens of a step.

        Args:
            prefill_chunk: while nothing decodes.
            busy_prefill_chunk: while sequences decode, which wait for them; with many of them twice their number,
                as a step that takes longer anyway hides more.
        """
        assert prefill_chunk > 0 and busy_prefill_chunk > 0, (prefill_chunk, busy_prefill_chunk)
        self.cache = cache
        self.prefill_chunk = prefill_chunk
        self.busy_prefill_chunk = busy_prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, waiting or running, and free its slot."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.cache.give(sequence.slot)
        sequence.slot = None

    def plan(self) -> list[Work]:
        """Return the next step's work: single tokens first, ordered by slot, then pieces of prompts."""
        self.start_waiting()
        counts = {sequence: 1 for sequence in self.running if sequence.num_missing == 1}
        prefilling = [sequence for sequence in self.running if sequence.num_missing > 1]
        budget = max(self.busy_prefill_chunk, 2 * len(counts)) if counts else self.prefill_chunk
        counts |= share(prefilling, budget)
        work = [
            Work(sequence, Span(sequence.slot, sequence.num_cached, count))
            for sequence in self.running
            if sequence.slot is not None and (count := counts.get(sequence))
        ]
        return sorted(work, key=lambda item: (item.span.count > 1, item.span.slot))

    def start_waiting(self) -> None:
        while self.waiting and (slot := self.cache.take(self.waiting[0].cost)) is not None:
            sequence = self.waiting.popleft()
            sequence.slot = slot
            self.running.append(sequence)


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
