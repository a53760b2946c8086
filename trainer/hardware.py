"""What a run computes on and how: device, dtype, threads, compilation, memory, each chosen with its reason.

Every choice depends on the recipe and the machine alone, never on what is free at the moment: a resumed run must choose
the same again to end with the same bits.
"""

from __future__ import annotations

import functools
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shared.config import ModelConfig
from shared.device import Choice, choose_device, choose_dtype, choose_num_threads
from shared.model import RunLayer, run_layer
from trainer.config import TrainConfig, ask_cublas_for_the_same_bits
from trainer.loss import RowLosses
from trainer.memory import choose_logit_chunk, choose_micro_batch

COMPILE_PAYS_FROM_FLOPS = 1e15
"""On a CPU it saves about a fifth of each step and costs half a minute: well won back in a run of half an hour."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The choices of one process."""

    device_choice: Choice[torch.device]
    dtype_choice: Choice[torch.dtype]
    threads: Choice[int]
    compile: Choice[bool]
    micro_batch: Choice[int]
    """Rows per forward pass: the recipe's micro-batch, or several of them at once."""
    logit_chunk: Choice[int | None]
    """Tokens whose logits exist at a time; None: all of a micro-batch."""
    prefetch: Choice[bool]
    """Whether a thread makes the next step's batch while this one is computed."""
    sparse_embedding: Choice[bool]
    """Whether the embedding's gradient holds only the rows that were looked up."""

    @classmethod
    def choose(cls, config: TrainConfig, *, num_processes: int = 1) -> Hardware:
        """Choose for this machine and set PyTorch up accordingly.

        Args:
            num_processes: those that share the rows of a step.

        Raises:
            ConfigError: the recipe asks for a device or dtype this machine has not.
        """
        device = choose_device(config.device)
        threads = choose_num_threads(config.num_threads)
        torch.set_num_threads(threads.value)
        if config.deterministic and device.value.type == "cuda":
            ask_cublas_for_the_same_bits()
            torch.use_deterministic_algorithms(True)
        shape = config.model.build(tokenizer_vocab_size=config.data.vocab_size or 49_152)
        micro_batch = choose_micro_batch(config, shape, device.value, num_processes=num_processes)
        return cls(
            device_choice=device,
            dtype_choice=choose_dtype(device.value, config.dtype, purpose="train"),
            threads=threads,
            compile=choose_compile(config.compile, device.value, training_flops=training_flops(config, shape)),
            micro_batch=micro_batch,
            logit_chunk=choose_logit_chunk(shape, device.value, num_tokens=micro_batch.value * config.sequence_length),
            prefetch=choose_prefetch(device.value),
            sparse_embedding=choose_sparse_embedding(shape, device.value, num_processes=num_processes),
        )

    @property
    def device(self) -> torch.device:
        return self.device_choice.value

    @property
    def dtype(self) -> torch.dtype:
        return self.dtype_choice.value

    def row_losses(self, config: TrainConfig) -> Callable[..., Tensor]:
        """Return the loss as it is computed here; the model itself stays as it is, so no name of a compiled wrapper
        ever reaches a checkpoint.

        On a GPU all of it is one graph, for launching kernels is what takes time; on a CPU, and beside chunked logits,
        each layer is compiled: one graph of a second's work serves all of them.
        """
        whole = self.compile.value and self.device.type == "cuda" and self.logit_chunk.value is None
        run: RunLayer = run_layer
        if self.compile.value and not whole:
            run = torch.compile(run, dynamic=False)
        if config.activation_checkpointing:
            run = functools.partial(keep_only_the_input, run)
        losses = RowLosses(mask_documents=config.mask_documents, run_layer=run, logit_chunk=self.logit_chunk.value)
        return torch.compile(losses.__call__, dynamic=False) if whole else losses

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
            f"  compile    {'on' if self.compile.value else 'off'}: {self.compile.reason}\n"
            f"  rows       {self.micro_batch.value} per forward pass: {self.micro_batch.reason}\n"
            f"  logits     {self.logit_chunk.reason}\n"
            f"  embedding  {self.sparse_embedding.reason}\n"
            f"  prefetch   {'on' if self.prefetch.value else 'off'}: {self.prefetch.reason}"
        )


def keep_only_the_input(run: RunLayer, *arguments: Any) -> Tensor:
    """Run a layer and forget all but what went in; the backward pass runs it again. No layer draws random numbers."""
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def training_flops(config: TrainConfig, shape: ModelConfig) -> float:
    """Return 6 x parameters x tokens of the whole run."""
    return 6.0 * shape.num_parameters * config.tokens_per_step * config.num_steps


def choose_compile(requested: str, device: torch.device, *, training_flops: float) -> Choice[bool]:
    """Choose whether torch.compile pays: half a minute at the start, and it needs a compiler."""
    if requested != "auto":
        return Choice(requested == "on", "as asked for")
    if device.type == "cuda":
        if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
            return Choice(False, "there is no C compiler on PATH; install one to train faster")
        return Choice(True, "it saves kernel launches on a GPU")
    if device.type != "cpu" or training_flops < COMPILE_PAYS_FROM_FLOPS:
        return Choice(False, f"half a minute of compiling would not be won back by this run on {device.type}")
    if missing := missing_to_compile_for_a_cpu():
        return Choice(False, f"{missing} to train faster")
    return Choice(True, "it fuses what lies between the matrix products, a fifth of each step")


def missing_to_compile_for_a_cpu() -> str | None:
    """Say what to install where torch.compile could not build its C++; None where it can."""
    if not any(shutil.which(name) for name in ("g++", "clang++")):
        return "there is no C++ compiler on PATH; install g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are missing; install python3-dev"
    return None


def choose_prefetch(device: torch.device) -> Choice[bool]:
    """Choose whether batches are made ahead: it pays where making one is a visible part of a step."""
    if device.type == "cuda":
        return Choice(True, "a batch takes about a millisecond on the host, in which a GPU would wait")
    return Choice(False, f"making a batch is no visible part of a step on {device.type}")


def choose_sparse_embedding(shape: ModelConfig, device: torch.device, *, num_processes: int) -> Choice[bool]:
    """Choose how the gradient of looking tokens up meets the head's, which is dense and comes first where tied."""
    numbers = shape.vocab_size * shape.hidden_size
    if device.type != "cpu" or num_processes > 1 or not shape.tie_word_embeddings or numbers < 2**22:
        return Choice(False, "dense gradient")
    return Choice(
        True, f"only looked-up rows are added to the head's gradient, not {numbers * 4 / 2**20:.0f} MiB of zeros"
    )
