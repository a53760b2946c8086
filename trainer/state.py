"""Checkpoints: all that a killed run needs to go on bit for bit, written so that a crash leaves the previous one whole.

    checkpoints/step-00000500/state.pt         weights and optimizer in fp32, step, recipe, data hash, random state
    checkpoints/step-00000500/shard-*.safetensors   weights and optimizer where processes hold shards of them (FSDP2)
    checkpoints/step-00000500/manifest.json    size and sha256 of every file; written last
    checkpoints/best.json                      the step with the lowest held-out loss

A folder appears under its name by one rename. What cannot be trusted is passed over with a message, never deleted
before a newer one stands.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.checkpoint import load_tensors, save_tensors
from shared.errors import StorageError, WeightsError
from shared.files import atomic_folder, reading_errors, sha256_file, write_atomically
from trainer.shards import read_whole

logger = logging.getLogger("trainer")

FORMAT = 2
FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest held-out loss, in nats per token, mean over sources."""

    step: int
    loss: float


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Describe the folder; nothing is read or written yet.

        Args:
            keep: newest checkpoints that stay; the best one stays besides.
        """
        self.folder = folder
        self.keep = keep
        self.damaged: set[int] = set()

    def clear_half_written(self) -> None:
        """Remove what a killed save left. Only the one process that trains the run may do this."""
        for half_written in sorted(self.folder.glob(".step-*")):
            logger.warning("removing %s: a save was cut short there", half_written.name)
            shutil.rmtree(half_written, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        matches = (FOLDER.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, payload: dict[str, Any], write_shards: Callable[[Path], None] | None = None) -> None:
        """Write `payload`, whose "step" names it, then drop what is neither among the newest nor the best.

        Args:
            write_shards: writes the numbers that are not in `payload` into the folder it is given.

        Raises:
            StorageError: the disk refused; every earlier checkpoint is still there.
        """
        step = int(payload["step"])
        with atomic_folder(self.path(step)) as folder:
            if write_shards is not None:
                write_shards(folder)
            shards = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
            whole = {**payload, "in_shards": write_shards is not None}
            digests = {**shards, "state.pt": save_tensors(folder / "state.pt", whole, crc32=False)}
            files = {
                name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests.items()
            }
            manifest = {"format": FORMAT, "step": step, "data_hash": payload["data_hash"], "files": files}
            write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        self.damaged.discard(step)
        self.prune()

    def prune(self) -> None:
        """Drop what was found damaged, and all but the newest and the best. Called when a whole one has been saved."""
        best = self.best()
        for step in [*self.damaged, *[step for step in self.steps() if step not in self.damaged][: -self.keep]]:
            if best is None or step != best.step:
                shutil.rmtree(self.path(step), ignore_errors=True)
        self.damaged.clear()

    def load(self, step: int, *, keep_shards: bool = False, check: bool = True) -> dict[str, Any]:
        """Read one checkpoint after checking every byte of it.

        Args:
            keep_shards: leave shards on the disk, for processes that read each their own; "shards" says where.
            check: not where another process has just done it.

        Raises:
            WeightsError: it is missing, half-written or damaged.
        """
        folder = self.path(step)
        if check:
            check_files(folder)
        payload = load_tensors(folder / "state.pt")
        if not payload["in_shards"]:
            return payload
        return {**payload, "shards": folder} if keep_shards else read_whole(folder, payload)

    def load_newest(self, *, keep_shards: bool = False) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole, saying which ones are not; None where there are none at all.

        Raises:
            WeightsError: there are checkpoints, but every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step, keep_shards=keep_shards)
            except WeightsError as error:
                logger.warning("%s; passing over it", error)
                self.damaged.add(step)
        if steps:
            raise WeightsError(
                f"all {len(steps)} checkpoints in {self.folder} are damaged; restore one, or move that folder away "
                "to train from the beginning"
            )
        return None

    def choose(self, which: str) -> int:
        """Turn "last", "best" or a number into a step that has a checkpoint.

        Raises:
            WeightsError: there is none such.
        """
        steps = self.steps()
        if not steps:
            raise WeightsError(f"{self.folder} holds no checkpoint; train first")
        best = self.best()
        known = {"last": steps[-1], "best": best.step if best else steps[-1]} | {str(step): step for step in steps}
        if which not in known:
            raise WeightsError(f"checkpoint {which!r} is not there; choose {', '.join(known)}")
        return known[which]

    def best(self) -> Best | None:
        """Return the best checkpoint so far, if it is still there."""
        try:
            content = json.loads((self.folder / "best.json").read_text(encoding="utf-8"))
            best = Best(int(content["step"]), float(content["loss"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return best if self.path(best.step).is_dir() and best.step not in self.damaged else None

    def mark_best(self, best: Best) -> None:
        """Protect the checkpoint of `best.step`, which must have been saved, until a better one is marked."""
        assert self.path(best.step).is_dir(), "save the checkpoint before marking it"
        write_atomically(self.folder / "best.json", json.dumps({"step": best.step, "loss": best.loss}) + "\n")
        self.prune()


def check_files(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        WeightsError: it is missing, half-written or damaged.
        StorageError: it may not be read, which is no damage.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version = manifest["format"]
        files = manifest["files"] if version == FORMAT else {}
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise WeightsError(f"checkpoint {folder} is missing or half-written") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"checkpoint {folder} has an unreadable manifest ({error})") from error
    if version != FORMAT:
        raise WeightsError(f"checkpoint {folder} has format {version}; this trainer reads format {FORMAT}")
    for name, (size, digest) in expected.items():
        path = folder / name
        with reading_errors(path):
            is_whole = path.is_file() and path.stat().st_size == size and sha256_file(path) == digest
        if not is_whole:
            raise WeightsError(f"checkpoint {path} is not what its manifest describes; it is damaged")


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start what cannot be saved.

    Raises:
        StorageError: less than `needed_bytes` are free where `folder` lies.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"{folder} has {free / 1e9:.1f} GB free and checkpoints and export need {needed_bytes / 1e9:.1f} GB; "
            "free some space or set SMOLLM_RUNS_DIR to another disk"
        )
