"""AdamW and Muon: which parameter lies in which group, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from trainer.config import TrainConfig

EMBEDDINGS = ("embed_tokens", "lm_head")
FUSED_DEVICES = ("cuda", "cpu", "mps")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Split the parameters by what updates them and by whether weight decay pulls them towards zero.

    A norm's gain around 1 is no weight to shrink. An embedding row gets a gradient only when its token occurs, so
    decay wears rare tokens down; recipes choose (`decay_embeddings`). A tied embedding counts once. Muon takes the
    matrices inside the layers and nothing else: its update treats all directions of a matrix alike, which makes no
    sense for rows that are looked up one by one.
    """
    matrices: dict[str, nn.Parameter] = {}
    decayed: dict[str, nn.Parameter] = {}
    free: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        is_embedding = name.split(".")[-2] in EMBEDDINGS
        if parameter.dim() < 2 or (is_embedding and not config.decay_embeddings):
            free[name] = parameter
        elif config.optimizer == "muon" and not is_embedding:
            matrices[name] = parameter
        else:
            decayed[name] = parameter
    groups = (
        ("matrices", matrices, config.weight_decay),
        ("decayed", decayed, config.weight_decay),
        ("free", free, 0.0),
    )
    return [
        {
            "name": name,
            "algorithm": "Muon" if members is matrices else "AdamW",
            "params": list(members.values()),
            "parameter_names": list(members),
            "weight_decay": weight_decay,
        }
        for name, members, weight_decay in groups
        if members
    ]


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """Return the recipe's optimizer over the model's fp32 weights, AdamW fused into one kernel where the device has it.

    Muon's update is scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that
    one learning rate and one weight decay serve both.
    """
    groups: dict[str, list[dict[str, Any]]] = {"Muon": [], "AdamW": []}
    for group in parameter_groups(model, config):
        groups[group["algorithm"]].append(group)
    adamw = AdamW(
        groups["AdamW"],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in FUSED_DEVICES,
    )
    if not groups["Muon"]:
        return adamw
    muon = Muon(groups["Muon"], lr=config.learning_rate, momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw")
    return JointOptimizer([muon, adamw])


class JointOptimizer(Optimizer):
    """Several optimizers over disjoint parameters that look like one: one list of groups, one state to save."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self.share_state()

    def share_state(self) -> None:
        """Let every part work on this optimizer's groups and averages, not on copies of its own."""
        first = 0
        for part in self.parts:
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            part.state = self.state
            first += len(part.param_groups)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter by the optimizer it belongs to."""
        assert closure is None, "the trainer computes its gradients before the step"
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share_state()


def describe_groups(optimizer: Optimizer) -> str:
    """One line for the log: how many numbers each algorithm updates, and which decay."""
    return ", ".join(
        f"{group['algorithm']}: {sum(parameter.numel() for parameter in group['params']):,} numbers at weight decay "
        f"{group['weight_decay']:g}"
        for group in optimizer.param_groups
    )


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
