"""How the processes share the network: each holds all of it (DDP) or a part (FSDP2). Gradients meet once per step.

A step's loss is divided by the tokens of the whole step before it is differentiated, so gradients are *summed*, never
averaged: two processes with one micro-batch each give the bits that one process with both gives.

FSDP2 and its sharded tensors are imported where they are used: that takes a second, and one process needs none of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.model import SmolLM2
from trainer.processes import Processes


class StepLosses(nn.Module):
    """Inputs and targets in, each row's summed loss out. What is inside `forward` is what processes share."""

    def __init__(self, model: SmolLM2, row_losses: Callable[..., Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.row_losses = row_losses
        self.dtype = dtype

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.row_losses(self.model, inputs_BT, targets_BT, self.dtype)


def share(losses: StepLosses, processes: Processes, *, kind: str) -> nn.Module:
    """Spread a network over the processes; alone, it stays as it is. Call it before the optimizer is made."""
    if processes.is_alone:
        return losses
    if kind == "ddp":
        shared = DistributedDataParallel(losses, broadcast_buffers=False, gradient_as_bucket_view=True)
        shared.register_comm_hook(None, sum_over_processes)
        return shared
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in losses.model.model.layers:
        fully_shard(layer)
    fully_shard(losses)
    for module in losses.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return losses


def sum_over_processes(_, bucket):  # type: ignore[no-untyped-def]
    """DDP's hook, for it would divide by the number of processes. It checks annotations, and knows them not as text."""
    summing = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summing.then(lambda future: future.value()[0])


@contextlib.contextmanager
def gradients_meet(losses: nn.Module, *, now: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: whether the processes sum their gradients after it."""
    if sync := getattr(losses, "set_requires_gradient_sync", None):  # FSDP2's
        sync(now)
    if isinstance(losses, DistributedDataParallel) and not now:
        with losses.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may lie in shards; all processes must ask."""
    gather = getattr(tensor, "full_tensor", None)  # a DTensor's
    return gather() if gather else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """Lay a whole tensor out as `model` is: each process keeps its own shard of it, without talking to the others."""
    if not hasattr(model, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    on_device = tensor.to(model.device)
    return distribute_tensor(on_device, model.device_mesh, model.placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return every parameter by name, gathered from the shards."""
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
