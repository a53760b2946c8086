"""Token files in the making: written as they come, so that a prepare that was killed goes on from its last note.

They grow in a folder beside the finished one, `.NAME.unfinished/`. `note.json` says how much of each file counts and
where the text goes on; it is written after the tokens it counts are on the disk. What lies beyond it is cut off on
the next start, so a file never holds a document twice, nor half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from shared.files import put_in_place, storage_errors, sync, sync_folder, write_atomically
from trainer.token_file import HELD_OUT, MANIFEST, TOKEN_DTYPE, TRAIN

NOTE = "note.json"
NOTE_EVERY_S = 5.0
"""What a kill costs at most; a note waits for the disk."""

REHASHED_BYTES = 2**24


class TokenWriter:
    """Appends documents' ids to a file, counting and hashing what it writes."""

    def __init__(self, path: Path, counts: Mapping[str, int] | None = None) -> None:
        """Begin a file, or go on after the tokens that `counts` of an earlier writer counted."""
        counts = counts or {}
        self.num_tokens = counts.get("num_tokens", 0)
        self.num_documents = counts.get("num_documents", 0)
        self.num_bytes = counts.get("num_bytes", 0)
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("r+b" if counts else "wb")
        self._file.truncate(self.num_tokens * TOKEN_DTYPE.itemsize)
        while data := self._file.read(REHASHED_BYTES) if counts else b"":
            self._digest.update(data)

    def write(self, ids: array[int], *, num_bytes: int) -> None:
        """Append one document, its end token included; `num_bytes` is its text's length in UTF-8."""
        data = ids.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.num_tokens += len(ids)
        self.num_documents += 1
        self.num_bytes += num_bytes

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def counts(self) -> dict[str, int]:
        return {"num_tokens": self.num_tokens, "num_documents": self.num_documents, "num_bytes": self.num_bytes}

    def summary(self) -> dict[str, Any]:
        return {**self.counts(), "sha256": self._digest.hexdigest()}


class UnfinishedTokens:
    """One source's two files until they are whole; `with` closes them, `finish` puts them in place."""

    def __init__(self, folder: Path, note: Mapping[str, Any]) -> None:
        """Open or go on with the files of `folder`, as its `note` says.

        Raises:
            StorageError: the disk refused.
        """
        self.target, self.folder = folder, unfinished(folder)
        self.position: Any = note.get("position")
        self._header = {key: note[key] for key in ("identity", "survey")}
        parts = note.get("parts", {})
        with storage_errors(self.folder):
            if not parts:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
            self.train = TokenWriter(self.folder / TRAIN, parts.get("train"))
            self.held_out = TokenWriter(self.folder / HELD_OUT, parts.get("held_out"))
        self._noted_at = time.monotonic()

    def __enter__(self) -> UnfinishedTokens:
        return self

    def __exit__(self, *_: object) -> None:
        self.train.close()
        self.held_out.close()

    @property
    def num_tokens(self) -> int:
        return self.train.num_tokens + self.held_out.num_tokens

    @property
    def num_bytes(self) -> int:
        return self.train.num_bytes + self.held_out.num_bytes

    def note_now_and_then(self, position: Any) -> None:
        """Remember, every few seconds, that all before `position` of the text is in the files."""
        if time.monotonic() - self._noted_at >= NOTE_EVERY_S:
            self.note(position)

    def note(self, position: Any) -> None:
        self.train.sync()
        self.held_out.sync()
        parts = {"train": self.train.counts(), "held_out": self.held_out.counts()}
        content = {**self._header, "position": position, "parts": parts}
        write_atomically(self.folder / NOTE, json.dumps(content))
        self._noted_at = time.monotonic()

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest and let the folder take the finished one's place in one step."""
        whole = {**manifest, "train": self.train.summary(), "held_out": self.held_out.summary()}
        self.train.sync()
        self.held_out.sync()
        (self.folder / NOTE).unlink(missing_ok=True)
        for half_written in self.folder.glob(f".{NOTE}.*.tmp"):  # of a process that was killed in the middle of a note
            half_written.unlink()
        (self.folder / MANIFEST).write_text(json.dumps(whole, indent=2) + "\n")
        sync(self.folder / MANIFEST)
        put_in_place(self.folder, self.target)
        shutil.rmtree(self.folder, ignore_errors=True)  # what stood there before changed places with it
        sync_folder(self.target.parent)
        return whole


def unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


def read_note(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a killed prepare of the same text, tokenizer and split noted last, if its files are there."""
    work = unfinished(folder)
    try:
        note = json.loads((work / NOTE).read_bytes())
        sizes = {name: (work / file).stat().st_size for name, file in (("train", TRAIN), ("held_out", HELD_OUT))}
        whole = all(sizes[name] >= note["parts"][name]["num_tokens"] * TOKEN_DTYPE.itemsize for name in sizes)
        return note if note["identity"] == identity and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
