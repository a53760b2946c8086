"""One pass over a text before any work starts: is it readable, how much is there, which documents are held out.

Which ones depends on their text alone: adding text never moves an old document from one side to the other.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from shared.errors import DataError
from trainer.corpus.files import FileText
from trainer.progress import Progress

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Survey:
    """What is known of a text before it is encoded."""

    num_bytes: int | None
    """In UTF-8, of all documents; None: it streams, and nobody knows."""
    held_out_below: int
    """A document is held out when its hash is below this 64-bit number."""


def document_hash(document: str) -> int:
    """Return 64 bits that depend on the document's text alone."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")


def survey_stream(held_out_share: float) -> Survey:
    """A stream is long: its share of hashes is its share of documents."""
    return Survey(None, int(held_out_share * 2**64))


def survey_files(text: FileText, held_out_share: float) -> Survey:
    """Read every file once, so that each fault in them is found now.

    Raises:
        DataError: a file is missing, empty, binary or not UTF-8.
    """
    threshold = int(held_out_share * 2**64)
    num_documents, num_bytes = 0, 0
    first_hash, first_bytes, held_out_bytes = 2**64, 0, 0
    with Progress(f"{text.source}: reading", text.num_bytes, unit="B") as progress:
        for document in text.open():
            hashed, size = document_hash(document), len(document.encode())
            num_documents += 1
            num_bytes += size
            held_out_bytes += size if hashed < threshold else 0
            if hashed < first_hash:
                first_hash, first_bytes = hashed, 0
            first_bytes += size if hashed == first_hash else 0  # the same text again has the same hash
            progress.update(size)
    if not num_documents:
        raise DataError(f"{text.paths[0]} holds no text, only blank lines: fill it, or remove it to let it be brought")
    if not held_out_bytes:  # few documents: hold out the one that would be first
        threshold, held_out_bytes = first_hash + 1, first_bytes
    if num_documents == 1 or held_out_bytes > max(held_out_share, 0.5) * num_bytes:
        why = "one document only" if num_documents == 1 else "few or repeated documents"
        log.warning("%s: %s, so nothing can be held out and its held-out loss is unknown", text.source, why)
        threshold = 0
    return Survey(num_bytes, threshold)
