"""Files and folders are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from shared import files
from shared.errors import StorageError
from shared.files import atomic_folder, sha256_file, storage_errors, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize("content", ["grüße\n", b"\x00\xff"])
def test_write_replaces_and_leaves_nothing_else(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
        assert folder.name.startswith(".")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["a"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    target = tmp_path / "model"
    for name in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError, match="on the way"), atomic_folder(target) as folder:
        (folder / "new").touch()
        raise RuntimeError("on the way")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["model"]


def replace_often(target: Path, mark: str, rounds: int) -> None:
    for _ in range(rounds):
        with atomic_folder(target) as folder:
            for part in range(4):
                (folder / str(part)).write_text(mark)


def test_writers_at_once_never_mix(tmp_path: Path) -> None:
    target = tmp_path / "model"
    replace_often(target, "start", 1)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=replace_often, args=(target, mark, 20)) for mark in ("a", "b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert target.is_dir(), "a reader must always find a folder"
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len({path.read_text() for path in target.iterdir()}) == 1
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(errno.ENOSPC, "no space"), (errno.EACCES, "permission"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")],
)
def test_refusals_of_the_disk_name_the_path(code: int, sentence: str) -> None:
    with pytest.raises(StorageError, match=f"cannot write /models/x: .*{sentence}"), storage_errors(Path("/models/x")):
        raise OSError(code, os.strerror(code))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(StorageError, match="no space"), storage_errors(path), full.open("w") as file:
        file.write("x" * 100_000)
    assert path.read_text() == "old"
