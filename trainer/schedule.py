"""The learning rate as a pure function of the step: no state, so nothing to save and nothing to restore wrongly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warmup to `peak`, then one of

    - cosine: half a cosine from `peak` down to `minimum` (Loshchilov and Hutter 2016, arXiv 1608.03983);
    - wsd: `peak` held, then a straight line down to `minimum` over the last `decay_share` of all steps
      (warmup-stable-decay, Hu et al. 2024, arXiv 2404.06395);
    - constant: `peak` held.
    """

    kind: ScheduleKind
    peak: float
    minimum: float
    warmup_steps: int
    num_steps: int
    decay_share: float = 0.2

    def learning_rate(self, step: int) -> float:
        """Return the rate of the update that follows `step` finished ones (0 for the first update)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)  # `peak` itself is the first rate after warmup
        if self.kind == "constant":
            return self.peak
        if self.kind == "cosine":
            progress = share_done(step, self.warmup_steps, self.num_steps)
            return self.between(0.5 * (1.0 + math.cos(math.pi * progress)))
        first_of_decay = max(self.warmup_steps, round(self.num_steps * (1.0 - self.decay_share)))
        return self.between(1.0 - share_done(step, first_of_decay, self.num_steps))

    def between(self, height: float) -> float:
        """`minimum` at height 0, `peak` at height 1, both exactly."""
        return height * self.peak + (1.0 - height) * self.minimum


def share_done(step: int, first: int, last: int) -> float:
    """Return how far `step` lies between `first` and `last`, within 0..1."""
    if last <= first:
        return 1.0
    return min(1.0, max(0.0, (step - first) / (last - first)))
