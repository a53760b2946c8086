"""How long a step takes by the tokens in it, learnt from the steps themselves; what it says of prompts and guesses.

On a CPU and on a GPU alike a step reads all weights, whatever it computes, and each token adds a little:
seconds = fixed + each * tokens. The two numbers differ by machine, model and arithmetic, so they are measured.
"""

from __future__ import annotations

import math

MEMORY = 0.98
"""Weight of a step against the next one: the last fifty or so count."""
STALL = 0.7
"""How much longer a step may take for prompt tokens beside those who decode: the 99th percentile of the time between
two tokens is to stay below twice its usual."""
OUTLIER = 4.0
"""A step this much slower than expected was interrupted; it counts as no slower than that."""


class Pace:
    """A line through recent steps: least squares with fading memory."""

    def __init__(self, *, fixed_s: float, each_s: float) -> None:
        """Begin with a guess, forgotten after a few steps."""
        self.fixed_s, self.each_s = fixed_s, each_s
        self.num_observed = 0
        self.weight = self.sum_n = self.sum_s = self.sum_nn = self.sum_ns = 0.0
        for num_tokens in (1, 32):
            self._add(num_tokens, self.expected_s(num_tokens), 0.01)

    def expected_s(self, num_tokens: int) -> float:
        """Seconds of a step of so many tokens."""
        return self.fixed_s + self.each_s * num_tokens

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from one step."""
        if self.num_observed > 10:
            seconds = min(seconds, OUTLIER * self.expected_s(num_tokens))
        self.num_observed += 1
        self._add(num_tokens, seconds, 1.0)
        mean_n, mean_s = self.sum_n / self.weight, self.sum_s / self.weight
        variance = self.sum_nn / self.weight - mean_n**2
        if variance > 1.0:  # else all steps were alike, and tell nothing of the slope
            self.each_s = max(1e-7, (self.sum_ns / self.weight - mean_n * mean_s) / variance)
        self.fixed_s = max(1e-7, mean_s - self.each_s * mean_n)

    def _add(self, num_tokens: int, seconds: float, weight: float) -> None:
        self.weight = MEMORY * self.weight + weight
        self.sum_n = MEMORY * self.sum_n + weight * num_tokens
        self.sum_s = MEMORY * self.sum_s + weight * seconds
        self.sum_nn = MEMORY * self.sum_nn + weight * num_tokens**2
        self.sum_ns = MEMORY * self.sum_ns + weight * num_tokens * seconds

    def prompt_tokens_beside(self, num_decoding: int) -> int:
        """Prompt tokens that lengthen a step of so many decoding sequences by `STALL`."""
        return max(1, int(STALL * self.expected_s(num_decoding) / self.each_s))

    def num_drafts_worth(self, num_decoding: int, acceptance: float, most: int) -> int:
        """Guesses of one sequence worth computing, each taken with probability `acceptance` if those before it were.

        A guess costs `each_s`. One that is taken saves its sequence a share of a step, `expected_s(D) / D` of D
        sequences: so the i-th pays while acceptance**i is above the ratio of the two.
        """
        ratio = self.each_s * num_decoding / self.expected_s(num_decoding)
        if acceptance <= ratio:
            return 0
        if acceptance >= 1.0:
            return most
        return min(most, int(math.log(ratio) / math.log(acceptance)))

    def __str__(self) -> str:
        return f"{1000 * self.fixed_s:.1f} ms a step and {1000 * self.each_s:.2f} ms a token"
