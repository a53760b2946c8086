"""A trial before a run: how long a step takes on this machine and how much memory. Nothing of it is kept."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.config import TrainConfig
from trainer.prepare import PreparedData
from trainer.train import Trainer


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What two micro-batches and an update told."""

    step_s: float
    """Seconds per whole step, evaluation, samples and saves apart."""
    peak_bytes: int
    """Of device memory on a GPU, of the whole process on a CPU."""


def try_step(config: TrainConfig, data: PreparedData) -> Trial:
    """Run one micro-batch twice on fresh weights, the first time to warm up, and update them once.

    Raises:
        ConfigError, TokenizerError: the run itself would be refused.
    """
    trainer = Trainer(config, data)
    batch = trainer.batches.batch_at(0)
    rows = slice(trainer.micro_batch_size)
    inputs_BT, targets_BT = (trainer.hardware.to_device(array[rows]) for array in (batch.inputs_BT, batch.targets_BT))

    def micro_batch() -> None:
        (trainer.losses(inputs_BT, targets_BT).sum() / targets_BT.numel()).backward()

    micro_batch()
    micro_batch_s = seconds(trainer, micro_batch)
    update_s = seconds(trainer, trainer.optimizer.step)
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Trial(step_s=len(trainer.my_rows) * micro_batch_s + update_s, peak_bytes=peak)


def seconds(trainer: Trainer, work: Callable[[], object]) -> float:
    """Time some work, waiting for the device on both sides."""
    wait_for_device(trainer.device)
    start = time.perf_counter()
    work()
    wait_for_device(trainer.device)
    return time.perf_counter() - start


def wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
