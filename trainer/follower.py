"""What every process but the first does under torchrun: hear the leader, do it with the others, hear again."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from shared.errors import StorageError
from trainer.config import TrainConfig
from trainer.parallel import whole_weights
from trainer.prepare import PreparedData
from trainer.processes import Command, Processes
from trainer.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.state import Checkpoints
from trainer.train import Trainer


def follow(config: TrainConfig, data: PreparedData, folder: RunFolder, processes: Processes) -> None:
    """Train with the leader until it says that it is over. Only the leader logs, decides and saves.

    Raises:
        WeightsError: the leader's checkpoint is not to be seen from here.
    """
    trainer = Trainer(config, data, processes)
    checkpoints = Checkpoints(folder.checkpoints, keep=config.keep_checkpoints)
    with StopRequest() as stop:
        while True:
            command, step = processes.hear(stop=stop.requested)
            match command:
                case Command.END:
                    return
                case Command.STEP:
                    trainer.train_step()
                case Command.RESTORE:
                    restore(trainer, checkpoints, step)
                case Command.GATHER:
                    whole_weights(trainer.model)
                case Command.SAVE_SHARDS:
                    save_shards(trainer, Path(processes.share_text()))


def restore(trainer: Trainer, checkpoints: Checkpoints, step: int) -> None:
    """Take over the checkpoint the leader has found whole; 0: begin with fresh weights."""
    trainer.start_afresh()
    if step > 0:
        trainer.restore(checkpoints.load(step, keep_shards=trainer.is_sharded, check=False))


def save_shards(trainer: Trainer, folder: Path) -> None:
    """Write this process's shards; what goes wrong the leader hears too, and says."""
    try:
        trainer.write_shards(folder)
    except (StorageError, CheckpointException):
        return
