"""Text files as documents: the unit that is held out or trained on as a whole, and ends with <|endoftext|>.

- `.jsonl`: one document a line: the field `text`, or `question` and `answer` as one worked problem.
- `.txt`: paragraphs (parted by blank lines) gathered until a document has `TARGET_CHARACTERS`.
- any other, such as `.py` or `.md`: the whole file.

What is longer than `MAX_CHARACTERS` is cut, so that memory stays bounded whatever a file holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.errors import DataError
from shared.files import reading_errors

TARGET_CHARACTERS = 2_000
MAX_CHARACTERS = 64_000
MAX_JSON_CHARACTERS = 16_000_000

NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")
"""NUL and lone surrogates: a JSON escape can write what no UTF-8 text file holds."""


class FileDocuments:
    """The documents of some files in order, never empty ones; `position` says where the next one begins."""

    def __init__(self, paths: Sequence[Path], position: Any = None) -> None:
        self._paths = paths
        self._index: int = position[0] if position else 0
        start: int = position[1] if position else 0
        self._lines: Lines | None = None
        self._documents = self._walk(start)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """
        Raises:
            DataError: a file is missing, binary, not UTF-8, or a JSON line has none of the known fields.
        """
        return next(self._documents)

    def position(self) -> Any:
        return [self._index, self._lines.position() if self._lines else 0]

    def _walk(self, start: int) -> Iterator[str]:
        while self._index < len(self._paths):
            path = self._paths[self._index]
            with Lines(path, start) as self._lines:
                yield from documents_of(self._lines, path)
            self._lines, start = None, 0
            self._index += 1


def documents_of(lines: Lines, path: Path) -> Iterator[str]:
    if path.suffix == ".jsonl":
        return json_documents(lines, path)
    return paragraph_documents(lines) if path.suffix == ".txt" else whole_documents(lines)


class Lines:
    """A text file's lines, longer ones in pieces, line ends as \\n."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        self._max_characters = MAX_JSON_CHARACTERS if path.suffix == ".jsonl" else MAX_CHARACTERS
        with reading_errors(path, DataError):
            # Some editors begin a file with a byte-order mark.
            self._file = path.open(encoding="utf-8-sig", newline=None)
        self._file.seek(start)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        while line := self.read():
            yield line

    def read(self) -> str:
        try:
            with reading_errors(self._path, DataError):
                line = self._file.readline(self._max_characters)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path} is not UTF-8 text ({error.reason}): convert it to UTF-8{hint(self._path)}"
            ) from error
        if "\0" in line:
            raise DataError(
                f"{self._path} holds NUL bytes: it is not text; give a plain UTF-8 text file{hint(self._path)}"
            )
        return line

    def position(self) -> int:
        """What `start` takes to go on after the last line given."""
        return self._file.tell()


def hint(path: Path) -> str:
    """What to do with a file that is data, but not text."""
    return ", or list its folder in data.datasets" if path.suffix in (".parquet", ".arrow", ".gz", ".zst") else ""


def paragraph_documents(lines: Iterator[str] | Lines) -> Iterator[str]:
    """Gather paragraphs into documents of about `TARGET_CHARACTERS`."""
    pieces: list[str] = []
    size = 0
    for line in lines:
        at_border = size >= TARGET_CHARACTERS and not line.strip()
        if not at_border:
            pieces.append(line)
            size += len(line)
        if at_border or size >= MAX_CHARACTERS:
            yield from not_empty(pieces)
            pieces, size = [], 0
    yield from not_empty(pieces)


def whole_documents(lines: Iterator[str] | Lines) -> Iterator[str]:
    """One document, or several of `MAX_CHARACTERS`."""
    pieces: list[str] = []
    size = 0
    for line in lines:
        pieces.append(line)
        size += len(line)
        if size >= MAX_CHARACTERS:
            yield from not_empty(pieces)
            pieces, size = [], 0
    yield from not_empty(pieces)


def not_empty(pieces: list[str]) -> Iterator[str]:
    text = "".join(pieces).strip("\n")
    if text.strip():
        yield text + "\n"


def json_documents(lines: Iterator[str] | Lines, path: Path) -> Iterator[str]:
    """Read one JSON object a line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON: {error}") from error
        text = document_text(row)
        if text is None:
            raise DataError(f"{path} line {number} has no field 'text', nor 'question' and 'answer'")
        if escaped := NO_TEXT.search(text):
            raise DataError(f"{path} line {number} escapes U+{ord(escaped[0]):04X}, which no text holds: remove it")
        if text.strip():
            yield text


def document_text(row: object) -> str | None:
    """Return the text of one JSON row, or None where it has none of the known fields."""
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return worked_problem(row["question"], row["answer"])
    return None


def worked_problem(question: str, answer: str) -> str:
    """The one form all maths takes here."""
    return f"Question: {question.strip()}\nAnswer: {answer.strip()}\n"
