"""A file that is hashed and sent to the disk while it is being written, in threads beside the writer.

A checkpoint of SmolLM2-135M has 1.6 GB. Written, then synced, then read again for its sha256 it takes twice as long.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

SMALL_BYTES = 1 << 20
"""Less is hashed on the spot: handing it to a thread costs more."""

SYNC_EVERY_BYTES = 64 << 20


class HashedFile:
    """Takes bytes in order, as `torch.save` gives them: views of memory that are valid during the call only."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._syncer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def write(self, data: Any) -> int:
        """Write and hash one piece.

        Raises:
            OSError: the disk refused this piece, or one before it.
        """
        size = memoryview(data).nbytes
        if size < SMALL_BYTES:
            self._hash.update(data)
            self._file.write(data)
        else:
            hashing = self._hasher.submit(self._hash.update, data)
            try:
                self._file.write(data)
            finally:
                hashing.result()  # the memory may be gone after this call
        self._unsynced += size
        if self._unsynced >= SYNC_EVERY_BYTES and (self._syncing is None or self._syncing.done()):
            self._wait_for_sync()
            self._unsynced = 0
            self._syncing = self._syncer.submit(os.fsync, self._file.fileno())
        return size

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> str:
        """Wait until all of it is on the disk; return the sha256 as 64 hex digits.

        Raises:
            OSError: the disk refused some of it.
        """
        self._file.flush()
        self._wait_for_sync()
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def _wait_for_sync(self) -> None:
        if self._syncing is not None:
            syncing, self._syncing = self._syncing, None
            syncing.result()

    def end_threads(self) -> None:
        self._hasher.shutdown()
        self._syncer.shutdown()


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Open a new file to be written from its beginning to its end; `finish` ends it well."""
    with path.open("wb") as file:
        hashed = HashedFile(file)
        try:
            yield hashed
        finally:
            hashed.end_threads()
