"""Where a source's text comes from: the recipe's files, the user's own file, the recipe's dataset, a public file, or
what needs no web. In this order, announced.

What is brought lies in `data/brought/`, never where the user's files stand: as soon as `data/NAME.txt` appears it is
used instead. A dataset that the recipe names is never replaced by something else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shared.errors import DataError
from shared.files import reading_errors, storage_errors, write_atomically
from trainer.corpus.download import PUBLIC_FILES, download
from trainer.corpus.files import FileText, named_files
from trainer.corpus.hub import HubText
from trainer.corpus.shakespeare import bring_plays
from trainer.corpus.standard_library import bring_standard_library
from trainer.corpus.text import Text
from trainer.corpus.word_problems import bring_word_problems

log = logging.getLogger("trainer")

USER_SUFFIXES = (".txt", ".jsonl")
OFFLINE: dict[str, tuple[str, Callable[[Path], str]]] = {
    "input": (".txt", bring_plays),
    "code": (".jsonl", bring_standard_library),
    "math": (".jsonl", bring_word_problems),
}


def find_text(
    source: str,
    data_dir: Path,
    text_dir: Path | None = None,
    *,
    files: Mapping[str, Sequence[str]] | None = None,
    datasets: Mapping[str, HubText] | None = None,
) -> Text:
    """Return a source's text, bringing or generating it where the user gave none; says what it used and why.

    Raises:
        DataError: the user's file is empty or may not be read, or nothing can be brought, naming the file to provide.
    """
    if files and source in files:
        return named_files(source, files[source])
    own_folders = (text_dir, data_dir) if text_dir else (data_dir,)
    for path in (folder / f"{source}{suffix}" for folder in own_folders for suffix in USER_SUFFIXES):
        with reading_errors(path, DataError):
            if not path.exists():
                continue
            size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise DataError(f"{path} is no file: for a folder of texts, say --text {source}={path}")
        if size == 0:
            raise DataError(f"{path} is empty: fill it, or remove it to let {source!r} be brought")
        log.info("%s: your own %s (%s bytes)", source, path, f"{size:,}")
        return FileText(source, (path,), f"the user's {path.name}")
    if datasets and source in datasets:
        log.info("%s: %s (no %s.txt)", source, datasets[source].origin, data_dir / source)
        return datasets[source]
    return bring_text(source, data_dir)


def bring_text(source: str, data_dir: Path) -> FileText:
    """Bring or generate the text of a source that the user gave none for."""
    reasons = [f"no {data_dir / source}.txt"]
    folder = data_dir / "brought"
    if brought := already_brought(source, folder):
        log.info("%s: %s, as it was used before", source, brought.origin)
        return brought
    for suffix, bring in ways_to_bring(source):
        path = folder / f"{source}{suffix}"
        try:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            origin = bring(path)
        except DataError as error:
            log.info("%s: %s; trying the next place", source, error)
            reasons.append(str(error))
            continue
        write_atomically(folder / f"{source}.origin", f"{path.name}\n{origin}\n")
        log.info("%s: %s (%s)", source, origin, reasons[0])
        return FileText(source, (path,), origin)
    raise DataError(f"no text for source {source!r} ({'; '.join(reasons)}): put your own into {data_dir / source}.txt")


def already_brought(source: str, folder: Path) -> FileText | None:
    """Return what an earlier run brought, if it is whole: the note beside it is written last."""
    note = folder / f"{source}.origin"
    try:
        name, origin = note.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # nothing was, or not to the end
        return None
    path = folder / name
    return FileText(source, (path,), origin) if path.is_file() else None


def ways_to_bring(source: str) -> list[tuple[str, Callable[[Path], str]]]:
    """The places to look after the user's own file, best first: (file suffix, function that writes the file)."""
    ways: list[tuple[str, Callable[[Path], str]]] = []
    if public := PUBLIC_FILES.get(source):

        def from_web(path: Path) -> str:
            download(public, path)
            return public.title

        ways.append((public.suffix, from_web))
    if source in OFFLINE:
        ways.append(OFFLINE[source])
    return ways
