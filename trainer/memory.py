"""How much of a step is computed at once: rows per forward pass and tokens whose logits exist together; and its end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from shared.config import ModelConfig
from shared.device import Choice, cgroup_folders, is_out_of_memory
from shared.errors import ConfigError, first_line
from trainer.config import TrainConfig

ACTIVATION_BYTES = 24
"""Kept for the backward pass per token, layer and number of hidden_size + intermediate_size. Measured on a CPU in bf16
at 135M: 5.3 GB more for 3,584 tokens more."""
SHARE_FOR_ACTIVATIONS = 0.4
"""Of the device's memory; the rest is for weights, gradients, optimizer, logits and fragmentation."""
LOGIT_BYTES = 10
"""Per token and vocabulary entry where all logits exist: 16-bit, fp32, and the gradient's 32 bits."""
MOST_FLOPS_ON_CPU = 2e12
"""Of a forward and backward pass: a request to stop is heard between passes, and must be answered within 10 s."""
LOGIT_CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**31}
"""fp32 logits that may exist at a time."""
PLAIN_LOGIT_BYTES = {"cpu": 2**25, "cuda": 2**32}
"""fp32 logits up to which nothing is gained by chunks."""


def choose_micro_batch(
    config: TrainConfig, shape: ModelConfig, device: torch.device, *, num_processes: int
) -> Choice[int]:
    """Choose the rows of one forward pass: as many of the recipe's micro-batches as fit and share out evenly.

    The rows of a step, its loss and (but for rounding) its gradient do not depend on it.
    """
    given, parts = config.micro_batch_size, config.gradient_accumulation_steps
    if not config.merge_micro_batches or parts == 1:
        return Choice(given, "as the recipe says")
    total, source = device_memory(device)
    per_row = config.sequence_length * activation_bytes_per_token(config, shape)
    most = int(total * SHARE_FOR_ACTIVATIONS / per_row)
    limit = f"activations of {most:,} rows fit into {SHARE_FOR_ACTIVATIONS:.0%} of {source}"
    if device.type == "cpu":
        by_time = int(MOST_FLOPS_ON_CPU / (6 * shape.num_parameters * config.sequence_length))
        if by_time < most:
            most, limit = by_time, "a longer pass would keep a request to stop waiting"
    fitting = [k for k in range(1, parts + 1) if parts % k == 0 and (parts // k) % num_processes == 0]
    merged = max((k for k in fitting if k * given <= most), default=1)
    return Choice(merged * given, f"{merged} of the recipe's {parts} micro-batches of {given} at once; {limit}")


def activation_bytes_per_token(config: TrainConfig, shape: ModelConfig) -> int:
    """Estimate what the forward pass keeps for the backward pass."""
    per_layer = ACTIVATION_BYTES * (shape.hidden_size + shape.intermediate_size)
    kept = per_layer * shape.num_hidden_layers
    if config.activation_checkpointing:  # each layer's fp32 input, and one layer at a time in full
        kept = 4 * shape.hidden_size * shape.num_hidden_layers + per_layer
    return kept + LOGIT_BYTES * shape.vocab_size


def choose_logit_chunk(shape: ModelConfig, device: torch.device, *, num_tokens: int) -> Choice[int | None]:
    """Choose how many tokens' logits exist at a time."""
    per_token = 4 * shape.vocab_size
    total = num_tokens * per_token
    plain, most = (limits.get(device.type, 2**27) for limits in (PLAIN_LOGIT_BYTES, LOGIT_CHUNK_BYTES))
    if total <= plain:
        return Choice(None, f"all {total / 2**20:,.0f} MiB of a pass at once: chunks would save nothing")
    chunk = max(1, most // per_token)
    return Choice(
        chunk,
        f"{chunk:,} tokens at a time with the head's gradient: {total / 2**20:,.0f} MiB in fp32 never exist at once",
    )


def device_memory(device: torch.device) -> tuple[int, str]:
    """Return the bytes this process may use at most where tensors live, and what they are; free or not."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, f"the {properties.total_memory / 2**30:.0f} GiB of {properties.name}"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min([total, *memory_limits()])
    what = "this machine's memory" if limit == total else "the container's memory"
    return limit, f"{limit / 2**30:.1f} GiB, {what}"


def memory_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the memory limits of this process's control groups, versions 2 and 1, in bytes."""
    limits = []
    for folder in [*cgroup_folders(root), root / "memory"]:
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                limits.append(int((folder / name).read_text()))
    return limits


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a device's or the machine's refusal of memory into one sentence.

    Raises:
        ConfigError: what was asked for does not fit.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        reason = reason.partition("err == 0. ")[2] or reason  # what stands before it is PyTorch's own check
        raise ConfigError(
            f"no memory is left ({reason}): lower micro_batch_size and raise gradient_accumulation_steps, set "
            "activation_checkpointing = true, or make the model smaller"
        ) from error
