"""Stages: which source every window of every step comes from, exactly.

A window is one row of a batch. Inside a stage, row r goes to the source that is most urgently owed a window
(Tijdeman 1980, "The chairman assignment problem"): after any number of rows each source has had its exact share to
within one window, so shares are exact where a stage ends and even in between. Shares are rational, so the assignment
repeats with the period of their common denominator (10 rows for 0.4 / 0.3 / 0.3): any step is found at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError

MAX_PERIOD = 100_000
"""Finer shares than 1/100,000 are rounded to a fraction below this denominator."""

SUM_TOLERANCE = Fraction(1, 100_000)


@dataclass(frozen=True)
class Stage:
    """Steps start_step..end_step-1 draw their windows from `shares`: source -> share of the tokens."""

    name: str
    start_step: int
    end_step: int
    shares: Mapping[str, float]

    @property
    def num_steps(self) -> int:
        return self.end_step - self.start_step


@dataclass(frozen=True)
class Rows:
    """The rows of one step: which source each comes from, and its how-manieth window of that source it is."""

    sources_B: NDArray[np.int64]
    """Index into the curriculum's `sources`."""
    ordinals_B: NDArray[np.int64]
    """Counted over the whole run, from 0, per source."""


def validate_stages(stages: Sequence[Stage], num_steps: int, sources: Sequence[str]) -> None:
    """Check that the stages cover steps 0..num_steps-1 once, with shares of known sources that sum to 1.

    Raises:
        ConfigError: naming the stage and what is wrong with it.
    """
    expected = 0
    for stage in stages:
        if stage.start_step != expected:
            kind = "a gap" if stage.start_step > expected else "an overlap"
            raise ConfigError(
                f"stage {stage.name!r} starts at step {stage.start_step}, which leaves {kind}: "
                f"set start_step = {expected}"
            )
        if stage.num_steps <= 0:
            raise ConfigError(f"stage {stage.name!r} ends at step {stage.end_step}, not after it starts")
        for source, share in stage.shares.items():
            if source not in sources:
                raise ConfigError(f"stage {stage.name!r} draws from {source!r}; data.sources has {', '.join(sources)}")
            if not 0 < share <= 1:
                raise ConfigError(f"stage {stage.name!r} gives {source!r} the share {share}; it must lie in (0, 1]")
        total = sum(map(as_fraction, stage.shares.values()), Fraction())
        if abs(total - 1) > SUM_TOLERANCE:
            raise ConfigError(f"the shares of stage {stage.name!r} sum to {float(total):g}; they must sum to 1")
        expected = stage.end_step
    if expected != num_steps:
        raise ConfigError(
            f"the stages end at step {expected} and num_steps is {num_steps}; they must be equal: "
            "change both, in a copy of the recipe or with --set num_steps=... --set stages=..."
        )


def as_fraction(share: float) -> Fraction:
    """Return the decimal a person wrote: 0.3 is 3/10, not the nearest binary fraction."""
    return Fraction(repr(share))


def integer_shares(shares: Sequence[float]) -> list[int]:
    """Return whole numbers in the proportion of the shares; their sum is the period of the assignment."""
    fractions = [as_fraction(share) for share in shares]
    total = sum(fractions)
    fractions = [fraction / total for fraction in fractions]
    period = math.lcm(*(fraction.denominator for fraction in fractions))
    if period > MAX_PERIOD:
        counts = largest_remainder(fractions, MAX_PERIOD)
    else:
        counts = [int(fraction * period) for fraction in fractions]
    divisor = math.gcd(*counts)
    return [count // divisor for count in counts]


def largest_remainder(fractions: Sequence[Fraction], total: int) -> list[int]:
    """Round fractions of `total` to whole numbers that sum to it."""
    exact = [fraction * total for fraction in fractions]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def assign_period(counts: Sequence[int]) -> NDArray[np.int64]:
    """Spread sources over one period so that every prefix is within one window of its share (Tijdeman 1980).

    Args:
        counts: windows of each source per period.

    Returns:
        (period,) source indices; source i stands there counts[i] times.
    """
    period, n = sum(counts), len(counts)
    if n == 1:
        return np.zeros(period, dtype=np.int64)
    given = [0] * n
    assigned = np.empty(period, dtype=np.int64)
    # In units of 1 / ((2n - 2) * period), so that all is whole numbers: source i is owed counts[i] per row.
    slack = 2 * n - 2
    for row in range(period):
        owed = [slack * (counts[i] * (row + 1) - given[i] * period) for i in range(n)]
        eligible = [i for i in range(n) if owed[i] >= period]
        # Of those owed a window, the one whose next would come too late first.
        chosen = min(eligible, key=lambda i: Fraction(slack * period - period - owed[i], counts[i]))
        given[chosen] += 1
        assigned[row] = chosen
    return assigned


class StagePattern:
    """One stage's assignment: for any row, its source and how many windows of each source came before."""

    def __init__(self, stage: Stage, sources: Sequence[str]) -> None:
        names = list(stage.shares)
        local = assign_period(integer_shares([stage.shares[name] for name in names]))
        self.source_of_row = np.array([sources.index(name) for name in names], dtype=np.int64)[local]
        self.period = len(self.source_of_row)
        one_hot = self.source_of_row[:, None] == np.arange(len(sources))
        self.counts_before = np.vstack([np.zeros(len(sources), dtype=np.int64), one_hot.cumsum(axis=0)])

    def counts_through(self, num_rows: int) -> NDArray[np.int64]:
        """Windows of each source in the stage's first `num_rows` rows: (num_sources,)."""
        periods, rest = divmod(num_rows, self.period)
        counts: NDArray[np.int64] = periods * self.counts_before[-1] + self.counts_before[rest]
        return counts

    def rows(self, first: int, count: int) -> Rows:
        """The stage's rows [first, first + count), their ordinals counted from the stage's start."""
        periods, rests = np.divmod(np.arange(first, first + count), self.period)
        sources = self.source_of_row[rests]
        ordinals = periods * self.counts_before[-1][sources] + self.counts_before[rests, sources]
        return Rows(sources, ordinals)


class Curriculum:
    """The whole run's assignment. Nothing in it depends on micro-batches, devices or what was asked before."""

    def __init__(self, stages: Sequence[Stage], batch_size: int) -> None:
        """`batch_size` is windows per step, over all micro-batches."""
        validate_stages(stages, stages[-1].end_step, [name for stage in stages for name in stage.shares])
        self.stages = tuple(stages)
        self.batch_size = batch_size
        self.num_steps = stages[-1].end_step
        self.sources = tuple(dict.fromkeys(name for stage in stages for name in stage.shares))
        self._patterns = [StagePattern(stage, self.sources) for stage in stages]
        per_stage = [
            pattern.counts_through(stage.num_steps * batch_size)
            for stage, pattern in zip(stages, self._patterns, strict=True)
        ]
        self._counts_before_stage = np.vstack(
            [np.zeros(len(self.sources), dtype=np.int64), np.cumsum(per_stage, axis=0)]
        )

    def stage_index(self, step: int) -> int:
        """Which stage a step belongs to."""
        assert 0 <= step < self.num_steps, f"step {step} is outside 0..{self.num_steps - 1}"
        return next(i for i, stage in enumerate(self.stages) if step < stage.end_step)

    def rows_at(self, step: int) -> Rows:
        """The `batch_size` rows of a step."""
        index = self.stage_index(step)
        first = (step - self.stages[index].start_step) * self.batch_size
        rows = self._patterns[index].rows(first, self.batch_size)
        return Rows(rows.sources_B, rows.ordinals_B + self._counts_before_stage[index][rows.sources_B])

    def counts_through(self, step: int) -> dict[str, int]:
        """Windows of each source in steps 0..step-1."""
        if step == self.num_steps:
            counts = self._counts_before_stage[-1]
        else:
            index = self.stage_index(step)
            within = self._patterns[index].counts_through((step - self.stages[index].start_step) * self.batch_size)
            counts = self._counts_before_stage[index] + within
        return dict(zip(self.sources, counts.tolist(), strict=True))
