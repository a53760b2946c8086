"""The processes of one run under `torchrun`: rank 0 leads, the others do what it says next.

One loop decides (`trainer.run`, on rank 0: logging, evaluation, checkpoints, stopping, rolling back). Before anything
that all processes must do together it tells the others by one message of three numbers over gloo on the CPU, about
0.1 ms, while the device still works. In the same message every process says whether it was asked to stop. Without
torchrun there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from shared.errors import ConfigError, DataError
from trainer.config import Torchrun

logger = logging.getLogger("trainer")

T = TypeVar("T")

PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for the others: the first may be preparing text, evaluating or exporting."""


class Command(IntEnum):
    """What all processes do next, together."""

    END = 0
    STEP = 1
    """One update."""
    RESTORE = 2
    """Take over the checkpoint of a step; 0: fresh weights."""
    GATHER = 3
    """Give the leader the whole weights."""
    SAVE_SHARDS = 4
    """Write this process's shards into the leader's half-written checkpoint of a step."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of its run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def join(cls, device: str) -> Processes:
        """Meet the other processes where torchrun started this one; alone otherwise.

        Args:
            device: the recipe's; under torchrun each process takes the GPU of its local rank.

        Raises:
            ConfigError: the recipe names one GPU for all processes, or a node has fewer GPUs than processes.
        """
        launched = Torchrun.read()
        if launched is None:
            return cls()
        uses_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is {device!r}, and each of torchrun's processes takes its own: say cuda or cpu")
        if uses_cuda:
            if launched.local_rank >= torch.cuda.device_count():
                raise ConfigError(
                    f"torchrun started {launched.local_world_size} processes here and PyTorch sees "
                    f'{torch.cuda.device_count()} GPUs: lower --nproc-per-node, or set device = "cpu"'
                )
            torch.cuda.set_device(launched.local_rank)
        # Tensors on the CPU travel over gloo, which carries the messages; those on a GPU over NCCL.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if uses_cuda else "gloo",
            store=meeting_place(launched),
            rank=launched.rank,
            world_size=launched.world_size,
            timeout=PATIENCE,
        )
        return cls(
            rank=launched.rank,
            world_size=launched.world_size,
            local_rank=launched.local_rank,
            local_world_size=launched.local_world_size,
        )

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1 and not dist.is_initialized()

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def tell(self, command: Command, step: int = 0) -> bool:
        """Say what comes next; only the leader does. True where any process was asked to stop."""
        assert self.is_leader, "only the leader tells"
        return False if self.is_alone else bool(self._exchange(command, step, stop=False)[2])

    def hear(self, *, stop: bool) -> tuple[Command, int]:
        """Wait for what comes next, and say whether this process was asked to stop."""
        command, step, _ = self._exchange(Command.END, 0, stop=stop)
        return Command(command), step

    def _exchange(self, command: Command, step: int, *, stop: bool) -> list[int]:
        message = torch.tensor([command, step, stop], dtype=torch.int64)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        return message.tolist()

    def share_text(self, text: str = "") -> str:
        """Return the leader's `text` in every process."""
        size = torch.tensor(len(text.encode()))
        dist.broadcast(size, src=0)
        content = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_leader:
            content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        return content.numpy().tobytes().decode()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do something that leaves files behind: the leader first, then one process per node, then all others.

        The later ones find done what was done on a disk they share.
        """
        turn = 0 if self.is_leader else 1 if self.local_rank == 0 else 2
        for now in range(3):
            if turn == now:
                result = work()
            if not self.is_alone:
                dist.barrier()
        return result

    def agree_on(self, what: str, digest: str) -> None:
        """Check that all processes have the same of something.

        Raises:
            DataError: this one's differs from the leader's.
        """
        if self.is_alone:
            return
        mine = torch.frombuffer(bytearray(bytes.fromhex(digest)), dtype=torch.uint8)
        leaders = mine.clone()
        dist.broadcast(leaders, src=0)
        same = torch.tensor(torch.equal(mine, leaders))
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        if not same:
            raise DataError(
                f"process {self.rank} has {what} with hash {digest[:12]} and process 0 has "
                f"{leaders.numpy().tobytes().hex()[:12]}: bring the same files to every node"
            )

    def share_of(self, num_rows: int, micro_batch_size: int) -> range:
        """Return the first rows of this process's micro-batches; the processes' rows follow one another.

        Raises:
            ConfigError: the step's micro-batches cannot be shared out equally.
        """
        num_micro_batches, rest = divmod(num_rows, micro_batch_size)
        assert rest == 0, "a step is whole micro-batches"
        if num_micro_batches % self.world_size:
            raise ConfigError(
                f"{num_rows} rows per step are {num_micro_batches} micro-batches of {micro_batch_size}, which "
                f"{self.world_size} processes cannot share equally: change micro_batch_size and "
                "gradient_accumulation_steps, keeping their product"
            )
        per_process = num_rows // self.world_size
        return range(self.rank * per_process, (self.rank + 1) * per_process, micro_batch_size)

    def all_rows(self, mine_B: Tensor) -> Tensor:
        """Put every process's rows together in the order of the step."""
        if self.is_alone:
            return mine_B
        rows = [torch.empty_like(mine_B) for _ in range(self.world_size)]
        dist.all_gather(rows, mine_B)
        return torch.cat(rows)

    def leave(self) -> None:
        """Say goodbye to the others and end this process; alone, do nothing.

        Everything is written and closed by now. Python's own end destroys gloo's threads in an order that aborts a
        process now and then (torch 2.13: "terminate called without an active exception"), after which torchrun would
        start all of them again.
        """
        if self.is_alone:
            return
        dist.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def meeting_place(launched: Torchrun) -> Any:
    """Return where the processes of this start leave their addresses for each other.

    Torchrun keeps one store over all its restarts (torch 2.13, dynamic_rendezvous.py), so that without a prefix of
    their own they would find the addresses of the dead.
    """
    store, _, _ = next(rendezvous("env://", launched.rank, launched.world_size, timeout=PATIENCE))
    start = f"start-{launched.torchelastic_restart_count}-of-{launched.world_size}"
    return dist.PrefixStore(start, store)  # type: ignore[attr-defined]
