"""Files that are whole or not there: hashes, atomic writes, a folder swapped in as one, locks, and refusals told."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.errors import SmolLMError, StorageError

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new, never a mixture.

    Raises:
        StorageError: the disk refused.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it takes `target`'s place in one step.

    What stood at `target` is removed as a whole. When the block raises, `target` is untouched. The folder in the
    making starts with a dot, so that listings of models or checkpoints pass over it.

    Raises:
        StorageError: the disk refused, now or while the block wrote.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(target):
        refuse_file(target)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            sync_folder(temporary)
            put_in_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(target.parent)


def check_target(target: Path) -> None:
    """Refuse before hours of work what `atomic_folder` would refuse after them.

    Raises:
        StorageError: nothing can be written beside `target`, or a file has its name.
    """
    with storage_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    with storage_errors(target):
        refuse_file(target)


def refuse_file(target: Path) -> None:
    if target.is_file():
        raise FileExistsError(errno.EEXIST, "a file has the folder's name", str(target))


def put_in_place(folder: Path, target: Path) -> None:
    """Move `folder` to `target`. Where a folder stands there the two change places, and the old one goes."""
    if not target.exists():
        try:
            folder.rename(target)
            return
        except OSError as error:  # another process has put its folder there in the meantime
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    if exchange(folder, target):
        return
    # No such call on this system: for an instant `target` is absent, and a reader simply does not list it.
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the system or its file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library older than 2018
        return False
    return bool(rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk. File systems that cannot say so are let be."""
    with contextlib.suppress(OSError):
        sync(folder)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals into one sentence that names the path."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space is left on the disk; free some",
            errno.EDQUOT: "the disk quota is used up; free some space",
            errno.EACCES: "permission is denied; give this user the right to write there",
            errno.EPERM: "permission is denied; give this user the right to write there",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENOENT: "the folder it belongs in is not there",
            errno.ENOTDIR: "a file stands where a folder is needed; move it away",
            errno.EEXIST: "a file stands where a folder is needed; move it away",
        }
        if error.errno not in reasons:
            raise
        raise StorageError(f"cannot write {path}: {reasons[error.errno]}") from error


@contextlib.contextmanager
def reading_errors(path: Path, kind: type[SmolLMError] = StorageError) -> Iterator[None]:
    """Turn the system's refusals to let something be read into one sentence that names it.

    Args:
        path: what is read, where the system names nothing itself.
        kind: what to raise.
    """
    try:
        yield
    except OSError as error:
        advice = "; give this user the right to read it" if error.errno in (errno.EACCES, errno.EPERM) else ""
        reason = f"{error.filename or path} cannot be read: {error.strerror or error}{advice}"
        raise kind(reason) from error


@contextlib.contextmanager
def only_one_process(path: Path, *, when_taken: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file, after whoever holds it; the system frees it even when a process is killed.

    Args:
        when_taken: called where another process holds it: to say so before the wait, or to raise.

    Raises:
        StorageError: the disk refused the file.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            when_taken()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
