"""One number for each token of each seed: what makes a draw the same in any batch, on any worker, after any restart."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np


class Philox(threading.local):
    """Philox4x64-10 of this thread: to set one takes a sixth of the time to make one, which reads entropy."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(key=0)
        self.state: Any = self.generator.state  # with nothing drawn ahead

    def first(self, seed: int, index: int) -> int:
        """Return the first of the numbers below 2**64 that belong to key and counter."""
        self.state["state"]["key"][0] = seed
        self.state["state"]["counter"][0] = index
        self.generator.state = self.state
        return int(self.generator.random_raw())


philox = Philox()


def uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1), a fixed function of its arguments: Philox4x64-10 keyed by the seed, counted by index.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    return (philox.first(seed, index) >> 11) * 2.0**-53
