"""Text -> token files, once: what is already there for the same text and tokenizer is kept.

Documents are read, encoded on all cores by the `tokenizers` library, and written as they come, so memory stays bounded
by the block whatever the text's length. A prepare that was killed goes on where it was (`token_writer`).
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import DataError, StorageError, TokenizerError
from shared.files import atomic_folder, only_one_process, storage_errors, write_atomically
from shared.tokenizer import Tokenizer
from trainer.batches import data_hash
from trainer.corpus.files import FileText
from trainer.corpus.find import find_text
from trainer.corpus.hub import HubText
from trainer.corpus.survey import Survey, document_hash, survey_files, survey_stream
from trainer.corpus.text import Documents, Text
from trainer.progress import Progress
from trainer.token_file import FORMAT, MAX_VOCAB_SIZE, TOKEN_DTYPE, TokenFile, open_token_file, read_manifest
from trainer.token_writer import UnfinishedTokens, read_note

log = logging.getLogger("trainer")

BLOCK_CHARACTERS = 2_000_000
"""Text encoded at once; two blocks are in memory, at about 30 bytes per character."""

TOKENIZER_SAMPLE_CHARACTERS = 4_000_000
"""Characters per source a new BPE is learnt from: more changes no merge that a small vocabulary has room for."""

PREPARED = "prepared.json"
TOKENIZER_FOLDER = "tokenizer"

assert array("H").itemsize == 2 and sys.byteorder == "little", "token files are little-endian uint16"


@dataclass(frozen=True)
class PreparedData:
    """Everything training reads: one tokenizer and one pair of token files per source."""

    tokenizer: Tokenizer
    token_files: dict[str, TokenFile]
    data_hash: str
    """sha256 over the training tokens of every source."""


def prepare(
    sources: Sequence[str],
    *,
    data_dir: Path,
    text_dir: Path | None = None,
    files: Mapping[str, Sequence[str]] | None = None,
    datasets: Mapping[str, HubText] | None = None,
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
        files: source -> files, folders and globs that are its text.
        datasets: source -> the dataset that it is streamed from.
        tokenizer: the one to use; None trains a BPE of `vocab_size` ids on these texts.
        vocab_size: ids of a new tokenizer.
        output_dir: one folder per source, `tokenizer/`, and `prepared.json`, written last.
        held_out_share: share of documents never trained on.

    Raises:
        DataError: a text is missing, empty, binary or not UTF-8, or a dataset cannot be reached.
        TokenizerError: the vocabulary does not fit 16 bits.
        StorageError: the disk refused.
    """

    def say_so() -> None:
        log.info("another process is preparing the same data; waiting")

    with only_one_process(output_dir / ".lock", when_taken=say_so):
        texts = [find_text(source, data_dir, text_dir, files=files, datasets=datasets) for source in sources]
        work = Work(texts, output_dir, held_out_share)
        if tokenizer is None:
            assert vocab_size is not None, "a new tokenizer needs a size"
            tokenizer = work.trained_tokenizer(vocab_size)
        else:
            (output_dir / TOKENIZER_FOLDER).mkdir(exist_ok=True)
            tokenizer.save(output_dir / TOKENIZER_FOLDER)
        if tokenizer.vocab_size > MAX_VOCAB_SIZE:
            raise TokenizerError(
                f"the tokenizer has {tokenizer.vocab_size:,} ids; token files hold at most {MAX_VOCAB_SIZE:,}"
            )
        work.write_token_files(tokenizer)
        write_atomically(output_dir / PREPARED, json.dumps({"format": FORMAT, "sources": list(sources)}))
        return load_prepared(output_dir)


def load_prepared(output_dir: Path) -> PreparedData:
    """Open what `prepare` wrote.

    Raises:
        DataError: it is missing or unfinished.
    """
    prepared = read_note_of(output_dir / PREPARED)
    sources = prepared.get("sources")
    if not isinstance(sources, list):
        raise DataError(f"{output_dir} holds no prepared data: run `python -m trainer prepare`")
    tokenizer = Tokenizer.from_folder(output_dir / TOKENIZER_FOLDER)
    token_files = {source: open_token_file(output_dir / source) for source in sources}
    for source, file in token_files.items():
        if file.manifest["tokenizer_sha256"] != tokenizer.sha256:
            raise DataError(f"{output_dir / source} was made with another tokenizer: run `python -m trainer prepare`")
    return PreparedData(tokenizer, token_files, data_hash(token_files))


def read_note_of(path: Path) -> dict[str, Any]:
    """Return what an earlier process wrote of its work; nothing where that cannot be used, as if it had not begun."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Work:
    """The texts of one recipe on their way to token files; each is surveyed at most once, and only if need be."""

    def __init__(self, texts: Sequence[Text], output_dir: Path, held_out_share: float) -> None:
        self.texts, self.output_dir, self.held_out_share = texts, output_dir, held_out_share
        self.identities = {text.source: text.identity() for text in texts}
        self._surveys: dict[str, Survey] = {}

    def survey(self, text: Text) -> Survey:
        if text.source not in self._surveys:
            share = self.held_out_share
            self._surveys[text.source] = (
                survey_files(text, share) if isinstance(text, FileText) else survey_stream(share)
            )
        return self._surveys[text.source]

    def trained_tokenizer(self, vocab_size: int) -> Tokenizer:
        """Return the BPE of these texts, trained now or by an earlier run on the same texts.

        It has no chat template: what is trained from scratch on plain text has never seen a chat.
        """
        folder = self.output_dir / TOKENIZER_FOLDER
        note = folder / "trained_on.json"
        wanted = {"vocab_size": vocab_size, "texts": self.identities, "chat_template": False}
        if read_note_of(note) == wanted:
            return Tokenizer.from_folder(folder)
        samples = [sample_documents(text, self.survey(text)) for text in self.texts]
        log.info("training a tokenizer of %s ids", f"{vocab_size:,}")
        documents = (document for sample in samples for document in sample)
        tokenizer = Tokenizer.train(documents, vocab_size=vocab_size).without_chat_template()
        with atomic_folder(folder) as new:
            tokenizer.save(new)
            (new / note.name).write_text(json.dumps(wanted))
        return tokenizer

    def write_token_files(self, tokenizer: Tokenizer) -> None:
        """Encode every source whose folder does not hold these tokens already, after a look at all their texts."""
        owed = []
        for text in self.texts:
            identity = {
                "format": FORMAT,
                "source": text.source,
                "text": self.identities[text.source],
                "tokenizer_sha256": tokenizer.sha256,
                "held_out_share": self.held_out_share,
            }
            folder = self.output_dir / text.source
            manifest = read_manifest(folder)
            if manifest is not None and all(manifest.get(key) == value for key, value in identity.items()):
                num_tokens = manifest["train"]["num_tokens"]
                log.info("%s: token files are there already (%s tokens)", text.source, f"{num_tokens:,}")
                continue
            note = read_note(folder, identity)
            owed.append((text, folder, note or {"identity": identity, "survey": asdict(self.survey(text))}))
        check_room(self.output_dir, sum(text.max_tokens or 0 for text, _, _ in owed))
        for text, folder, note in owed:
            encode_text(text, tokenizer, folder, note)


def check_room(folder: Path, num_tokens: int) -> None:
    """Refuse a budget of streamed tokens that the disk cannot take.

    Raises:
        StorageError: less is free than the tokens need.
    """
    needed, free = num_tokens * TOKEN_DTYPE.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder} has {free / 1e9:.1f} GB free and {num_tokens:,} tokens need {needed / 1e9:.1f} GB: free some "
            "space, lower data.token_budget, or set SMOLLM_DATA_DIR to another disk"
        )


def sample_documents(text: Text, found: Survey) -> Iterator[str]:
    """Yield training documents up to `TOKENIZER_SAMPLE_CHARACTERS`: spread over a file, the first of a stream."""
    every = max(1, -(-(found.num_bytes or 0) // TOKENIZER_SAMPLE_CHARACTERS))
    size = 0
    for number, document in enumerate(text.open()):
        if number % every == 0 and document_hash(document) >= found.held_out_below:
            yield document
            size += len(document)
        if found.num_bytes is None and size >= TOKENIZER_SAMPLE_CHARACTERS:
            return


def encode_text(text: Text, tokenizer: Tokenizer, folder: Path, note: Mapping[str, Any]) -> None:
    """Write one source's token files, from the beginning or from where an earlier process noted that it was."""
    found = Survey(**note["survey"])
    with storage_errors(folder), UnfinishedTokens(folder, note) as tokens:
        if tokens.num_tokens:
            log.info("%s: going on after %s tokens, where an earlier start was", text.source, f"{tokens.num_tokens:,}")
        documents = text.open(tokens.position)
        tokens_before = tokens.num_tokens
        with encoding_progress(text, found, tokens) as progress:
            for block in encoded_blocks(documents, tokenizer):
                write_block(block, found, tokens, max_tokens=text.max_tokens)
                done = tokens.num_tokens if text.max_tokens else tokens.num_bytes
                progress.update(
                    done - progress.done, also=f"{progress.rate(tokens.num_tokens - tokens_before):,.0f} tokens/s"
                )
                if text.max_tokens and tokens.num_tokens >= text.max_tokens:
                    break
                tokens.note_now_and_then(block.position)
        manifest = tokens.finish({**note["identity"], **asdict(found), "origin": text.origin})
    if text.max_tokens and tokens.num_tokens < text.max_tokens:
        log.warning(
            "%s: the dataset ended after %s of %s tokens", text.source, f"{tokens.num_tokens:,}", f"{text.max_tokens:,}"
        )
    counts = (f"{manifest[part]['num_tokens']:,}" for part in ("train", "held_out"))
    log.info("%s: %s tokens to train on, %s held out", text.source, *counts)


def encoding_progress(text: Text, found: Survey, tokens: UnfinishedTokens) -> Progress:
    """Count tokens where their number is known beforehand, bytes of text otherwise."""
    total, done, unit = found.num_bytes or 0, tokens.num_bytes, "B"
    if text.max_tokens:
        total, done, unit = text.max_tokens, tokens.num_tokens, "tokens"
    return Progress(f"{text.source}: encoding", total, unit=unit, done=done)


@dataclass(frozen=True)
class EncodedDocument:
    ids: array[int]
    """uint16, the end token included."""
    hash: int
    num_bytes: int


@dataclass(frozen=True)
class EncodedBlock:
    documents: list[EncodedDocument]
    position: Any
    """Where the text goes on after the block."""


def write_block(block: EncodedBlock, found: Survey, tokens: UnfinishedTokens, *, max_tokens: int | None) -> None:
    """Append each document to its side; stop with the one that fills `max_tokens`."""
    for document in block.documents:
        part = tokens.held_out if document.hash < found.held_out_below else tokens.train
        part.write(document.ids, num_bytes=document.num_bytes)
        if max_tokens and tokens.num_tokens >= max_tokens:
            return


def encoded_blocks(documents: Documents, tokenizer: Tokenizer) -> Iterator[EncodedBlock]:
    """Encode one block ahead: while the library works without the interpreter, the caller writes and reads."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead: Future[EncodedBlock] | None = None
        for texts, position in in_blocks(documents):
            following = pool.submit(encode_block, tokenizer, texts, position)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def encode_block(tokenizer: Tokenizer, texts: list[str], position: Any) -> EncodedBlock:
    end = array("H", [tokenizer.end_of_text_id])
    documents = [
        EncodedDocument(array("H", ids) + end, document_hash(text), len(text.encode()))
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
    ]
    return EncodedBlock(documents, position)


def in_blocks(documents: Documents) -> Iterator[tuple[list[str], Any]]:
    """Gather documents into lists of about `BLOCK_CHARACTERS`, each with the position after it."""
    block: list[str] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= BLOCK_CHARACTERS:
            yield block, documents.position()
            block, size = [], 0
    if block:
        yield block, documents.position()
