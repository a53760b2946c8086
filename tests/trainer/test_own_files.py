"""Files, folders and globs as a source's text, from the recipe and from the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DataError
from tests.trainer.small_run import small_directories
from trainer.__main__ import build_parser, main
from trainer.corpus.documents import MAX_CHARACTERS, FileDocuments
from trainer.corpus.files import check_leads_somewhere, named_files

PARAGRAPHS = st.lists(
    st.sampled_from(
        ["One line.\n", "  \n", "\n", "Größe 日本 🙂.\n", "word " * 500 + "\n", "no end", "\r\n", "\ufeff"]
    ),
    max_size=40,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "inner" / ".git").mkdir(parents=True)
    (root / "b.py").write_text("print('b')\n\n\nprint('still b')\n")
    (root / "a.md").write_text("# A\n")
    (root / "inner" / "c.jsonl").write_text(json.dumps({"text": "c"}) + "\n")
    (root / "inner" / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (root / "inner" / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    (root / "inner" / ".git" / "config").write_text("not this")
    return root


def test_a_folder_stands_for_its_text_files(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trainer"):
        text = named_files("code", [str(folder)])
    assert [path.name for path in text.paths] == ["a.md", "b.py", "c.jsonl"]
    assert list(text.open()) == ["# A\n", "print('b')\n\n\nprint('still b')\n", "c"]
    assert "2 files are not UTF-8 text and are passed over" in caplog.text


def test_globs_and_files_keep_their_order_and_count_once(folder: Path) -> None:
    text = named_files("code", [str(folder / "**/*.jsonl"), str(folder / "b.py"), str(folder / "*.py")])
    assert [path.name for path in text.paths] == ["c.jsonl", "b.py"]


def test_the_same_files_elsewhere_are_the_same_text(folder: Path, tmp_path: Path) -> None:
    before = named_files("code", [str(folder)]).identity()
    folder.rename(tmp_path / "moved")
    assert named_files("code", [str(tmp_path / "moved")]).identity() == before
    (tmp_path / "moved" / "a.md").write_text("# B\n")
    assert named_files("code", [str(tmp_path / "moved")]).identity() != before


@pytest.mark.parametrize("pattern", ["missing.txt", "*.nothing", "empty"])
def test_what_leads_nowhere_is_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.files of 'code'.*leads to no text file"):
        named_files("code", [str(tmp_path / pattern)])


def test_a_mistyped_path_is_refused_before_anything_is_walked_through(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="trainer"):
        check_leads_somewhere("code", [str(folder), str(folder / "**/*.jsonl"), str(folder / "b.py")])
    assert not caplog.messages, "it looked into the files of a folder"
    for wrong in ("missing.txt", "*.nothing"):
        with pytest.raises(DataError, match=r"data\.files of 'code'.*leads to no text file"):
            check_leads_somewhere("code", [str(folder), str(folder / wrong)])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("nul.txt", b"abc\0def", "NUL bytes"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("rows.parquet", b"PAR1\x15\x04\xff\xff\0", "list its folder in data.datasets"),
        ("rows.jsonl", b'{"body": 1}\n', "no field 'text'"),
        ("cut.jsonl", b'{"text": "a', "is not JSON"),
    ],
)
def test_files_that_cannot_be_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    words: str,
) -> None:
    """One sentence that names the file, exit code 2, nothing written."""
    small_directories(tmp_path)
    (tmp_path / name).write_bytes(content)
    for kind in ("data", "runs", "models"):
        monkeypatch.setenv(f"SMOLLM_{kind.upper()}_DIR", str(tmp_path / kind))
    assert main(["prepare", "smoke", "--text", f"input={tmp_path / name}"]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    assert name in sentence
    assert words in sentence
    assert not list((tmp_path / "data").glob("tokens/*/input"))


def test_text_named_on_the_command_line_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    options = build_parser().parse_args(["prepare", "cpu", "--text", "code=a", "--text", "code=b", "--text", "input=c"])
    assert options.overrides == ['data.files.code=["a"]', 'data.files.code=["a", "b"]', 'data.files.input=["c"]']
    with pytest.raises(SystemExit):
        build_parser().parse_args(["prepare", "cpu", "--text", "code"])
    assert "SOURCE=PATH" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(PARAGRAPHS, PARAGRAPHS, st.sampled_from([".txt", ".py"]), st.data())
def test_a_reader_goes_on_at_any_document(
    tmp_path_factory: pytest.TempPathFactory, first: list[str], second: list[str], suffix: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"first{suffix}", folder / f"second{suffix}"]
    for path, pieces in zip(paths, (first, second), strict=True):
        path.write_text("".join(pieces) * 3, newline="")
    documents = list(FileDocuments(paths))
    assert documents == [*FileDocuments([paths[0]]), *FileDocuments([paths[1]])]
    stop = data.draw(st.integers(0, len(documents)))
    reader = FileDocuments(paths)
    assert [next(reader) for _ in range(stop)] == documents[:stop]
    position = json.loads(json.dumps(reader.position()))
    assert list(FileDocuments(paths, position)) == documents[stop:]


def test_a_long_code_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("x = 1\n" * (MAX_CHARACTERS // 2))
    documents = list(FileDocuments([path]))
    assert all(len(document) < MAX_CHARACTERS + 10 for document in documents)
    assert "".join(documents) == path.read_text()
