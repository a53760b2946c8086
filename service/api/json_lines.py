"""JSON-lines files that a trainer appends to, as what their rows come to; a look parses only what is new.

A file may also be cut by a crash, or be written anew by a run that goes on from a checkpoint.
"""

from __future__ import annotations

import copy
import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

Row = dict[str, Any]
Kept = TypeVar("Kept")

NUM_TAIL_BYTES = 256
"""Of what was read: where other bytes stand in their place, the file is another one. Rows tell times and speeds."""
NUM_FILES_KEPT = 8
"""Files whose rows are held in memory: those that somebody looks at."""


class JsonLines(Generic[Kept]):
    """One file folded row by row. Lines that are cut or no objects are left out; no file has no rows."""

    def __init__(self, path: Path, *, start: Callable[[], Kept], add: Callable[[Kept, Row], object]) -> None:
        self._path = path
        self._start = start
        self._add = add
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._begin()

    def look(self) -> Kept:
        """Return what the rows come to by now."""
        with self._lock:
            try:
                stat = self._path.stat()
                if (stat.st_mtime_ns, stat.st_size) != self._stamp:
                    self._read()
                    self._stamp = (stat.st_mtime_ns, stat.st_size)
            except OSError:
                self._begin()
                self._stamp = None
            return copy.copy(self._kept)

    def _begin(self) -> None:
        self._kept = self._start()
        self._num_read = 0
        self._tail = b""

    def _read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._num_read - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._begin()
                file.seek(0)
            new = file.read()
        *lines, cut = new.split(b"\n")
        for line in lines:
            self._take(line)
        if not self._take(cut):
            new = new[: len(new) - len(cut)]
        self._num_read += len(new)
        self._tail = (self._tail + new)[-NUM_TAIL_BYTES:]

    def _take(self, line: bytes) -> bool:
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return False
        if isinstance(row, dict):
            self._add(self._kept, row)
        return True


@functools.lru_cache(maxsize=NUM_FILES_KEPT)
def rows_of(path: Path) -> JsonLines[list[Row]]:
    """All rows."""
    return JsonLines(path, start=list, add=list.append)


@functools.cache
def last_rows_of(path: Path) -> JsonLines[dict[str, Row]]:
    """The last row of each kind: little, so it is kept for every run there ever was."""
    return JsonLines(path, start=dict, add=lambda kept, row: kept.__setitem__(str(row.get("kind")), row))
