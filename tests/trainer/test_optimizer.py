"""Which parameter is updated how; Muon's update against its definition; resume with two algorithms at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.small_run import small_data
from trainer.optimizer import JointOptimizer, build_optimizer, describe_groups, parameter_groups, set_learning_rate
from trainer.prepare import PreparedData
from trainer.recipe import load_recipe
from trainer.train import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("small"))


def muon_trainer(data: PreparedData, *overrides: str) -> Trainer:
    return Trainer(load_recipe("smoke", ["optimizer=muon", *overrides]), data)


def trained(trainer: Trainer, num_steps: int) -> list[float]:
    results = [trainer.train_step() for _ in range(num_steps)]
    return [result.loss.item() for result in results if result is not None]


def test_muon_takes_the_layers_matrices_and_nothing_else(data: PreparedData) -> None:
    trainer = muon_trainer(data)
    names = {group["name"]: set(group["parameter_names"]) for group in parameter_groups(trainer.model, trainer.config)}
    shapes = {name: parameter.dim() for name, parameter in trainer.model.named_parameters()}
    assert set.union(*names.values()) == shapes.keys()
    assert sum(map(len, names.values())) == len(shapes), "no parameter twice"
    assert names["matrices"] == {name for name in shapes if name.endswith("_proj.weight")}
    assert names["decayed"] == {"model.embed_tokens.weight"}
    assert {shapes[name] for name in names["free"]} == {1}
    described = describe_groups(trainer.optimizer)
    assert described.startswith("Muon: ")
    assert "AdamW: " in described


def test_muons_update_is_orthogonal_and_as_large_as_adamws(data: PreparedData) -> None:
    """The new weights are W (1 - lr x decay) - 0.2 x lr x sqrt(max(rows, columns)) x O with O nearly orthogonal."""
    trainer = muon_trainer(data, "weight_decay=0.1", "learning_rate=0.01", "warmup_steps=0")
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trained(trainer, 1)
    for name, parameter in trainer.model.named_parameters():
        if not name.endswith("_proj.weight"):
            continue
        update = before[name] * (1 - 0.01 * 0.1) - parameter.detach()
        orthogonal = update / (0.2 * 0.01 * math.sqrt(max(parameter.shape)))
        singular = torch.linalg.svdvals(orthogonal)
        # Five Newton-Schulz steps bring most singular values near 1; the smallest ones of a gradient may stay behind.
        assert singular.max() < 1.35, name
        assert singular.median() > 0.5, name


def test_joint_optimizer_equals_its_parts_alone() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))

    def optimizers(net: nn.Sequential) -> Sequence[torch.optim.Optimizer]:
        return (
            torch.optim.Muon([*net[0].parameters()], lr=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([*net[1].parameters()], lr=0.02, fused=True),
        )

    together, apart = network(), network()
    joint, parts = JointOptimizer(optimizers(together)), optimizers(apart)
    inputs = torch.randn(32, 8)
    for step in range(5):
        for net in (together, apart):
            net.zero_grad()
            net(inputs).square().mean().backward()
        set_learning_rate(joint, 0.01 * (step + 1))
        joint.step()
        for part in parts:
            set_learning_rate(part, 0.01 * (step + 1))
            part.step()
    assert equal(together.state_dict(), apart.state_dict())


def test_resumed_muon_goes_on_with_the_same_bits(data: PreparedData) -> None:
    one = muon_trainer(data)
    trained(one, 4)
    state = copy.deepcopy(one.state())
    other = muon_trainer(data)
    trained(other, 1)  # averages of its own, which restoring must replace
    other.restore(state)
    assert trained(one, 3) == trained(other, 3)
    assert equal(dict(one.model.named_parameters()), dict(other.model.named_parameters()))


def test_a_checkpoint_of_muon_holds_one_average_per_matrix(data: PreparedData) -> None:
    trainer = muon_trainer(data)
    trained(trainer, 1)
    kept = [set(averages) for averages in trainer.optimizer.state_dict()["state"].values()]
    assert kept.count({"momentum_buffer"}) == sum(
        name.endswith("_proj.weight") for name, _ in trainer.model.named_parameters()
    )
    assert all({"exp_avg", "exp_avg_sq"} <= averages for averages in kept if "momentum_buffer" not in averages)


def test_adamw_alone_stays_the_librarys(data: PreparedData) -> None:
    trainer = Trainer(load_recipe("smoke"), data)
    assert isinstance(build_optimizer(trainer.model, trainer.config, trainer.device), torch.optim.AdamW)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
