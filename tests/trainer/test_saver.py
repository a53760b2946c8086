"""Saving beside training: from a copy, in order, and never silently failing; on a disk that is really full."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import StorageError
from tests.trainer.kills import wait_for
from tests.trainer.small_run import command, small_directories, train_small, weights_sha256
from trainer.run_folder import RunFolder, read_rows
from trainer.saver import Saver, snapshot
from trainer.state import Best, Checkpoints


def payload(step: int, weights: torch.Tensor) -> dict[str, Any]:
    return {"step": step, "data_hash": "data", "weights": weights}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def saver(checkpoints: Checkpoints) -> Iterator[Saver]:
    saver = Saver(checkpoints)
    yield saver
    saver.close()


def test_what_is_written_is_the_state_at_the_call(checkpoints: Checkpoints, saver: Saver) -> None:
    weights = torch.zeros(1_000_000)
    for step in (1, 2, 3):
        weights.fill_(float(step))
        saver.save(payload(step, weights))
        weights.fill_(-1.0)  # as the next update would
    saver.wait()
    assert not saver.is_busy
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.load(3)["weights"].unique().tolist() == [3.0]
    assert checkpoints.load(2)["weights"].unique().tolist() == [2.0]


def test_the_best_is_marked_after_it_is_written(checkpoints: Checkpoints, saver: Saver) -> None:
    saver.save(payload(1, torch.zeros(1_000_000)))
    saver.mark_best(Best(1, 3.0))
    assert saver.best == Best(1, 3.0)
    for step in (2, 3, 4):
        saver.save(payload(step, torch.zeros(10)))
    saver.wait()
    assert checkpoints.best() == Best(1, 3.0)
    assert checkpoints.steps() == [1, 3, 4]


def test_a_failed_save_is_raised_in_the_run(checkpoints: Checkpoints, saver: Saver) -> None:
    checkpoints.folder.write_text("a file where the folder belongs")
    saver.save(payload(2, torch.zeros(10)))
    with pytest.raises(StorageError, match=r"checkpoints.*a file stands where a folder is needed"):
        saver.save(payload(3, torch.zeros(10)))
    checkpoints.folder.unlink()
    saver.save(payload(4, torch.zeros(10)))
    saver.wait()
    assert checkpoints.steps() == [4]


def test_a_copy_shares_nothing(saver: Saver) -> None:
    original = {"a": [torch.zeros(3)], "b": {"c": torch.ones(2)}, "d": 5}
    copy = snapshot(original)
    original["a"][0].fill_(9)  # type: ignore[index]
    assert copy["a"][0].tolist() == [0, 0, 0]
    assert (copy["b"]["c"].tolist(), copy["d"]) == ([1, 1], 5)


class SmallDisk:
    """A tmpfs of a few megabytes at a folder, in a mount namespace of its own that lives as long as this object."""

    def __init__(self, folder: Path, *, megabytes: int) -> None:
        script = f"mount -t tmpfs -o size={megabytes}m tmpfs '{folder}' && echo mounted && exec sleep 600"
        self.holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout
        self.is_there = self.holder.stdout.readline() == "mounted\n"
        self.enter = ["nsenter", "--preserve-credentials", "--user", "--mount", "-t", str(self.holder.pid)]
        self.seen_from_here = Path(f"/proc/{self.holder.pid}/root") / folder.relative_to("/")

    def close(self) -> None:
        self.holder.kill()
        self.holder.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if sys.platform != "linux" or not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("mounting a small disk needs Linux namespaces")
    (tmp_path / "runs").mkdir()
    disk = SmallDisk(tmp_path / "runs", megabytes=8)
    try:
        if not disk.is_there:
            pytest.skip("this system lets nobody but root mount")
        yield disk
    finally:
        disk.close()


def test_a_full_disk_stops_the_run_and_costs_nothing(small_disk: SmallDisk, tmp_path: Path) -> None:
    small_directories(tmp_path)
    folder = RunFolder(small_disk.seen_from_here / "smoke")
    process = command(tmp_path, "train", "smoke", before=small_disk.enter)
    filler = small_disk.seen_from_here / "filler"
    assert wait_for(lambda: any(folder.checkpoints.glob("step-*")), process), process.communicate()[1]
    room = shutil.disk_usage(small_disk.seen_from_here).free - 200_000  # less than a checkpoint of 377 kB
    filler.write_bytes(b"\0" * max(0, room))
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 2, errors
    last = errors.strip().splitlines()[-1]
    assert "no space is left on the disk; free some" in last
    assert "the same command goes on from there" in last
    assert "Traceback" not in errors
    filler.unlink()
    process = command(tmp_path, "train", "smoke", before=small_disk.enter)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "resuming run 'smoke'" in errors
    assert [row["step"] for row in read_rows(folder.metrics) if row["kind"] == "train"] == list(range(1, 21))
    assert weights_sha256(folder) == weights_sha256(train_small(tmp_path / "undisturbed"))
    assert os.path.ismount(small_disk.seen_from_here)
