"""The head's product and the cross-entropy behind it as one operation that never holds all logits in fp32.

Rows go through in chunks. Where a gradient is wanted, each chunk's is taken while its logits are there, so the backward
pass has nothing left to compute and nothing was kept but the gradients (as in Liger kernels, Hsu et al. 2024, arXiv
2410.10989, section 3.2).

Shape letters: N tokens, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class LinearCrossEntropy(Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, dtype: torch.dtype, chunk: int
    ) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        counted_N = targets_N != ignored
        safe_N = torch.where(counted_N, targets_N, 0)
        losses_N = torch.zeros(len(targets_N), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wants_gradient else None
        weight_grad = None
        for rows in (slice(first, first + chunk) for first in range(0, len(targets_N), chunk)):
            logits = hidden[rows] @ weight.t()
            wide = logits.float()
            target = safe_N[rows].unsqueeze(1)
            target_logits = wide.gather(1, target)
            log_probs = torch.log_softmax(wide, dim=1) if not wants_gradient else None
            if log_probs is not None:
                losses_N[rows] = torch.where(counted_N[rows], -log_probs.gather(1, target).squeeze(1), 0.0)
                continue
            # probabilities - one-hot: the gradient of the summed loss by the logits, 0 in rows that do not count
            log_sum = wide.logsumexp(1, keepdim=True)
            losses_N[rows] = torch.where(counted_N[rows], (log_sum - target_logits).squeeze(1), 0.0)
            by_logits = wide.sub_(log_sum).exp_()
            by_logits.scatter_add_(1, target, torch.full_like(target_logits, -1.0))
            by_logits *= counted_N[rows].unsqueeze(1)
            by_logits = logits.copy_(by_logits)
            assert hidden_grad is not None
            hidden_grad[rows] = by_logits @ weight
            by_weight = by_logits.t() @ hidden[rows]
            weight_grad = by_weight.float() if weight_grad is None else weight_grad.add_(by_weight)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if hidden_grad is None:
            return (None,) * 6
        factor = grad_N[0]
        assert grad_N.device.type != "cpu" or bool((grad_N == factor).all()), "every token's loss must weigh the same"
        by_hidden = (hidden_grad * factor).to(hidden_dtype)
        return by_hidden, (weight_grad * factor).to(weight_dtype), None, None, None, None


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, ignored: int, dtype: torch.dtype, chunk: int
) -> Tensor:
    """Return each token's loss in nats, fp32 (N,), of the logits hidden @ weight^T; 0 where its target is `ignored`.

    The products run in `dtype`, the softmax in fp32, the sum of the weight's gradient over chunks in fp32.

    Args:
        chunk: tokens whose logits exist at a time.

    Whatever is made of the losses must weigh every one of them alike, as a sum does.
    """
    losses_N: Tensor = LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, ignored, dtype, chunk)  # type: ignore[no-untyped-call]
    return losses_N
