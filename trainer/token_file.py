"""Token files: one source's text as token ids on disk, and the manifest that says what they are.

A folder holds `train.bin` and `held_out.bin` (little-endian uint16, read through a memory map) and `manifest.json`,
written last: without it the folder counts as unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DataError
from shared.files import reading_errors
from trainer.progress import Progress

TOKEN_DTYPE = np.dtype("<u2")
TOKENS_AT_ONCE = 2**23
"""Hashed between two looks at the clock: 16 MiB."""

MAX_VOCAB_SIZE = 65_536
FORMAT = 2
"""Raised when the files or the way text is cut into documents change: older folders are made anew."""

COUNTED = {"num_tokens", "num_bytes", "sha256"}
"""What a manifest says of each of the two files, besides."""

TRAIN, HELD_OUT, MANIFEST = "train.bin", "held_out.bin", "manifest.json"


@dataclass(frozen=True)
class TokenFile:
    """One source's tokens: documents, each followed by <|endoftext|>."""

    source: str
    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    """Documents never trained on."""
    num_train_bytes: int
    """UTF-8 bytes of the text behind `train`: losses per byte compare across tokenizers."""
    num_held_out_bytes: int
    manifest: dict[str, Any]

    def num_windows(self, sequence_length: int) -> int:
        """Windows of sequence_length + 1 tokens; neighbours share one: the last target of one opens the next.

        Raises:
            DataError: there is not one.
        """
        if len(self.train) <= sequence_length:
            raise DataError(
                f"source {self.source!r} has {len(self.train)} tokens to train on, fewer than one window of "
                f"{sequence_length + 1}: add text or lower sequence_length"
            )
        return (len(self.train) - 1) // sequence_length


def open_token_file(folder: Path) -> TokenFile:
    """Map a source's token files.

    Raises:
        DataError: they are missing, unfinished or of another size than their manifest says.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} holds no finished token files: run `python -m trainer prepare`")
    tokens = {}
    for part, name in (("train", TRAIN), ("held_out", HELD_OUT)):
        path, expected = folder / name, manifest[part]["num_tokens"]
        with reading_errors(path, DataError):
            size = path.stat().st_size if path.is_file() else -1
        if size != expected * TOKEN_DTYPE.itemsize:
            raise DataError(
                f"{path} has {size} bytes where {expected * 2} are expected: delete {folder} and prepare again"
            )
        with reading_errors(path, DataError):
            tokens[part] = np.memmap(path, TOKEN_DTYPE, mode="r") if expected else np.empty(0, TOKEN_DTYPE)
    return TokenFile(
        source=manifest["source"],
        train=tokens["train"],
        held_out=tokens["held_out"],
        num_train_bytes=manifest["train"]["num_bytes"],
        num_held_out_bytes=manifest["held_out"]["num_bytes"],
        manifest=manifest,
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest, or None where none can be used."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    try:
        whole = (
            manifest["format"] == FORMAT
            and manifest.keys() >= {"source", "tokenizer_sha256"}
            and all(manifest[part].keys() >= COUNTED for part in ("train", "held_out"))
        )
    except (TypeError, KeyError, AttributeError):
        return None
    return manifest if whole else None


def verify_tokens(token_files: Mapping[str, TokenFile]) -> None:
    """Read all tokens once and compare them with their hashes: about a second per GB, with progress where it is long.

    Raises:
        DataError: some changed since they were written, by another program or a failing disk.
    """
    for source, file in token_files.items():
        with Progress(f"{source}: checking", 2 * (len(file.train) + len(file.held_out)), unit="B") as progress:
            for part, name, tokens in (("train", TRAIN, file.train), ("held_out", HELD_OUT, file.held_out)):
                digest = hashlib.sha256()
                for first in range(0, len(tokens), TOKENS_AT_ONCE):
                    some = tokens[first : first + TOKENS_AT_ONCE]
                    digest.update(some.data)
                    progress.update(some.nbytes)
                if digest.hexdigest() != file.manifest[part]["sha256"]:
                    raise DataError(
                        f"{name} of source {source!r} changed since it was written: delete its folder in data/tokens "
                        "and the same command prepares it again"
                    )
