"""A prompt's scores: what the network says of the tokens that stand there already, reduced while it is at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared.drawing import check_numbers
from shared.sampling import log_probabilities
from shared.scores import PromptScores

SCORED_AT_A_TIME = 32
"""Rows of a prompt's scores turned into log-probabilities together: 6 MB of fp32 with 49,152 ids."""


def score_prompt(logits_TV: Tensor, token_ids: Sequence[int], num_top: int) -> PromptScores:
    """Reduce the scores behind T tokens of a prompt to those of the tokens that follow each.

    A few rows at a time: their fp32 copies then stay in a CPU's cache, which makes it twice as fast as all at once.

    Raises:
        WeightsError: the scores are not numbers.
    """
    pieces = [slice(start, start + SCORED_AT_A_TIME) for start in range(0, len(token_ids), SCORED_AT_A_TIME)]
    rated = [log_probabilities(logits_TV[piece], token_ids[piece], num_top) for piece in pieces]
    chosen_T, ids_TK, best_TK = (torch.cat(parts).cpu().numpy() for parts in zip(*rated, strict=True))
    check_numbers(not np.isnan(chosen_T).any())
    return PromptScores(chosen_T, ids_TK.astype(np.uint32), best_TK)
