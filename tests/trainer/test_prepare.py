"""Token files: the whole text once, documents apart, the held-out ones apart for good."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.errors import DataError
from tests.tiny import tiny_tokenizer
from tests.trainer.small_run import texts
from trainer.corpus.documents import read_documents
from trainer.prepare import PreparedData, document_hash, load_prepared, prepare
from trainer.token_file import open_token_file, verify_token_file

SOURCES = ("input", "code", "math")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in texts().items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def prepared(data_dir: Path, **changes: object) -> PreparedData:
    arguments = {"tokenizer": tiny_tokenizer(), "vocab_size": None, "held_out_share": 0.2} | changes
    return prepare(SOURCES, data_dir=data_dir, output_dir=data_dir / "tokens", **arguments)  # type: ignore[arg-type]


def split(tokens: NDArray[np.uint16], end: int) -> list[list[int]]:
    """Documents between end tokens."""
    ends = np.flatnonzero(tokens == end)
    assert len(ends) and ends[-1] == len(tokens) - 1
    return [part.tolist()[:-1] for part in np.split(tokens, ends[:-1] + 1)]


def test_every_document_is_there_once_on_one_side(data_dir: Path) -> None:
    data = prepared(data_dir)
    for source in SOURCES:
        file = data.token_files[source]
        end = data.tokenizer.end_of_text_id
        train = {data.tokenizer.decode(ids) for ids in split(file.train, end)}
        held_out = {data.tokenizer.decode(ids) for ids in split(file.held_out, end)}
        documents = list(read_documents(data_dir / f"{source}.txt"))
        assert train | held_out == set(documents)
        assert not train & held_out
        assert held_out
        assert file.num_train_bytes + file.num_held_out_bytes == sum(len(text.encode()) for text in documents)


def test_what_is_done_is_kept_and_what_changed_is_made_anew(data_dir: Path) -> None:
    first = prepared(data_dir)
    marks = {name: (data_dir / "tokens" / name / "train.bin").stat().st_mtime_ns for name in SOURCES}
    with (data_dir / "code.txt").open("a") as file:
        file.write("\n\n" + "new_code = 1\n" * 200)
    second = prepared(data_dir)
    again = {name: (data_dir / "tokens" / name / "train.bin").stat().st_mtime_ns for name in SOURCES}
    assert [name for name in SOURCES if marks[name] != again[name]] == ["code"]
    assert first.data_hash != second.data_hash
    assert load_prepared(data_dir / "tokens").data_hash == second.data_hash


def test_adding_text_moves_no_document_to_the_other_side(data_dir: Path) -> None:
    document = next(iter(read_documents(data_dir / "input.txt")))
    before = document_hash(document)
    with (data_dir / "input.txt").open("a") as file:
        file.write("\n\nMore text.\n")
    assert document_hash(next(iter(read_documents(data_dir / "input.txt")))) == before


def test_a_source_of_one_document_holds_nothing_out_and_says_so(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data_dir / "code.txt").write_text("print('hello')\n" * 50)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        data = prepared(data_dir)
    assert len(data.token_files["code"].held_out) == 0
    assert "code: one document only" in caplog.text


@pytest.mark.parametrize("text", ["The same text.\n\n" * 800, "a" * 2_000 + "\n\n" + "b" * 100])
def test_a_text_that_repeats_itself_is_trained_on_not_held_out(
    data_dir: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """All copies of a document fall on one side: holding them out must not leave the run without text."""
    (data_dir / "code.txt").write_text(text)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        file = prepared(data_dir).token_files["code"]
    assert file.num_train_bytes >= file.num_held_out_bytes
    assert len(file.held_out) or "nothing can be held out" in caplog.text


def test_a_new_tokenizer_is_trained_once_per_text(data_dir: Path) -> None:
    first = prepared(data_dir, tokenizer=None, vocab_size=300)
    assert first.tokenizer.vocab_size == 300
    mark = (data_dir / "tokens" / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert prepared(data_dir, tokenizer=None, vocab_size=300).tokenizer.sha256 == first.tokenizer.sha256
    assert (data_dir / "tokens" / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == mark


def test_only_blank_lines_are_no_text(data_dir: Path) -> None:
    (data_dir / "math.txt").write_text("\n \n\n")
    with pytest.raises(DataError, match="only blank lines"):
        prepared(data_dir)


def test_damaged_files_are_noticed(data_dir: Path) -> None:
    prepared(data_dir)
    folder = data_dir / "tokens" / "input"
    tokens = bytearray((folder / "train.bin").read_bytes())
    tokens[10] ^= 1
    (folder / "train.bin").write_bytes(tokens)
    with pytest.raises(DataError, match="changed since it was written"):
        verify_token_file(folder)
    (folder / "train.bin").write_bytes(tokens[:-2])
    with pytest.raises(DataError, match="bytes where"):
        open_token_file(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["train"]
    for damage in (json.dumps({**manifest, "format": 0}), json.dumps(manifest), "{", "[]"):
        (folder / "manifest.json").write_text(damage)
        with pytest.raises(DataError, match="no finished token files"):
            open_token_file(folder)
    (data_dir / "tokens" / "prepared.json").write_text("[]")
    with pytest.raises(DataError, match="no prepared data"):
        load_prepared(data_dir / "tokens")
