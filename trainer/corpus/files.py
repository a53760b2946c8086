"""A source's text in files on this disk, and the files, folders and globs that a recipe's `data.files` names."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import DataError
from shared.files import reading_errors, sha256_file
from trainer.corpus.documents import FileDocuments

log = logging.getLogger("trainer")

BYTES_LOOKED_AT = 8_192
"""A file in a folder is text where as much of its beginning is."""


@dataclass(frozen=True)
class FileText:
    """One source's text in files."""

    source: str
    paths: tuple[Path, ...]
    origin: str

    @property
    def max_tokens(self) -> None:
        """Files end by themselves."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def identity(self) -> dict[str, Any]:
        """
        Raises:
            DataError: a file may not be read.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            with reading_errors(path, DataError):
                digest.update(f"{path.suffix} {sha256_file(path)};".encode())
        return {"text_sha256": digest.hexdigest()}

    def open(self, position: Any = None) -> FileDocuments:
        return FileDocuments(self.paths, position)


def named_files(source: str, patterns: Sequence[str]) -> FileText:
    """Return the text of a source that some paths, folders and globs stand for; says what it is.

    Raises:
        DataError: one of them leads to no file, to an empty one, or to what may not be read.
    """
    paths = named_paths(source, patterns)
    others = f"{len(paths):,} files of " if len(paths) > 1 else ""
    text = FileText(source, paths, others + ", ".join(patterns))
    log.info("%s: %s (%s bytes), as data.files says", source, text.origin, f"{text.num_bytes:,}")
    return text


def named_paths(source: str, patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the files, each once, in the order of the patterns, then by name.

    Raises:
        DataError: as `named_files`.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        found = files_of(Path(pattern).expanduser())
        if not found:
            raise leads_nowhere(source, pattern)
        paths |= dict.fromkeys(found)
    for path in paths:
        if path.stat().st_size == 0 and len(paths) == 1:
            raise DataError(f"{path} is empty: fill it, or take it out of data.files")
    return tuple(paths)


def check_leads_somewhere(source: str, patterns: Sequence[str]) -> None:
    """Refuse a mistyped path at once, without walking through what the others stand for.

    Raises:
        DataError: one of them leads to nothing.
    """
    for pattern in patterns:
        path = Path(pattern).expanduser()
        with reading_errors(path, DataError):
            leads_somewhere = path.exists() or any(glob.iglob(str(path), recursive=True))
        if not leads_somewhere:
            raise leads_nowhere(source, pattern)


def leads_nowhere(source: str, pattern: str) -> DataError:
    return DataError(f"data.files of {source!r}: {pattern} leads to no text file; give a file, folder or glob")


def files_of(path: Path) -> list[Path]:
    """A file stands for itself, a folder for the text files below it, a glob for the files it matches.

    Raises:
        DataError: one of them may not be read.
    """
    with reading_errors(path, DataError):
        if path.is_file():
            return [path]
        if path.is_dir():
            return text_files_below(path)
        return sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())


def text_files_below(folder: Path) -> list[Path]:
    """Every file that looks like text; says how many do not. What begins with a dot is passed over.

    Raises:
        OSError: a file or folder may not be read: left out, it would be missed only in what the model does not know.
    """
    visible = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        visible += [path for path in paths if path.is_file()]
    visible.sort()
    texts = [path for path in visible if looks_like_text(path)]
    if others := len(visible) - len(texts):
        log.info("%s: %d files are not UTF-8 text and are passed over", folder, others)
    return texts


def refuse(error: OSError) -> NoReturn:
    raise error


def looks_like_text(path: Path) -> bool:
    with path.open("rb") as file:
        beginning = file.read(BYTES_LOOKED_AT)
    try:
        beginning.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(beginning) - 3:  # the end may cut a character in two
            return False
    return bool(beginning) and b"\0" not in beginning
