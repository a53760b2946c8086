"""Checkpoints: whole or not there, and never one lost to another's failure."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import StorageError, WeightsError
from tests.trainer.small_run import ROOT
from trainer.state import Best, Checkpoints, check_free_space


def payload(step: int) -> dict[str, Any]:
    return {"step": step, "data_hash": "data", "weights": torch.full((1000,), float(step)), "note": None}


def checkpoints_with(folder: Path, steps: list[int], *, keep: int = 10) -> Checkpoints:
    checkpoints = Checkpoints(folder / "checkpoints", keep=keep)
    for step in steps:
        checkpoints.save(payload(step))
    return checkpoints


def newest(checkpoints: Checkpoints) -> int:
    state = checkpoints.load_newest()
    assert state is not None
    assert torch.equal(state["weights"], torch.full((1000,), float(state["step"])))
    return int(state["step"])


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, [10, 20], keep=2)
    checkpoints.mark_best(Best(10, 3.5))
    for step in (30, 40, 50):
        checkpoints.save(payload(step))
    assert checkpoints.steps() == [10, 40, 50]
    assert checkpoints.best() == Best(10, 3.5)
    checkpoints.mark_best(Best(50, 3.0))
    assert checkpoints.steps() == [40, 50]
    assert [checkpoints.choose(which) for which in ("last", "best", "40")] == [50, 50, 40]
    with pytest.raises(WeightsError, match="'30' is not there; choose last, best, 40, 50"):
        checkpoints.choose("30")


def test_nothing_saved_is_nothing_to_load(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert checkpoints.load_newest() is None
    with pytest.raises(WeightsError, match="holds no checkpoint; train first"):
        checkpoints.choose("last")


@pytest.mark.parametrize("damage", ["cut", "flip", "no state", "no manifest", "bad manifest", "format"])
def test_passes_over_a_damaged_one_and_says_so(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = checkpoints_with(tmp_path, [10, 20])
    state, manifest = checkpoints.path(20) / "state.pt", checkpoints.path(20) / "manifest.json"
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "no state":
        state.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    assert newest(checkpoints) == 10
    assert "step-00000020" in caplog.text
    assert "passing over it" in caplog.text
    assert checkpoints.steps() == [10, 20], "nothing is deleted before a newer one stands"
    checkpoints.keep = 1
    checkpoints.save(payload(15))
    assert checkpoints.steps() == [15]


def test_says_when_every_one_is_damaged(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, [10, 20])
    for step in (10, 20):
        (checkpoints.path(step) / "state.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"all 2 checkpoints in .* are damaged"):
        checkpoints.load_newest()


def test_a_full_disk_keeps_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = checkpoints_with(tmp_path, [10], keep=1)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(StorageError, match="no space is left on the disk"):
            checkpoints.save(payload(20))
    assert newest(checkpoints) == 10
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000010"]


def test_refuses_to_start_without_room(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1)
    with pytest.raises(StorageError, match="GB free"):
        check_free_space(tmp_path, 10**18)


def test_a_save_that_is_killed_leaves_the_previous_one(tmp_path: Path) -> None:
    checkpoints = checkpoints_with(tmp_path, [10])
    # Dies on the way from the written folder to its name: the last moment at which nothing may have changed yet.
    program = """
import os, signal, sys, torch
from pathlib import Path
import shared.files
shared.files.put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from trainer.state import Checkpoints
Checkpoints(Path(sys.argv[1]), keep=1).save({"step": 20, "data_hash": "data", "weights": torch.zeros(10)})
"""
    ended = subprocess.run([sys.executable, "-c", program, str(checkpoints.folder)], cwd=ROOT, check=False)
    assert ended.returncode == -9
    assert any(path.name.startswith(".step-") for path in checkpoints.folder.iterdir())
    assert newest(checkpoints) == 10
    checkpoints.clear_half_written()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000010"]
