"""Cross-entropy of the next token, per row: what training minimises, evaluation reports and plots split by source."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.model import Attend, RunLayer, SmolLM2, attend_causally, run_layer
from trainer.cross_entropy import linear_cross_entropy

IGNORED = -100
"""A target that counts nowhere: not in the loss, not in its mean."""


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """How the loss is computed; none of it changes what it is, but for `mask_documents`."""

    mask_documents: bool = False
    """Tokens look only at their own document, whose positions count from 0."""
    run_layer: RunLayer = run_layer
    """Runs one layer: as it is, compiled, or keeping only its input for the backward pass."""
    logit_chunk: int | None = None
    """Tokens whose logits exist at a time; None: all, and plain cross-entropy on them."""

    def __call__(self, model: SmolLM2, inputs_BT: Tensor, targets_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """Return each row's summed loss in nats, fp32 (B,); ignored targets add 0.

        The matrix products run in `dtype` (float32: no autocast), the softmax in fp32.
        """
        device = inputs_BT.device.type
        attend: Attend = attend_in_fp32 if device == "cpu" else attend_causally
        positions_BT = None
        if self.mask_documents:
            documents_BT, positions_BT = documents_of(inputs_BT, model.config.eos_token_id)
            attend = functools.partial(attend_within_documents, mask_of(documents_BT))
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            hidden_BTD = model.hidden_states(inputs_BT, positions_BT, attend, self.run_layer)
            logits_BTV = None if self.logit_chunk else model.logits(hidden_BTD)
        if logits_BTV is None:
            losses_N = linear_cross_entropy(
                hidden_BTD.flatten(0, 1),
                model.lm_head.weight,
                targets_BT.flatten(),
                ignored=IGNORED,
                dtype=dtype,
                chunk=self.logit_chunk or 0,
            )
        else:
            losses_N = F.cross_entropy(
                logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
            )
        return losses_N.view(targets_BT.shape).sum(dim=1)


def attend_in_fp32(layer: int, queries_BHTE: Tensor, keys_BKTE: Tensor, values_BKTE: Tensor) -> Tensor:
    """Causal attention outside autocast. On a CPU its backward pass takes half as long in fp32 as in bf16 at the
    original's 128 tokens (8 against 15 ms for 8 x 4 heads), and is no slower at 256."""
    with torch.autocast(queries_BHTE.device.type, enabled=False):
        return attend_causally(layer, queries_BHTE.float(), keys_BKTE.float(), values_BKTE.float())


def documents_of(inputs_BT: Tensor, end_of_text_id: int) -> tuple[Tensor, Tensor]:
    """Return which document of its row each token belongs to, and its position in it, both (B, T).

    `end_of_text_id` closes a document and belongs to it. A row may begin within a document: what it shows of it counts
    from 0 as well.
    """
    ends_BT = inputs_BT == end_of_text_id
    documents_BT = ends_BT.cumsum(1) - ends_BT.long()
    places_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
    is_first_BT = torch.ones_like(ends_BT)
    is_first_BT[:, 1:] = ends_BT[:, :-1]
    starts_BT = torch.where(is_first_BT, places_T, 0).cummax(1).values
    return documents_BT, places_T - starts_BT


def mask_of(documents_BT: Tensor) -> Tensor:
    """Return (B, 1, T, T): True where a token may look at another, of its own document and not after it."""
    same_BTT = documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)
    return same_BTT.tril().unsqueeze(1)


def attend_within_documents(
    mask_B1TT: Tensor,
    layer: int,  # noqa: ARG001
    queries_BHTE: Tensor,
    keys_BKTE: Tensor,
    values_BKTE: Tensor,
) -> Tensor:
    """Attention under a mask; in fp32 on a CPU, as `attend_in_fp32`."""
    heads = (queries_BHTE, keys_BKTE, values_BKTE)
    if queries_BHTE.device.type != "cpu":
        return F.scaled_dot_product_attention(*heads, attn_mask=mask_B1TT, enable_gqa=True)
    with torch.autocast("cpu", enabled=False):
        queries, keys, values = (head.float() for head in heads)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask_B1TT, enable_gqa=True)
