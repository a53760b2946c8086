"""How long a step takes by what is in it, learnt from the steps themselves; what it says of prompts and guesses.

On a CPU and on a GPU alike a step reads all weights, whatever it computes; each token adds a little, and more the more
positions it looks back at: seconds = fixed + each * tokens + look * positions. The three numbers differ by machine,
model and arithmetic, so they are measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine.kv_cache import Span

MEMORY = 0.98
"""Weight of a step against the next one: the last fifty or so count."""
STALL = 0.7
"""How much longer a step may take for prompt tokens beside those who decode: the 99th percentile of the time between
two tokens is to stay below twice its usual."""
OUTLIER = 1.5
"""A step this much slower than expected was interrupted; it counts as no slower than that."""
ANCHOR = 0.1
"""Weight, against a step, of what was learnt before: it holds what the last fifty steps, all alike, say nothing of."""
USUAL_STEP = np.array([1.0, 16.0, 65_536.0])
"""What is in a step that tells much of a step, of tokens, of positions: less than these leaves a cost to the anchor."""
LEAST_S = 1e-9
"""Nothing is for nothing, whatever noise says."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is in a step."""

    num_tokens: int
    num_positions: int = 0
    """Together, those that tokens beside their sequence's first look back at. The first one's share is left to the
    step: it waits for the memory, the others for the arithmetic."""

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Load:
        counts = [(span.count, (span.count - 1) * span.end) for span in spans]
        return cls(sum(tokens for tokens, _ in counts), sum(positions for _, positions in counts))


class Pace:
    """Least squares over recent steps with fading memory, anchored where they say nothing."""

    def __init__(self, *, fixed_s: float, each_s: float, look_s: float = 0.0) -> None:
        """Begin with a guess, forgotten after a few steps."""
        self.costs: NDArray[np.float64] = np.array([fixed_s, each_s, look_s]) * USUAL_STEP
        self.products = np.zeros((3, 3))
        self.seconds = np.zeros(3)
        self.num_observed = 0

    @property
    def fixed_s(self) -> float:
        return float(self.costs[0])

    @property
    def each_s(self) -> float:
        return float(self.costs[1] / USUAL_STEP[1])

    @property
    def look_s(self) -> float:
        return float(self.costs[2] / USUAL_STEP[2])

    def token_s(self, position: int) -> float:
        """Seconds that one more token adds which looks back at so many positions."""
        return self.each_s + self.look_s * position

    def expected_s(self, load: Load) -> float:
        """Seconds of a step."""
        return self.fixed_s + self.each_s * load.num_tokens + self.look_s * load.num_positions

    def observe(self, load: Load, seconds: float) -> None:
        """Learn from one step."""
        if self.num_observed > 10:
            seconds = min(seconds, OUTLIER * self.expected_s(load))
        self.num_observed += 1
        step = np.array([1.0, load.num_tokens, load.num_positions]) / USUAL_STEP
        self.products = MEMORY * self.products + np.outer(step, step)
        self.seconds = MEMORY * self.seconds + step * seconds
        anchored = self.products + ANCHOR * np.eye(3)
        self.costs = np.maximum(np.linalg.solve(anchored, self.seconds + ANCHOR * self.costs), LEAST_S)

    def prompt_tokens_beside(self, num_decoding: int, position: int = 0) -> int:
        """Prompt tokens, standing there, that lengthen a step of so many decoding sequences by `STALL`."""
        return max(1, int(STALL * self.expected_s(Load(num_decoding)) / self.token_s(position)))

    def num_drafts_worth(self, num_decoding: int, acceptance: float, most: int, position: int = 0) -> int:
        """Guesses of one sequence worth computing, each taken with probability `acceptance` if those before it were.

        A guess costs `token_s`. One that is taken saves its sequence a share of a step, `expected_s(D) / D` of D
        sequences: so the i-th pays while acceptance**i is above the ratio of the two.
        """
        ratio = self.token_s(position) * num_decoding / self.expected_s(Load(num_decoding))
        if acceptance <= ratio:
            return 0
        if acceptance >= 1.0:
            return most
        return min(most, int(math.log(ratio) / math.log(acceptance)))

    def __str__(self) -> str:
        return (
            f"{1e3 * self.fixed_s:.3g} ms a step, {1e6 * self.each_s:.3g} us a token and "
            f"{1e9 * self.look_s:.3g} us a thousand positions it looks back at"
        )
