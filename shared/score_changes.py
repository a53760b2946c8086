"""What a request changes about the scores of its next token: bias, penalties, and which ids may be drawn at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.drawing import Bits, Scores, all_ids, first_ids, unpack, without

if TYPE_CHECKING:
    from shared.sampling import SamplingRow

Ids = NDArray[np.int64]
Amounts = NDArray[np.float32]


def change_scores(scores_V: Scores, row: SamplingRow) -> None:
    """Change the scores by bias, repetition, then frequency and presence penalties."""
    ids, amounts = added(row)
    scores_V[ids] += amounts
    seen = repeated(row)
    scores, penalty = scores_V[seen], np.float32(row.params.repetition_penalty)
    scores_V[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
    ids, amounts = spent(row)
    scores_V[ids] -= amounts


def added(row: SamplingRow) -> tuple[Ids, Amounts]:
    """Return the ids that `logit_bias` names, and what is added to their scores."""
    bias = row.params.logit_bias
    return np.fromiter(bias, np.int64), np.fromiter(bias.values(), np.float32)


def repeated(row: SamplingRow) -> Ids:
    """Return the ids that the repetition penalty is for: those of prompt and completion.

    Keskar et al. 2019, arXiv 1909.05858, section 4.1: positive scores are divided by it, negative ones multiplied.
    """
    if row.params.repetition_penalty == 1.0:
        return np.empty(0, dtype=np.int64)
    return np.unique(np.array([*row.prompt_ids, *row.completion_ids], dtype=np.int64))


def spent(row: SamplingRow) -> tuple[Ids, Amounts]:
    """Return the ids of the completion, and what presence and frequency penalties take from their scores.

    They look at the completion alone, as vLLM and OpenAI define them.
    """
    params = row.params
    if not (params.presence_penalty or params.frequency_penalty):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    ids, counts = np.unique(np.asarray(row.completion_ids, dtype=np.int64), return_counts=True)
    return ids, (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)


def allowed_ids(row: SamplingRow, size: int) -> Bits | None:
    """Return which ids the constraint allows and do not end the completion before `min_tokens`; None: all."""
    allowed = None if row.constraint is None else first_ids(row.constraint.allowed(), size)
    if row.must_go_on:
        going_on = without(all_ids(size) if allowed is None else allowed, row.end_token_ids)
        if allowed is None or unpack(going_on, size).any():
            return going_on
        # Nothing but the end is left to the constraint, which is the stricter of the two.
    return allowed
