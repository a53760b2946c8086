"""All rows of a step drawn where their scores stand, so that of a GPU's memory only the tokens are copied.

As `sampling` and `drawing` do it on a CPU: bias and penalties, what may not be drawn, temperature, top-k, top-p, min-p,
and the token at a quantile, in the same order. Sums are fp64; exp may differ from NumPy's in its last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from shared.drawing import all_ids, check_numbers
from shared.score_changes import added, allowed_ids, repeated, spent
from shared.uniform import uniform

if TYPE_CHECKING:
    from shared.sampling import SamplingParams, SamplingRow


def choose_on_device(logits_BV: Tensor, rows: Sequence[SamplingRow], places: Sequence[int]) -> list[int]:
    """Choose a token for each row, whose scores stand at its place among the B. Changes no scores.

    Raises:
        WeightsError: the scores are not numbers.
    """
    is_whole = [*places] == [*range(len(logits_BV))]
    scores_NV = (logits_BV if is_whole else logits_BV[list(places)]).to(torch.float32, copy=is_whole)
    change_scores(scores_NV, rows)
    bar_ids(scores_NV, rows)
    best_N, ids_N = scores_NV.max(dim=-1)
    are_numbers_N = best_N.isfinite()
    drawn = [number for number, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        numbers_D = torch.tensor(drawn, device=scores_NV.device)
        params = [rows[number].params for number in drawn]
        quantiles = [uniform(rows[number].params.seed, rows[number].index) for number in drawn]
        powers_DV = scores_NV[numbers_D] - best_N[numbers_D, None]
        # Whatever is drawn of no numbers is not used; but an index they lead astray would end all work on a GPU.
        powers_DV.masked_fill_(~are_numbers_N[numbers_D, None], 0.0)
        ids_N[numbers_D] = draw(powers_DV, params, quantiles)
    token_ids: list[int] = ids_N.masked_fill(~are_numbers_N, -1).tolist()  # all that leaves the device
    check_numbers(min(token_ids) >= 0)
    return token_ids


def change_scores(scores_NV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Apply what `score_changes.change_scores` does to each row."""
    changed = [number for number, row in enumerate(rows) if row.changes_scores]
    if not changed:
        return

    def entries(of: Callable[[SamplingRow], tuple[np.ndarray, np.ndarray]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        parts = [(number, *of(rows[number])) for number in changed]
        lengths = [len(ids) for _, ids, _ in parts]
        places = np.stack([np.repeat(changed, lengths), np.concatenate([ids for _, ids, _ in parts])])
        amounts = np.concatenate([amounts for *_, amounts in parts])
        row_M, id_M = torch.from_numpy(places).to(scores_NV.device)
        return (row_M, id_M), torch.from_numpy(amounts).to(scores_NV)

    places, amounts_M = entries(added)
    scores_NV.index_put_(places, amounts_M, accumulate=True)
    places, penalties_M = entries(lambda row: (ids := repeated(row), np.full(len(ids), row.params.repetition_penalty)))
    scores_M = scores_NV[places]
    scores_NV.index_put_(places, torch.where(scores_M > 0, scores_M / penalties_M, scores_M * penalties_M))
    places, amounts_M = entries(spent)
    scores_NV.index_put_(places, -amounts_M, accumulate=True)


def bar_ids(scores_NV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Make impossible what grammars and `min_tokens` do not allow."""
    size = scores_NV.shape[1]
    allowed = [allowed_ids(row, size) for row in rows]
    if all(bits is None for bits in allowed):
        return
    every = all_ids(size)
    bytes_NX = torch.from_numpy(np.stack([every if bits is None else bits for bits in allowed])).to(scores_NV.device)
    bits_8 = torch.arange(8, dtype=torch.uint8, device=scores_NV.device)
    is_allowed_NV = (bytes_NX.unsqueeze(-1) >> bits_8 & 1).flatten(1)[:, :size].bool()
    scores_NV.masked_fill_(~is_allowed_NV, -torch.inf)


def draw(powers_DV: Tensor, params: Sequence[SamplingParams], quantiles: Sequence[float]) -> Tensor:
    """Draw a token (D,) for each row of scores, of which the largest is 0."""
    size = powers_DV.shape[1]
    given = [(each.temperature, each.top_k, each.top_p, each.min_p) for each in params]
    numbers_D5 = torch.tensor([(*of, u) for of, u in zip(given, quantiles, strict=True)], dtype=torch.float64)
    temperatures_D1, top_k_D1, top_p_D1, min_p_D1, quantiles_D1 = numbers_D5.T.unsqueeze(-1).to(powers_DV.device)
    weights_DV = (powers_DV / temperatures_D1.float()).exp()
    counts = [each.top_k for each in params if 0 < each.top_k < size]
    if counts:
        largest_DK = weights_DV.topk(max(counts)).values
        floor_D1 = largest_DK.gather(1, (top_k_D1.long() - 1).clamp(0, max(counts) - 1))
        is_off_D1 = (top_k_D1 == 0) | (top_k_D1 >= size)
        weights_DV = weights_DV.where(is_off_D1 | (weights_DV >= floor_D1), 0.0)  # ties with the k-th stay
    if any(each.top_p < 1.0 for each in params):
        weights_DV = nucleus(weights_DV, top_p_D1)
    weights_DV = weights_DV.where(weights_DV >= min_p_D1.float(), 0.0)
    is_filtered_D1 = (top_k_D1 > 0) & (top_k_D1 < size) | (top_p_D1 < 1.0) | (min_p_D1 > 0.0)
    weights_DW, lightest_D = lightest_last(weights_DV, is_filtered_D1)
    reached_DW = weights_DW.double().cumsum(-1)
    ids_D = (reached_DW <= quantiles_D1 * reached_DW[:, -1:]).sum(-1)
    last_D = (torch.arange(size + 1, device=powers_DV.device) * (weights_DW > 0)).amax(-1)
    ids_D = torch.minimum(ids_D, last_D)  # the quantile may round up to the whole
    return ids_D.where(ids_D < size, lightest_D)


def lightest_last(weights_DV: Tensor, is_filtered_D1: Tensor) -> tuple[Tensor, Tensor]:
    """Move the weight of each filtered row's lightest token into a place behind all: (D, V + 1), and its id (D).

    As `drawing.lightest_last`.
    """
    ids_V = torch.arange(weights_DV.shape[1], device=weights_DV.device)
    smallest_D1 = weights_DV.where(weights_DV > 0, torch.inf).amin(-1, keepdim=True)
    lightest_D1 = (ids_V * (weights_DV == smallest_D1)).amax(-1, keepdim=True)
    moves_DV = (ids_V == lightest_D1) & is_filtered_D1
    moved_D1 = smallest_D1.where(is_filtered_D1, 0.0)
    return torch.cat((weights_DV.masked_fill(moves_DV, 0.0), moved_D1), dim=1), lightest_D1.squeeze(1)


def nucleus(weights_DV: Tensor, top_p_D1: Tensor) -> Tensor:
    """Return the weights, 0 for tokens that top-p drops.

    A token stays while those before it, by weight, have not reached top-p of the whole: arXiv 1904.09751.
    """
    sorted_DV, order_DV = weights_DV.sort(descending=True, stable=True)
    reached_DV = sorted_DV.double().cumsum(-1)
    is_kept_DV = (reached_DV - sorted_DV < top_p_D1 * reached_DV[:, -1:]) | (top_p_D1 >= 1.0)
    return weights_DV.where(torch.empty_like(is_kept_DV).scatter_(1, order_DV, is_kept_DV), 0.0)
