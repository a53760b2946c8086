"""Weights laid out once for the CPU's bf16 instructions, instead of anew in every product.

oneDNN multiplies a packed matrix 1.3 to 2 times as fast as the same one in rows, at 1 row and at 32. A product is
the same up to the order of its sums, so only bf16, inexact anyway, is packed; fp32 stays as the oracle computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """`nn.Linear` without bias whose weight lies in oneDNN's own layout. It holds no other copy of it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None
        # Not a parameter: an opaque layout can be neither moved, converted nor saved.
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return product


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have the packed bf16 product."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer by its packed form, one by one, freeing the rows as it goes.

    A tied head is packed too; the embedding keeps the rows it looks up.
    """
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None:
                setattr(module, name, PackedLinear(child))
