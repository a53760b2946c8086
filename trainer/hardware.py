"""What a run computes on: device, dtype, threads, compilation, each chosen with its reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.device import Choice, choose_device, choose_dtype, choose_num_threads
from trainer.config import TrainConfig, ask_cublas_for_the_same_bits
from trainer.loss import row_losses

RowLosses = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The choices of one process."""

    device_choice: Choice[torch.device]
    dtype_choice: Choice[torch.dtype]
    threads: Choice[int]
    compile: Choice[bool]

    @classmethod
    def choose(cls, config: TrainConfig) -> Hardware:
        """Choose for this machine and set PyTorch up accordingly.

        Raises:
            ConfigError: the recipe asks for a device or dtype this machine has not.
        """
        device = choose_device(config.device)
        threads = choose_num_threads(config.num_threads)
        torch.set_num_threads(threads.value)
        if config.deterministic and device.value.type == "cuda":
            ask_cublas_for_the_same_bits()
            torch.use_deterministic_algorithms(True)
        return cls(
            device_choice=device,
            dtype_choice=choose_dtype(device.value, config.dtype, purpose="train"),
            threads=threads,
            compile=choose_compile(config.compile, device.value),
        )

    @property
    def device(self) -> torch.device:
        return self.device_choice.value

    @property
    def dtype(self) -> torch.dtype:
        return self.dtype_choice.value

    def row_losses(self) -> RowLosses:
        """Return `trainer.loss.row_losses`, compiled where that was chosen; the model itself stays as it is, so no
        name of a compiled wrapper ever reaches a checkpoint."""
        return torch.compile(row_losses, dynamic=False) if self.compile.value else row_losses

    def to_device(self, array: NDArray[Any]) -> Tensor:
        """Copy to the device; to a GPU from pinned memory, without waiting."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def description(self) -> str:
        """Lines for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"  device     {self.device}: {self.device_choice.reason}\n"
            f"  arithmetic {dtype}: {self.dtype_choice.reason}; weights and optimizer float32\n"
            f"  threads    {self.threads.value}: {self.threads.reason}\n"
            f"  compile    {'on' if self.compile.value else 'off'}: {self.compile.reason}"
        )


def choose_compile(requested: str, device: torch.device) -> Choice[bool]:
    """Choose whether torch.compile pays: half a minute at the start, and it needs a C compiler."""
    if requested != "auto":
        return Choice(requested == "on", "as asked for")
    if device.type != "cuda":
        return Choice(False, f"it costs more than it saves on {device.type}")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return Choice(False, "there is no C compiler on PATH; install one to train faster")
    return Choice(True, "it saves kernel launches on a GPU")
