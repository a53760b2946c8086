"""A source's text streamed from a dataset on the Hugging Face Hub, or from a local folder laid out like one.

Nothing is downloaded as a whole: rows come as they are tokenised, and a reader that was stopped goes on at its row
(`IterableDataset.state_dict`). Needs the `datasets` package, the extra "hub".
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DataError, first_line
from trainer.corpus.documents import NO_TEXT

log = logging.getLogger("trainer")

HUB_TIMEOUT_S = 5.0
"""One small request tells within it whether the Hub answers; the package itself would try for minutes."""


@dataclass(frozen=True, kw_only=True)
class HubText:
    """One split of a dataset."""

    source: str
    repository: str
    """`owner/name` on the Hub, or a folder's path."""
    subset: str | None
    folder: str | None
    split: str
    revision: str | None
    text_column: str
    max_tokens: int

    @property
    def is_local(self) -> bool:
        return Path(self.repository).is_dir()

    @property
    def origin(self) -> str:
        parts = [part for part in (self.subset, self.folder, self.split) if part]
        return f"dataset {self.repository} ({', '.join(parts)}), the first {self.max_tokens:,} tokens"

    def identity(self) -> dict[str, Any]:
        """What was asked for, so that finished token files need no network; a local folder's files as well."""
        wanted = {
            "repository": self.repository,
            "subset": self.subset,
            "folder": self.folder,
            "split": self.split,
            "revision": self.revision,
            "text_column": self.text_column,
            "max_tokens": self.max_tokens,
        }
        return wanted | ({"files": fingerprint(Path(self.repository))} if self.is_local else {})

    def open(self, position: Any = None) -> HubDocuments:
        """
        Raises:
            DataError: the package is absent, or the dataset cannot be reached or has no such part.
        """
        return HubDocuments(self, position)

    def resolved_revision(self) -> str | None:
        """Return the commit that the revision stands for now; None for a local folder.

        Raises:
            DataError: the Hub does not answer within seconds, or does not know the dataset.
        """
        if self.is_local:
            return None
        from huggingface_hub import HfApi

        started = time.monotonic()
        try:
            info = HfApi().dataset_info(self.repository, revision=self.revision, timeout=HUB_TIMEOUT_S)
        except Exception as error:  # the library lets those of its HTTP client through
            raise DataError(
                f"dataset {self.repository} of source {self.source!r} could not be reached within "
                f"{time.monotonic() - started:.1f} s ({first_line(error)}): connect to the Hugging Face Hub, set "
                "HF_TOKEN where the dataset asks for consent, give a local folder as its repository, or put text into "
                f"data/{self.source}.txt"
            ) from error
        return str(info.sha)

    def stream(self, revision: str | None) -> Any:
        """Open the dataset as an `IterableDataset`, without downloading it."""
        datasets = import_datasets(self.source)
        try:
            return datasets.load_dataset(
                self.repository,
                self.subset,
                data_dir=self.folder,
                split=self.split,
                revision=revision,
                streaming=True,
            )
        except Exception as error:  # ValueError for a wrong subset or split, and many of its own
            raise DataError(f"dataset {self.repository} cannot be opened: {first_line(error)}") from error


class HubDocuments:
    """The texts of a dataset's rows in order; `position` is the package's own state and the commit."""

    def __init__(self, text: HubText, position: Any = None) -> None:
        self._text = text
        import_datasets(text.source)  # its absence is told before the network's
        found = text.resolved_revision()
        self._revision = position["revision"] if position else found
        self._dataset = text.stream(self._revision)
        if position:
            self._dataset.load_state_dict(position["state"])
        self._documents = self._walk()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._documents)

    def position(self) -> Any:
        return {"revision": self._revision, "state": self._dataset.state_dict()}

    def _walk(self) -> Iterator[str]:
        rows = iter(self._dataset)
        told = False
        while (row := self._next_row(rows)) is not None:
            text = row.get(self._text.text_column)
            if not isinstance(text, str):
                if self._text.text_column not in row or text is not None:
                    raise DataError(
                        f"dataset {self._text.repository} has no text in column {self._text.text_column!r}; "
                        f"its columns are {', '.join(row)}: set data.datasets.{self._text.source}.text_column"
                    )
            elif not NO_TEXT.search(text) and text.strip():
                yield text
                continue
            if not told:
                log.info("%s: rows without text are passed over, and such that hold NUL", self._text.source)
                told = True

    def _next_row(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return next(rows, None)
        except Exception as error:  # the network's, the file system's, pyarrow's
            raise DataError(
                f"dataset {self._text.repository} broke off ({first_line(error)}): the same command goes on from there"
            ) from error


@functools.cache
def import_datasets(source: str) -> Any:
    """Return the `datasets` package, told to draw no progress bars.

    Raises:
        DataError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"source {source!r} is a dataset, and the package datasets is not installed: "
            "pip install 'smollm2-curriculum[hub]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def fingerprint(folder: Path) -> str:
    """Return a hash over the names, sizes and times of a folder's files; reading terabytes for it would take hours."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns};".encode())
    return digest.hexdigest()
