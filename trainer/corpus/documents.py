"""A text file as documents: the unit that is held out or trained on as a whole, and ends with <|endoftext|>.

- `.jsonl`: one document a line: the field `text`, or `question` and `answer` as one worked problem.
- `.txt` and any other: paragraphs (parted by blank lines) gathered until a document has `TARGET_CHARACTERS`. A
  paragraph longer than `MAX_CHARACTERS` is cut, so that memory stays bounded whatever the file holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from shared.errors import DataError

TARGET_CHARACTERS = 2_000
MAX_CHARACTERS = 64_000
MAX_JSON_CHARACTERS = 16_000_000

NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")
"""NUL and lone surrogates: a JSON escape can write what no UTF-8 text file holds."""


def read_documents(path: Path) -> Iterator[str]:
    """Yield a file's documents in order, never empty ones.

    Raises:
        DataError: the file is missing, binary, not UTF-8, or a JSON line has none of the known fields.
    """
    if path.suffix == ".jsonl":
        return json_documents(read_lines(path, max_characters=MAX_JSON_CHARACTERS), path)
    return paragraph_documents(read_lines(path, max_characters=MAX_CHARACTERS))


def read_lines(path: Path, *, max_characters: int) -> Iterator[str]:
    """Yield lines, longer ones in pieces, line ends as \\n."""
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:  # some editors begin a file with a byte-order mark
            while line := file.readline(max_characters):
                if "\0" in line:
                    raise DataError(f"{path} holds NUL bytes: it is not text; give a plain UTF-8 text file")
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def paragraph_documents(lines: Iterator[str]) -> Iterator[str]:
    """Gather paragraphs into documents of about `TARGET_CHARACTERS`."""
    pieces: list[str] = []
    size = 0
    for line in lines:
        blank = not line.strip()
        if (blank and size >= TARGET_CHARACTERS) or size >= MAX_CHARACTERS:
            yield from not_empty(pieces)
            pieces, size = [], 0
        pieces.append(line)
        size += len(line)
    yield from not_empty(pieces)


def not_empty(pieces: list[str]) -> Iterator[str]:
    text = "".join(pieces).strip("\n")
    if text.strip():
        yield text + "\n"


def json_documents(lines: Iterator[str], path: Path) -> Iterator[str]:
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
