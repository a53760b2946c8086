"""AdamW and what it decays: which parameter lies in which group, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from trainer.config import TrainConfig

EMBEDDINGS = ("embed_tokens", "lm_head")
FUSED_DEVICES = ("cuda", "cpu", "mps")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Split the parameters into those that weight decay pulls towards zero and those it leaves alone.

    A norm's gain around 1 is no weight to shrink. An embedding row gets a gradient only when its token occurs, so
    decay wears rare tokens down; recipes choose (`decay_embeddings`). A tied embedding counts once.
    """
    decayed: dict[str, nn.Parameter] = {}
    free: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        is_embedding = name.split(".")[-2] in EMBEDDINGS
        left_alone = parameter.dim() < 2 or (is_embedding and not config.decay_embeddings)
        (free if left_alone else decayed)[name] = parameter
    groups = (("decayed", decayed, config.weight_decay), ("free", free, 0.0))
    return [
        {"name": name, "params": list(members.values()), "parameter_names": list(members), "weight_decay": weight_decay}
        for name, members, weight_decay in groups
        if members
    ]


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """Return the recipe's optimizer over the model's fp32 weights, fused into one kernel where the device has it."""
    return AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in FUSED_DEVICES,
    )


def describe_groups(optimizer: Optimizer) -> str:
    """One line for the log: how many numbers decay and how many do not."""
    parts = [
        f"{sum(parameter.numel() for parameter in group['params']):,} numbers at weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]
    return f"AdamW: {', '.join(parts)}"


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
