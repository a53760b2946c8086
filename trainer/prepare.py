"""Text -> token files, once: what is already there for the same text and tokenizer is kept.

Documents are encoded in blocks on all cores by the `tokenizers` library and written as they come, so memory stays
bounded by the block. Which documents are held out depends on their text alone: adding text never moves an old document
from one side to the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shared.errors import DataError, TokenizerError
from shared.files import atomic_folder, sha256_file, write_atomically
from shared.tokenizer import Tokenizer
from trainer.batches import data_hash
from trainer.corpus.documents import read_documents
from trainer.corpus.find import SourceText, find_text
from trainer.progress import Progress
from trainer.token_file import (
    FORMAT,
    HELD_OUT,
    MANIFEST,
    MAX_VOCAB_SIZE,
    TOKEN_DTYPE,
    TRAIN,
    TokenFile,
    open_token_file,
    read_manifest,
)

__all__ = ["PreparedData", "TokenFile", "load_prepared", "prepare"]

log = logging.getLogger("trainer")

BLOCK_CHARACTERS = 4_000_000
"""Text encoded at once; peak memory is about 30 bytes per character of it."""

TOKENIZER_SAMPLE_CHARACTERS = 4_000_000
"""Characters per source a new BPE is learnt from: more changes no merge that a small vocabulary has room for."""

PREPARED = "prepared.json"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class PreparedData:
    """Everything training reads: one tokenizer and one pair of token files per source."""

    tokenizer: Tokenizer
    token_files: dict[str, TokenFile]
    data_hash: str
    """sha256 over the training tokens of every source."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a source's text finds: is it readable, how much is there, what is held out."""

    num_documents: int
    num_characters: int
    held_out_below: int
    """A document is held out when its hash is below this 64-bit number."""


def prepare(
    sources: Sequence[str],
    *,
    data_dir: Path,
    text_dir: Path | None = None,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    output_dir: Path,
    held_out_share: float = 0.05,
) -> PreparedData:
    """Bring every source's text and write its token files under `output_dir`.

    Args:
        sources: names; `find_text` says where each is looked for.
        data_dir: the user's own files, and `brought/` for the others.
        text_dir: a further place for the user's own files, looked at first.
        tokenizer: the one to use; None trains a BPE of `vocab_size` ids on these texts.
        vocab_size: ids of a new tokenizer.
        output_dir: one folder per source, `tokenizer/`, and `prepared.json`, written last.
        held_out_share: share of documents never trained on.

    Raises:
        DataError: a text is missing, empty, binary or not UTF-8.
        TokenizerError: the vocabulary does not fit 16 bits.
        StorageError: the disk refused.
    """
    texts = [find_text(source, data_dir, text_dir) for source in sources]
    surveys = {text.source: survey(text, held_out_share) for text in texts}
    if tokenizer is None:
        assert vocab_size is not None, "a new tokenizer needs a size"
        tokenizer = trained_tokenizer(texts, surveys, vocab_size=vocab_size, folder=output_dir / TOKENIZER_FOLDER)
    else:
        (output_dir / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
        tokenizer.save(output_dir / TOKENIZER_FOLDER)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids; token files hold at most {MAX_VOCAB_SIZE:,}"
        )
    for text in texts:
        write_token_files(text, surveys[text.source], tokenizer, output_dir / text.source)
    write_atomically(output_dir / PREPARED, json.dumps({"format": FORMAT, "sources": list(sources)}))
    return load_prepared(output_dir)


def load_prepared(output_dir: Path) -> PreparedData:
    """Open what `prepare` wrote.

    Raises:
        DataError: it is missing or unfinished.
    """
    try:
        sources = json.loads((output_dir / PREPARED).read_bytes())["sources"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{output_dir} holds no prepared data: run `python -m trainer prepare`") from error
    tokenizer = Tokenizer.from_folder(output_dir / TOKENIZER_FOLDER)
    token_files = {source: open_token_file(output_dir / source) for source in sources}
    for source, file in token_files.items():
        if file.manifest["tokenizer_sha256"] != tokenizer.sha256:
            raise DataError(f"{output_dir / source} was made with another tokenizer: run `python -m trainer prepare`")
    return PreparedData(tokenizer, token_files, data_hash(token_files))


def survey(text: SourceText, held_out_share: float) -> Survey:
    """Read a text once, so that every fault in it is found before any work starts."""
    threshold = int(held_out_share * 2**64)
    num_documents, num_characters = 0, 0
    first_hash, first_characters, held_out_characters = 2**64, 0, 0
    with Progress(f"{text.source}: reading", text.path.stat().st_size, unit="B") as progress:
        for document in read_documents(text.path):
            hashed, size = document_hash(document), len(document)
            num_documents += 1
            num_characters += size
            held_out_characters += size if hashed < threshold else 0
            if hashed < first_hash:
                first_hash, first_characters = hashed, 0
            first_characters += size if hashed == first_hash else 0  # the same text again has the same hash
            progress.update(size)
    if not num_documents:
        raise DataError(f"{text.path} holds no text, only blank lines: fill it, or remove it to let it be brought")
    if not held_out_characters:  # few documents: hold out the one that would be first
        threshold, held_out_characters = first_hash + 1, first_characters
    if num_documents == 1 or held_out_characters > max(held_out_share, 0.5) * num_characters:
        why = "one document only" if num_documents == 1 else "few or repeated documents"
        log.warning("%s: %s, so nothing can be held out and its held-out loss is unknown", text.source, why)
        threshold = 0
    return Survey(num_documents, num_characters, threshold)


def document_hash(document: str) -> int:
    """Return 64 bits that depend on the document's text alone."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")


def trained_tokenizer(
    texts: Sequence[SourceText], surveys: dict[str, Survey], *, vocab_size: int, folder: Path
) -> Tokenizer:
    """Return the BPE of these texts, trained now or by an earlier run on the same texts."""
    note = folder / "trained_on.json"
    wanted = {"vocab_size": vocab_size, "texts": {text.source: sha256_file(text.path) for text in texts}}
    if note.is_file() and json.loads(note.read_bytes()) == wanted:
        return Tokenizer.from_folder(folder)
    log.info("training a tokenizer of %s ids", f"{vocab_size:,}")
    tokenizer = Tokenizer.train(sample_documents(texts, surveys), vocab_size=vocab_size)
    with atomic_folder(folder) as new:
        tokenizer.save(new)
        (new / note.name).write_text(json.dumps(wanted))
    return tokenizer


def sample_documents(texts: Iterable[SourceText], surveys: dict[str, Survey]) -> Iterator[str]:
    """Yield training documents spread over each text, at most `TOKENIZER_SAMPLE_CHARACTERS` of each."""
    for text in texts:
        found = surveys[text.source]
        every = max(1, -(-found.num_characters // TOKENIZER_SAMPLE_CHARACTERS))
        for number, document in enumerate(read_documents(text.path)):
            if number % every == 0 and document_hash(document) >= found.held_out_below:
                yield document


def write_token_files(text: SourceText, found: Survey, tokenizer: Tokenizer, folder: Path) -> None:
    """Encode one source, unless its folder already holds these tokens."""
    identity = {
        "format": FORMAT,
        "source": text.source,
        "origin": text.origin,
        "text_sha256": sha256_file(text.path),
        "tokenizer_sha256": tokenizer.sha256,
        "held_out_below": found.held_out_below,
    }
    manifest = read_manifest(folder)
    if manifest is not None and all(manifest.get(key) == value for key, value in identity.items()):
        log.info("%s: token files are there already (%s tokens)", text.source, f"{manifest['train']['num_tokens']:,}")
        return
    with atomic_folder(folder) as new:
        with (
            TokenWriter(new / TRAIN) as train,
            TokenWriter(new / HELD_OUT) as held_out,
            Progress(f"{text.source}: encoding", found.num_characters, unit="characters") as progress,
        ):
            for block in in_blocks(read_documents(text.path)):
                for document, ids in zip(block, tokenizer.encode_batch(block), strict=True):
                    part = held_out if document_hash(document) < found.held_out_below else train
                    part.write([*ids, tokenizer.end_of_text_id], num_bytes=len(document.encode()))
                progress.update(sum(map(len, block)))
        manifest = {**identity, "train": train.summary(), "held_out": held_out.summary()}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    log.info("%s: %s tokens to train on, %s held out", text.source, f"{train.num_tokens:,}", f"{held_out.num_tokens:,}")


def in_blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Gather documents into lists of about `BLOCK_CHARACTERS`."""
    block: list[str] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


class TokenWriter:
    """Appends documents' ids to a file, counting and hashing what it writes."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self.num_tokens = self.num_documents = self.num_bytes = 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, ids: Sequence[int], *, num_bytes: int) -> None:
        """Append one document, its end token included; `num_bytes` is its text's length in UTF-8."""
        data = np.asarray(ids, dtype=TOKEN_DTYPE).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.num_tokens += len(ids)
        self.num_documents += 1
        self.num_bytes += num_bytes

    def summary(self) -> dict[str, Any]:
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "sha256": self._digest.hexdigest(),
        }
