"""One update: batch, loss, gradient, optimizer; and the state that a resumed run needs.

Every step is a pure function of the state before it and of the step's number, so a run that is killed anywhere and
started again ends with the same bits as one left in peace. The loop around it is `trainer.run`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from shared.config import ModelConfig
from shared.device import Choice
from shared.errors import ConfigError
from shared.model import SmolLM2
from shared.tokenizer import Tokenizer
from trainer.batches import Batch, Batches
from trainer.config import Directories, TrainConfig
from trainer.curriculum import Curriculum
from trainer.hardware import Hardware
from trainer.initial_weights import load_initial_weights
from trainer.loss import IGNORED
from trainer.optimizer import build_optimizer, set_learning_rate
from trainer.parallel import StepLosses, gradients_meet, like, share, whole, whole_weights
from trainer.prefetch import Prefetch
from trainer.prepare import PreparedData
from trainer.processes import Processes
from trainer.shards import make_averages, named_tensors, read_shards, write_shards


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one update did; tensors stay on the device until someone asks, so that a step waits for nobody."""

    loss: Tensor
    """Mean over the step's valid tokens, in nats."""
    grad_norm: Tensor
    """Global norm before clipping."""
    source_losses_S: Tensor
    """Summed loss per source, in nats."""
    source_tokens_S: NDArray[np.int64]
    """Valid tokens per source."""
    learning_rate: float


class Trainer:
    """The network, its optimizer and its batches; `step` updates are done."""

    def __init__(self, config: TrainConfig, data: PreparedData, processes: Processes | None = None) -> None:
        """Make a network with fresh weights.

        Args:
            processes: those that train it together; all of them must make a Trainer.

        Raises:
            ConfigError: sizes that do not fit together, or a device this machine has not.
            TokenizerError: the tokenizer is not the model's.
            DataError: another process has other data.
        """
        self.config, self.data = config, data
        self.processes = processes or Processes()
        self.is_sharded = config.parallel == "fsdp" and not self.processes.is_alone
        self.model_config = network_shape(config, data.tokenizer)
        self.hardware = Hardware.choose(config, num_processes=self.processes.world_size)
        if self.is_sharded and self.hardware.compile.value:
            off = Choice(False, "FSDP2 brings each layer's weights in between")
            self.hardware = dataclasses.replace(self.hardware, compile=off)
        if self.processes.local_world_size > 1 and config.num_threads == 0:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.processes.local_world_size))
        self.device, self.dtype = self.hardware.device, self.hardware.dtype
        self.row_losses = self.hardware.row_losses(config)
        self.micro_batch_size = self.hardware.micro_batch.value
        self.my_rows = self.processes.share_of(config.batch_size, self.micro_batch_size)
        curriculum = Curriculum(config.curriculum_stages(), config.batch_size)
        self.batches = Batches(data.token_files, curriculum, seed=config.seed, sequence_length=config.sequence_length)
        self.processes.agree_on("data", self.batches.data_hash)
        self.batch_on_device = Prefetch(self.make_batch, ahead=self.hardware.prefetch.value)
        self.schedule = config.build_schedule()
        self.start_afresh()

    def start_afresh(self) -> None:
        """Fresh weights and optimizer, no update done."""
        torch.manual_seed(self.config.seed)
        self.model = SmolLM2(self.model_config)
        scaled = self.config.scale_residual_init
        residual_scale = (2 * self.model_config.num_hidden_layers) ** -0.5 if scaled else 1.0
        self.model.initialize(self.config.seed, residual_scale=residual_scale)
        if self.config.init_from is not None:
            models_dir = Directories().models_dir
            load_initial_weights(self.model, self.config.init_from, self.data.tokenizer, models_dir)
        self.model.model.embed_tokens.sparse = self.hardware.sparse_embedding.value
        self.model.to(self.device)
        self.losses = share(
            StepLosses(self.model, self.row_losses, self.dtype), self.processes, kind=self.config.parallel
        )
        self.optimizer = build_optimizer(self.model, self.config, self.device)
        self.healthy = torch.ones((), dtype=torch.bool, device=self.device)
        self.step = 0

    def is_healthy(self) -> bool:
        """Whether every loss and gradient since the last restore was a finite number. Waits for the device."""
        return bool(self.healthy)

    def train_step(self, give_up: Callable[[], bool] = lambda: False) -> StepResult | None:
        """Do the next update, or leave everything as it was and return None where `give_up` says so in between.

        The loss of every micro-batch is divided by the valid tokens of the whole step, so how the rows are split,
        over micro-batches or processes, changes no gradient; processes sum theirs once, after their last micro-batch.
        Nothing here waits for the device.
        """
        config = self.config
        batch, (inputs_BT, targets_BT, sources_B) = self.batch_on_device(self.step)
        valid_B = (batch.targets_BT != IGNORED).sum(axis=1)
        num_tokens = max(1, int(valid_B.sum()))
        losses: list[Tensor] = []
        for first in self.my_rows:
            if give_up():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            rows = slice(first, first + self.micro_batch_size)
            with gradients_meet(self.losses, now=first == self.my_rows[-1]):
                losses_B = self.losses(inputs_BT[rows], targets_BT[rows])
                (losses_B.sum() / num_tokens).backward()
            losses.append(losses_B.detach())
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf))
        learning_rate = self.schedule.learning_rate(self.step)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

        losses_B = self.processes.all_rows(torch.cat(losses))
        loss = losses_B.sum() / num_tokens
        self.healthy &= torch.isfinite(loss) & torch.isfinite(grad_norm)
        num_sources = len(self.batches.source_names)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            source_losses_S=torch.zeros(num_sources, device=self.device).index_add_(0, sources_B, losses_B),
            source_tokens_S=np.bincount(batch.sources_B, weights=valid_B, minlength=num_sources).astype(np.int64),
            learning_rate=learning_rate,
        )

    def make_batch(self, step: int) -> tuple[Batch, list[Tensor]]:
        """Return a step's batch, and its inputs, targets and sources on the device."""
        batch = self.batches.batch_at(step)
        arrays = (batch.inputs_BT, batch.targets_BT, batch.sources_B)
        return batch, [self.hardware.to_device(array) for array in arrays]

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as tensors and plain values; the tensors are not copied.

        Where processes hold shards, the weights and the optimizer's averages are not in it: `write_shards` has them.
        """
        on_cuda = self.device.type == "cuda"
        optimizer = self.optimizer.state_dict()
        weights = {} if self.is_sharded else {name: p.detach() for name, p in self.model.named_parameters()}
        return {
            "step": self.step,
            "recipe": self.config.model_dump_json(),
            "data_hash": self.batches.data_hash,
            "tokenizer_sha256": self.data.tokenizer.sha256,
            "model": weights,
            "optimizer": {**optimizer, "state": {}} if self.is_sharded else optimizer,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state()` gave.

        Raises:
            ConfigError: it was trained on other data or with another tokenizer.
        """
        for key, here in (("data_hash", self.batches.data_hash), ("tokenizer_sha256", self.data.tokenizer.sha256)):
            if state[key] != here:
                what = "data" if key == "data_hash" else "a tokenizer"
                raise ConfigError(
                    f"this run was trained on {what} with hash {state[key][:12]} and here it is {here[:12]}; "
                    "restore the old text, or train under another name with --run NAME"
                )
        if "shards" in state:
            make_averages(self.optimizer, num_updates=state["step"])
            read_shards(state["shards"], named_tensors(self.model, self.optimizer))
        else:
            load_weights(self.model, state["model"])
            self.optimizer.load_state_dict(laid_out(copied(state["optimizer"]), self.optimizer))
        torch.set_rng_state(state["random"].clone())
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].clone(), self.device)
        self.healthy = torch.ones((), dtype=torch.bool, device=self.device)
        self.step = int(state["step"])

    def write_shards(self, folder: Path) -> None:
        """Write this process's part of what `state` leaves out; all processes must."""
        write_shards(folder, named_tensors(self.model, self.optimizer))

    def whole_model(self) -> SmolLM2:
        """Return the network with all its weights; where they lie in shards, a copy. All processes must ask."""
        if not self.is_sharded:
            return self.model
        weights = whole_weights(self.model)
        model = SmolLM2(self.model_config).to(self.device)
        load_weights(model, weights)
        return model


def network_shape(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the recipe's network with the tokenizer's vocabulary.

    Raises:
        TokenizerError: the recipe fixes a vocabulary that is not the tokenizer's.
    """
    shape = config.model.build(tokenizer_vocab_size=tokenizer.vocab_size, end_of_text_id=tokenizer.end_of_text_id)
    tokenizer.check_fits(shape)
    return shape


def load_weights(model: SmolLM2, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into a network of the same recipe.

    Raises:
        ConfigError: the recipe has been changed to another network since.
    """
    parameters = dict(model.named_parameters())
    found, wanted = ({name: tuple(tensor.shape) for name, tensor in named.items()} for named in (tensors, parameters))
    if found != wanted:
        name = min(name for name in found | wanted if found.get(name) != wanted.get(name))
        raise ConfigError(
            f"the checkpoint has {name} as {found.get(name, 'nothing')} and its recipe asks for "
            f"{wanted.get(name, 'nothing')}: that recipe is not what the run was trained under; restore its recipe.toml"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(tensors[name], parameter))


def laid_out(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Lay an optimizer's saved averages out as its parameters are: whole, or in shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, numbers in saved["state"].items():
        shape = parameters[index].shape
        for key, value in numbers.items():
            if isinstance(value, Tensor) and value.shape == shape:
                numbers[key] = like(value, parameters[index])
    return saved


def copied(value: Any) -> Any:
    """Copy every tensor in nested containers: a checkpoint is memory-mapped and its file may go."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [copied(inner) for inner in value]
    return value
