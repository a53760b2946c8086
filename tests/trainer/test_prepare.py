"""Token files: the whole text once, documents apart, the held-out ones apart for good."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.errors import DataError
from tests.tiny import tiny_tokenizer
from tests.trainer.small_run import ROOT, texts
from trainer.__main__ import main
from trainer.corpus.documents import FileDocuments
from trainer.corpus.survey import document_hash
from trainer.prepare import PreparedData, load_prepared, prepare
from trainer.token_file import open_token_file, verify_tokens

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
        documents = list(FileDocuments([data_dir / f"{source}.txt"]))
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


INTERRUPTIBLE = """
import sys
from trainer import prepare, token_writer
from trainer.__main__ import main
prepare.BLOCK_CHARACTERS, token_writer.NOTE_EVERY_S = 20_000, 0.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_a_prepare_that_was_killed_goes_on_to_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """SIGKILL twice at arbitrary moments; the finished files are those of an undisturbed prepare, byte for byte."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        documents = (
            {"text": f"{text} {number}-{copy}"} for copy in range(25) for text in texts()["input"].split("\n\n")
        )
        (folder / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    change = f"data.files.input=['{folder}']"
    if kind == "dataset":
        change = f"data.datasets.input.repository='{folder}'"
    overrides = [change, "data.sources=['input']", "data.vocab_size=300"]
    overrides += ["data.token_budget=700000"] * (kind == "dataset")
    overrides += ["stages=[{name='all', start_step=0, end_step=20, shares={input=1.0}}]"]
    arguments = ["prepare", "smoke", *(part for change in overrides for part in ("--set", change))]

    def start(root: Path) -> subprocess.Popen[str]:
        environment = os.environ | {
            f"SMOLLM_{name.upper()}_DIR": str(root / name) for name in ("data", "runs", "models")
        }
        command = [sys.executable, "-c", INTERRUPTIBLE, *arguments]
        environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)

    def result(root: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(root.glob("data/tokens/*/input/*"))}

    for name in ("data", "runs", "models"):
        monkeypatch.setenv(f"SMOLLM_{name.upper()}_DIR", str(tmp_path / "undisturbed" / name))
    assert main(arguments) == 0
    seen: set[str] = set()
    for _ in range(2):
        process = start(tmp_path / "killed")
        note = wait_for(lambda: next((path.read_text() for path in notes(tmp_path / "killed")), ""), process, seen)
        process.kill()
        process.communicate()
        seen.add(note)
    for unfinished in (tmp_path / "killed").glob("data/tokens/*/.input.unfinished"):
        (unfinished / ".note.json.0badcafe.tmp").write_text("a process killed in the middle of a note leaves this")
    last = start(tmp_path / "killed")
    assert "going on after" in last.communicate(timeout=120)[1]
    assert last.returncode == 0
    assert sorted(result(tmp_path / "killed")) == ["held_out.bin", "manifest.json", "train.bin"]
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")
    assert not list(notes(tmp_path / "killed"))


def notes(root: Path) -> Iterator[Path]:
    return root.glob("data/tokens/*/.input.unfinished/note.json")


def wait_for(read: Callable[[], str], process: subprocess.Popen[str], seen: set[str]) -> str:
    """Poll until there is something not seen before, as long as the process lives."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (found := read()) and found not in seen:
            return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError("no note within 60 s")


def test_what_a_kill_left_of_another_text_is_not_used(data_dir: Path) -> None:
    first = prepared(data_dir).token_files["code"]
    work = data_dir / "tokens" / ".code.unfinished"
    shutil.copytree(data_dir / "tokens" / "code", work)
    identity = {key: first.manifest[key] for key in ("format", "source", "text", "tokenizer_sha256", "held_out_share")}
    survey = {"num_bytes": 1, "held_out_below": 0}
    parts = {"train": {"num_tokens": 10, "num_documents": 1, "num_bytes": 1}}
    parts["held_out"] = {"num_tokens": 0, "num_documents": 0, "num_bytes": 0}
    (work / "note.json").write_text(
        json.dumps({"identity": identity, "survey": survey, "position": [0, 0], "parts": parts})
    )
    with (data_dir / "code.txt").open("a") as file:
        file.write("\n\n" + "new_code = 1\n" * 200)
    again = prepared(data_dir).token_files["code"]
    assert len(again.train) > len(first.train)
    assert not work.exists()


def test_adding_text_moves_no_document_to_the_other_side(data_dir: Path) -> None:
    document = next(iter(FileDocuments([data_dir / "input.txt"])))
    before = document_hash(document)
    with (data_dir / "input.txt").open("a") as file:
        file.write("\n\nMore text.\n")
    assert document_hash(next(iter(FileDocuments([data_dir / "input.txt"])))) == before


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
    assert not load_prepared(data_dir / "tokens").tokenizer.has_chat_template  # no chat was ever trained on


def test_only_blank_lines_are_no_text(data_dir: Path) -> None:
    (data_dir / "math.txt").write_text("\n \n\n")
    with pytest.raises(DataError, match="only blank lines"):
        prepared(data_dir)


def test_damaged_files_are_noticed(data_dir: Path) -> None:
    verify_tokens(prepared(data_dir).token_files)
    folder = data_dir / "tokens" / "input"
    for name in ("train.bin", "held_out.bin"):
        tokens = bytearray((folder / name).read_bytes())
        tokens[10] ^= 1
        (folder / name).write_bytes(tokens)
        with pytest.raises(DataError, match=rf"{name} of source 'input' changed since it was written"):
            verify_tokens(prepared(data_dir).token_files)
        tokens[10] ^= 1
        (folder / name).write_bytes(tokens)
    tokens = bytearray((folder / "train.bin").read_bytes())
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
