"""What people do wrong at the command line, each told in one sentence with exit code 2, never by a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trainer.small_run import refused
from trainer.__main__ import main
from trainer.state import Checkpoints

Preparation = Callable[[Path], object]


TOO_LARGE = ["--set", "model.hidden_size=1600000", "--set", "compile=off"]
"""A matrix of 10 TB."""


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it to spoil, as the working directory."""
    root = tmp_path / "here"
    shutil.copytree(finished, root)
    for name in ("data", "runs", "models"):
        monkeypatch.setenv(f"SMOLLM_{name.upper()}_DIR", name)
    monkeypatch.chdir(root)
    yield root
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)


def write(name: str, content: str) -> Preparation:
    def prepare(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)

    return prepare


def append(name: str, content: str) -> Preparation:
    return lambda root: write(name, (root / name).read_text() + content)(root)


def lock(name: str) -> Preparation:
    """Take every right to a file or folder away."""

    def prepare(root: Path) -> None:
        path = root / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("We speak of corn.\n\n" * 50)
        path.chmod(0)

    return prepare


def file_instead_of(name: str) -> Preparation:
    def prepare(root: Path) -> None:
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).write_text("")

    return prepare


def change(pattern: str, **fields: object) -> Preparation:
    """Change a JSON file's fields."""

    def prepare(root: Path) -> None:
        (path,) = root.glob(pattern)
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return prepare


@pytest.mark.usefixtures("modes_hold")
@pytest.mark.parametrize("command", ["prepare", "plan", "train"])
@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        (lock("x.txt"), ["--text", "input=x.txt"], "x.txt cannot be read: Permission denied; give this user the right"),
        (lock("data/input.txt"), [], "data/input.txt cannot be read: Permission denied"),
        (lock("books/b.txt"), ["--text", "input=books"], "books/b.txt cannot be read"),
        (lock("books"), ["--text", "input=books/a.txt"], "books/a.txt cannot be read"),
        (lock("books/shelf"), ["--text", "input=books"], "books/shelf cannot be read"),
        (lock("data"), [], "data/"),
        (write("x", ""), ["--text", f"input={'x' * 300}"], "x cannot be read: File name too long"),
        (file_instead_of("data"), [], "a file stands where a folder is needed"),
        (write("data/code.txt/part.txt", "def"), [], "--text code=data/code.txt"),
    ],
)
def test_text_that_cannot_be_read(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Preparation,
    command: str,
    arguments: list[str],
    words: str,
) -> None:
    if "code.txt" in words:
        (here / "data" / "code.txt").unlink()
    for name in ("a.txt", "shelf/c.txt"):
        write(f"books/{name}", "We speak of corn.\n\n" * 50)(here)
    prepare(here)
    run = ["--run", "new"] if command == "train" else []
    assert words in refused(capsys, command, "smoke", *arguments, *run)


@pytest.mark.usefixtures("modes_hold")
@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lock("runs/smoke/recipe.toml"), "recipe.toml cannot be read: Permission denied"),
        (lock("runs/smoke"), "recipe.toml cannot be read: Permission denied"),
        (lock("runs/smoke/checkpoints/step-00000020/state.pt"), "state.pt cannot be read: Permission denied"),
        (lock("data/tokens/bpe-320-input-code-math-0.1/input/train.bin"), "train.bin cannot be read"),
        (change("data/tokens/*/input/manifest.json", train={}), "no finished token files"),
        (change("data/tokens/*/prepared.json", sources=5), "no prepared data"),
        (lambda root: edit_recipe(root, "num_hidden_layers = ", "num_hidden_layers = 1"), "restore its recipe.toml"),
        (lambda root: edit_recipe(root, "intermediate_size = ", "intermediate_size = 1"), "restore its recipe.toml"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "sample", "export"])
def test_a_run_that_cannot_be_read(
    here: Path, capsys: pytest.CaptureFixture[str], prepare: Preparation, command: str, words: str
) -> None:
    prepare(here)
    assert words in refused(capsys, command, "smoke")


def edit_recipe(root: Path, old: str, new: str) -> None:
    path = root / "runs" / "smoke" / "recipe.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "smoke", "--prompt", ""], "--prompt is empty"),
        (["sample", "smoke", "--prompt", "a\udc80"], "lone surrogate U+DC80"),
        (["sample", "smoke", "--tokens", "0"], "--tokens is 0; it must be above 0"),
        (["sample", "smoke", "--tokens", "-3"], "--tokens is -3; it must be above 0"),
        (["export", "smoke", "--name", ""], "'' is no name"),
        (["train", "smoke", "--run", ""], "'' is no name"),
        (["train", "smoke", "--run", "n", "--set", f"seed={2**64}"], "seed is 18446744073709551616"),
        (["train", "smoke", "--run", "n", "--set", "num_threads=1000000"], "num_threads is 1000000"),
        (["train", "smoke", "--run", "n", "--set", "init_from="], "init_from is ''"),
        (["plan", "smoke", *TOO_LARGE], "no memory is left"),
        (["train", "smoke", "--run", "n", *TOO_LARGE], "no memory is left"),
        (["prepare", "smoke", "--text", "a b=x.txt"], "data.files names 'a b'; use letters, digits"),
        (["prepare", "smoke", "--set", "data.sources=['../x']"], "data.sources.0 is '../x'; use letters, digits"),
    ],
)
def test_impossible_wishes(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in refused(capsys, *arguments)


@pytest.mark.usefixtures("modes_hold")
@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        (lock("mine.toml"), ["prepare", "mine.toml"], "mine.toml cannot be read: Permission denied"),
        (lock("runs/smoke/metrics.jsonl"), ["plot", "smoke"], "metrics.jsonl cannot be read: Permission denied"),
        (lock("runs/smoke/metrics.jsonl"), ["train", "smoke"], "metrics.jsonl cannot be read: Permission denied"),
        (write("runs/smoke/metrics.jsonl", "5\n[]\n{}\n"), ["plot", "smoke"], "no train rows yet"),
        (file_instead_of("runs/smoke/plots"), ["plot", "smoke"], "a file stands where a folder is needed"),
        (file_instead_of("runs"), ["train", "smoke"], "a file stands where a folder is needed"),
        (file_instead_of("runs/new"), ["train", "smoke", "--run", "new"], "a file stands where a folder is needed"),
        (file_instead_of("models"), ["export", "smoke"], "a file stands where a folder is needed"),
        (file_instead_of("models/new"), ["export", "smoke", "--name", "new"], "a file stands where a folder is needed"),
        (
            lock("runs/smoke/checkpoints/step-00000020/state.pt"),
            ["train", "smoke", "--set", "export_name=new"],
            "state.pt cannot be read: Permission denied",
        ),
    ],
)
def test_files_in_the_way(
    here: Path, capsys: pytest.CaptureFixture[str], prepare: Preparation, arguments: list[str], words: str
) -> None:
    prepare(here)
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("prepare", "arguments"),
    [
        (write("runs/smoke/checkpoints/step-abc/note", ""), ["--set", "export_name=new"]),
        (append("runs/smoke/metrics.jsonl", '5\n{"step": 1}\n'), ["--set", "export_name=new"]),
        (write("data/brought/input.origin", "half a note"), []),
        (lambda root: next(root.glob("data/tokens/*/tokenizer/trained_on.json")).write_text("{"), []),
        (change("data/tokens/*/input/manifest.json", train={}), []),
    ],
)
def test_what_is_no_hindrance(here: Path, prepare: Preparation, arguments: list[str]) -> None:
    """A foreign folder, a spoilt line or note: the run is there, and what is missing is made again."""
    prepare(here)
    assert main(["train", "smoke", *arguments]) == 0
    assert Checkpoints(here / "runs" / "smoke" / "checkpoints", keep=2).choose("last") == 20


@pytest.mark.parametrize("run", ["smoke", "new"])
def test_tokens_changed_in_place_are_not_trained_on(here: Path, capsys: pytest.CaptureFixture[str], run: str) -> None:
    """Neither on a resume, whose end would be another one, nor at a start."""
    shutil.rmtree(here / "runs" / "smoke" / "checkpoints" / "step-00000020")
    (path,) = here.glob("data/tokens/*/code/train.bin")
    tokens = bytearray(path.read_bytes())
    tokens[100] ^= 1
    path.write_bytes(tokens)
    sentence = refused(capsys, "train", "smoke", "--run", run, "--set", "export_name=again")
    assert "train.bin of source 'code' changed since it was written" in sentence
    assert "prepare" in sentence
    assert "changed since it was written" in (here / "runs" / run / "training.log").read_text()


@pytest.mark.usefixtures("modes_hold")
@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (file_instead_of("models"), "cannot write models: a file stands where a folder is needed"),
        (file_instead_of("models/new"), "cannot write models/new: a file stands where a folder is needed"),
        (lambda root: (root / "models").chmod(0o555), "cannot write models: permission is denied"),
    ],
)
def test_an_export_that_would_fail_is_told_before_the_first_step(
    here: Path, capsys: pytest.CaptureFixture[str], prepare: Preparation, words: str
) -> None:
    prepare(here)
    assert words in refused(capsys, "train", "smoke", "--run", "new")
    assert not list((here / "runs" / "new").glob("checkpoints/*"))
