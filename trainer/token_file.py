"""Token files: one source's text as token ids on disk, and the manifest that says what they are.

A folder holds `train.bin` and `held_out.bin` (little-endian uint16, read through a memory map) and `manifest.json`,
written last: without it the folder counts as unfinished.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DataError
from shared.files import reading_errors, sha256_file

TOKEN_DTYPE = np.dtype("<u2")
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
        """Windows of sequence_length + 1 tokens; neighbours share one: the last target of one opens the next."""
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
        whole = manifest["format"] == FORMAT and all(
            manifest[part].keys() >= COUNTED and {"source", "tokenizer_sha256"} <= manifest.keys()
            for part in ("train", "held_out")
        )
    except (TypeError, KeyError, AttributeError):
        return None
    return manifest if whole else None


def verify_token_file(folder: Path) -> None:
    """Compare both files with their hashes.

    Raises:
        DataError: a file changed since it was written.
    """
    manifest = read_manifest(folder) or {}
    for part, name in (("train", TRAIN), ("held_out", HELD_OUT)):
        if sha256_file(folder / name) != manifest[part]["sha256"]:
            raise DataError(f"{folder / name} changed since it was written: delete {folder} and prepare again")
