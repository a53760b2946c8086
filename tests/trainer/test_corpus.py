"""Text is the user's first, then brought, then generated; and what cannot be text is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import DataError
from trainer.corpus import find
from trainer.corpus.documents import MAX_CHARACTERS, TARGET_CHARACTERS, FileDocuments
from trainer.corpus.download import PublicFile, download
from trainer.corpus.files import FileText
from trainer.corpus.shakespeare import tidy
from trainer.corpus.word_problems import KINDS, Problem, as_text


def test_the_users_own_file_wins_over_what_was_brought(tmp_path: Path) -> None:
    brought = find.find_text("code", tmp_path)
    assert isinstance(brought, FileText)
    assert brought.paths[0].parent == tmp_path / "brought"
    assert find.find_text("code", tmp_path) == brought  # nothing is brought twice
    own = tmp_path / "code.txt"
    own.write_text("print(1)\n")
    assert find.find_text("code", tmp_path) == FileText("code", (own,), "the user's code.txt")


def test_a_folder_of_the_users_text_is_looked_at_first(tmp_path: Path) -> None:
    text_dir = tmp_path / "text"
    text_dir.mkdir()
    (text_dir / "input.jsonl").write_text(json.dumps({"text": "Hello."}))
    (tmp_path / "input.txt").write_text("Other.")
    found = find.find_text("input", tmp_path, text_dir)
    assert isinstance(found, FileText)
    assert found.paths == (text_dir / "input.jsonl",)


def test_a_source_nobody_can_bring_names_the_file_to_provide(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text for source 'poems'.*poems\.txt"):
        find.find_text("poems", tmp_path)


def test_an_empty_file_is_not_silently_replaced(tmp_path: Path) -> None:
    (tmp_path / "math.txt").touch()
    with pytest.raises(DataError, match=r"math\.txt is empty"):
        find.find_text("math", tmp_path)


def test_a_download_with_another_hash_is_not_used(tmp_path: Path) -> None:
    original = tmp_path / "original.txt"
    original.write_text("something else")
    file = PublicFile("a file", original.as_uri(), "0" * 64, ".txt")
    with pytest.raises(DataError, match="has the sha256"):
        download(file, tmp_path / "copy.txt")
    assert not (tmp_path / "copy.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"abc\0def", "NUL bytes"), (b"caf\xe9", "not UTF-8"), (b"\xff\xfe\x00", "NUL bytes|not UTF-8")],
)
def test_binary_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(FileDocuments([path]))


def test_paragraphs_are_gathered_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n}.\n" + "word " * (n % 90) for n in range(300)]
    path = tmp_path / "input.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = list(FileDocuments([path]))
    assert all(len(document) >= TARGET_CHARACTERS for document in documents[:-1])
    assert re.sub(r"\s+", " ", " ".join(documents)).strip() == re.sub(r"\s+", " ", path.read_text()).strip()


def test_a_text_without_line_ends_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_text("x" * (3 * MAX_CHARACTERS))
    documents = list(FileDocuments([path]))
    assert len(documents) == 3
    assert sum(document.count("x") for document in documents) == 3 * MAX_CHARACTERS


def test_json_lines_hold_text_or_worked_problems(tmp_path: Path) -> None:
    path = tmp_path / "math.jsonl"
    path.write_text('{"text": "One."}\n\n{"question": "1 + 1?", "answer": "2"}\n')
    assert list(FileDocuments([path])) == ["One.", "Question: 1 + 1?\nAnswer: 2\n"]
    path.write_text('{"body": "One."}\n')
    with pytest.raises(DataError, match="line 1 has no field 'text'"):
        list(FileDocuments([path]))
    path.write_text("{oops\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        list(FileDocuments([path]))


@pytest.mark.parametrize(("escape", "name"), [("\\ud800", "U[+]D800"), ("\\u0000", "U[+]0000")])
def test_json_escapes_of_what_no_text_holds_are_refused(tmp_path: Path, escape: str, name: str) -> None:
    path = tmp_path / "math.jsonl"
    path.write_text(f'{{"text": "One."}}\n{{"text": "Two {escape}."}}\n')
    with pytest.raises(DataError, match=f"line 2 escapes {name}"):
        list(FileDocuments([path]))


@pytest.mark.parametrize("name", ["input.txt", "input.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "One."}\n', encoding="utf-8-sig")
    assert "\ufeff" not in "".join(FileDocuments([path]))


def test_json_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "math.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        list(FileDocuments([path]))


def test_plays_take_the_form_of_tiny_shakespeare() -> None:
    text = "ACT I.\n\n\n\nFIRST CITIZEN.\nBefore we proceed any further.  \n\nALL.\nSpeak, speak.\n"
    assert tidy(text) == "ACT I.\n\nFirst Citizen:\nBefore we proceed any further.\n\nAll:\nSpeak, speak."


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_generated_problems_are_right(kind: Callable[[random.Random], Problem]) -> None:
    """Every equation in the steps holds, and the last number written is the answer."""
    rng = random.Random(7)
    for _ in range(300):
        problem = kind(rng)
        question, steps, answer = problem
        checked = 0
        for line in steps.splitlines():
            for left, right in re.findall(r"([\d.]+(?: (?:\+|-|\*|/|//) [\d.]+)+) = \$?([\d.]+)", line):
                assert eval(left) == pytest.approx(float(right.rstrip("."))), (question, line)
                checked += 1
        assert checked, (question, steps)
        assert float(re.findall(r"\d+(?:\.\d+)?", steps)[-1]) == answer or str(answer) in steps.splitlines()[-1]
        assert as_text(problem).endswith(f"\n#### {answer}\n")
