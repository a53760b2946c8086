"""One token of one row: top-k, top-p, min-p, and the token at a quantile of what they leave. `draw.h` does the same.

Sets of ids travel as bits, the lowest id first: 6 KB for a vocabulary of 49,152.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.errors import WeightsError

if TYPE_CHECKING:
    from shared.sampling import SamplingParams

BITS_OF_ONE = 0x3F80_0000
BUCKET_SHIFT = 19
"""Drops all but 4 bits of a float's mantissa: 16 buckets for each halving of the weight."""

BLOCK = 256
"""Weights are summed in blocks of this many: only the block that holds the quantile is walked one by one."""

Scores = NDArray[np.float32]

Bits = NDArray[np.uint8]
"""Whether each id is in a set, eight to a byte."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The scores (V,) of one row's next token, and which ids may be drawn; None: all."""

    scores_V: Scores
    allowed: Bits | None = None

    def __post_init__(self) -> None:
        assert self.allowed is None or 8 * len(self.allowed) >= len(self.scores_V)

    def barred(self) -> Scores:
        """Return the scores, minus infinity where an id may not be drawn; the caller's own where all may."""
        if self.allowed is None:
            return self.scores_V
        return np.where(unpack(self.allowed, len(self.scores_V)), self.scores_V, np.float32(-np.inf))


Draw = Callable[[Sequence[Candidates], Sequence["SamplingParams"], Sequence[float]], list[int]]
"""Draws a token for each row, by its parameters, with a number in [0, 1). Changes no scores."""


def all_ids(size: int) -> Bits:
    """Return the set of the first `size` ids."""
    return first_ids(np.full(-(-size // 8), 255, dtype=np.uint8), size)


def first_ids(bits: Bits, size: int) -> Bits:
    """Return a set in the bytes that `size` ids take, in whole pairs: the kernels read sixteen ids at once."""
    num_bytes = 2 * -(-size // 16)
    return bits[:num_bytes] if len(bits) >= num_bytes else np.pad(bits, (0, num_bytes - len(bits)))


def unpack(bits: Bits, size: int) -> NDArray[np.bool_]:
    """Return which of the first `size` ids are in a set."""
    return np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)


def including(bits: Bits, ids: Sequence[int]) -> Bits:
    """Return a set with some ids added."""
    bits = bits.copy()
    for token_id in ids:
        bits[token_id // 8] |= 1 << token_id % 8
    return bits


def without(bits: Bits, ids: Sequence[int]) -> Bits:
    """Return a set with some ids taken out."""
    bits = bits.copy()
    for token_id in ids:
        bits[token_id // 8] &= ~(1 << token_id % 8) & 255
    return bits


def check_numbers(are_numbers: bool) -> None:
    if not are_numbers:
        raise WeightsError("the model's scores are not numbers; its weights are damaged, export or download them again")


def draw_all(rows: Sequence[Candidates], params: Sequence[SamplingParams], quantiles: Sequence[float]) -> list[int]:
    """Draw from each row: `draw_from_scores`."""
    return [draw_from_scores(row.barred(), of, u) for row, of, u in zip(rows, params, quantiles, strict=True)]


def draw_from_scores(scores_V: Scores, params: SamplingParams, u: float) -> int:
    """Draw the token at quantile `u` of the distribution that scores and parameters give.

    NumPy on one thread: these vectors are too short to gain from torch's threads, which cost most on a busy machine.
    """
    best = scores_V.max()
    check_numbers(bool(np.isfinite(best)))
    powers_V = scores_V - best  # now no temperature, however small, overflows
    powers_V /= np.float32(params.temperature)
    return draw(np.exp(powers_V, out=powers_V), params, u)


def draw(weights_V: Scores, params: SamplingParams, u: float) -> int:
    """Filter one row by top-k, then top-p, then min-p, and return the token at quantile `u` of what is left.

    Args:
        weights_V: probabilities over the likeliest token's, which is exactly 1.
    """
    kept = survivors(weights_V, params)
    if kept is None:
        return quantile(weights_V, u)
    return int(kept[quantile(weights_V[kept], u)])


def survivors(weights_V: Scores, params: SamplingParams) -> NDArray[np.intp] | None:
    """Return the ids that top-k, top-p and min-p leave, the lightest last; None where all stay."""
    size = len(weights_V)
    kept: NDArray[np.intp] | None = None
    if 0 < params.top_k < size:
        smallest = np.partition(weights_V, size - params.top_k)[size - params.top_k]
        kept = np.flatnonzero(weights_V >= smallest)  # ties with the k-th stay, as in transformers
    if params.top_p < 1.0:
        kept = nucleus(weights_V, kept, params.top_p)
    if params.min_p > 0.0:
        floor = np.float32(params.min_p)
        kept = np.flatnonzero(weights_V >= floor) if kept is None else kept[weights_V[kept] >= floor]
    return None if kept is None else lightest_last(kept, weights_V)


def lightest_last(ids: NDArray[np.intp], weights_V: Scores) -> NDArray[np.intp]:
    """Return ids in ascending order, but the lightest that weighs anything last, of equals the one of the highest id.

    Which of two tokens with nearly the same weight comes last into what is kept, another rounding decides differently;
    so it may change the draw of these two, but of no other.
    """
    weights = weights_V[ids]
    places = np.flatnonzero(weights == weights[weights > 0].min())
    return np.append(np.delete(ids, places[-1]), ids[places[-1]])


def nucleus(weights_V: Scores, ids: NDArray[np.intp] | None, top_p: float) -> NDArray[np.intp]:
    """Return the fewest of `ids` (None: of all) whose weights reach `top_p` of their sum. Holtzman et al. 2019.

    A token stays while those before it have not reached `top_p`, so at least one does (arXiv 1904.09751). Sorting a
    whole vocabulary takes milliseconds; instead tokens are counted into buckets by weight, and only the bucket in
    which the sum is reached is sorted.
    """
    weights = weights_V if ids is None else weights_V[ids]
    total = float(weights.sum(dtype=np.float64))
    needed = top_p * total
    # All tokens below this floor together weigh less than 1 - top_p, so the nucleus lies above it: most go here.
    possible = np.flatnonzero(weights >= np.float32((1.0 - top_p) * total / len(weights)))
    ids, weights = possible if ids is None else ids[possible], weights[possible]
    # The bits of a positive float are ordered as the number is: exponent and 4 bits of mantissa, largest first.
    buckets = (BITS_OF_ONE >> BUCKET_SHIFT) - (weights.view(np.int32) >> BUCKET_SHIFT)
    reached = np.cumsum(np.bincount(buckets, weights=weights))
    border = int(np.searchsorted(reached, needed, side="left"))
    candidates = ids[buckets == border]
    if not len(candidates):  # rounding: all together hardly reach it
        return ids
    candidates = candidates[np.argsort(-weights_V[candidates], kind="stable")]
    before = np.cumsum(weights_V[candidates], dtype=np.float64) + (reached[border - 1] if border else 0.0)
    count = int(np.searchsorted(before, needed, side="left")) + 1
    lightest = candidates[min(count, len(candidates)) - 1]
    stays = (weights > weights_V[lightest]) | ((weights == weights_V[lightest]) & (ids <= lightest))
    kept: NDArray[np.intp] = ids[stays]
    return kept


def quantile(weights: Scores, u: float) -> int:
    """Return the place at which the running sum of the weights passes `u` of the whole, for `u` in [0, 1)."""
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    target = u * blocks[-1]
    block = min(int(np.searchsorted(blocks, target, side="right")), len(blocks) - 1)
    start = block * BLOCK
    cumulative = np.cumsum(weights[start : start + BLOCK], dtype=np.float64) + (blocks[block - 1] if block else 0.0)
    return start + min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)
