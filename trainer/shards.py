"""A checkpoint in shards: every process writes its part of the weights and averages, and any layout reads them back.

PyTorch's distributed checkpoints in their safetensors form, whose files hold numbers and JSON: nothing is unpickled.
AdamW's count of updates is not among them; it is the checkpoint's step. The library is imported where it is used: that
takes a second, and few runs need it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shared.errors import WeightsError
from shared.files import storage_errors

WEIGHT = "weight"
AVERAGES = ("exp_avg", "exp_avg_sq")


def named_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return weights and AdamW's averages under names of their own, as they lie: in shards or whole."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"{WEIGHT}/{name}"] = parameter.detach()
        for average in AVERAGES:
            tensors[f"{average}/{name}"] = optimizer.state[parameter][average]
    return tensors


def make_averages(optimizer: Optimizer, *, num_updates: int) -> None:
    """Give AdamW the averages that its first update would make, to be read into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            count = torch.tensor(float(num_updates), device=parameter.device)
            averages = {average: torch.zeros_like(parameter) for average in AVERAGES}
            optimizer.state[parameter] = {"step": count, **averages}


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's shards; all processes must, into a folder that all of them see.

    Raises:
        StorageError: the disk refused one of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with storage_errors(folder):
        try:
            save(tensors, storage_writer=writer)
        except CheckpointException as error:
            refused = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
            if not refused:
                raise
            raise refused[0] from error


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read into tensors that lie as they should, each process its own part; all processes must."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def read_whole(folder: Path, payload: dict[str, Any]) -> dict[str, Any]:
    """Put a sharded checkpoint together in memory: the state that one process alone would have saved.

    Args:
        payload: what lies beside the shards, with the optimizer's groups but none of its numbers.

    Raises:
        WeightsError: the shards cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in found.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():  # it warns that it does what it is asked to
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(tensors, storage_reader=reader, no_dist=True)
    except (OSError, ValueError, KeyError, CheckpointException) as error:
        raise WeightsError(f"the shards in {folder} cannot be read ({error}); restore that folder") from error
    count = torch.tensor(float(payload["step"]))
    groups = payload["optimizer"]["param_groups"]
    names = {
        index: name for group in groups for index, name in zip(group["params"], group["parameter_names"], strict=True)
    }
    state = {
        index: {"step": count.clone()} | {average: tensors[f"{average}/{name}"] for average in AVERAGES}
        for index, name in names.items()
    }
    weights = {name: tensors[f"{WEIGHT}/{name}"] for name in names.values()}
    return {**payload, "model": weights, "optimizer": {"state": state, "param_groups": groups}}
