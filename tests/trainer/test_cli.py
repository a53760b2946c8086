"""`python -m trainer`: what it says, and what it refuses in one sentence with exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.small_run import refused, small_directories
from trainer.__main__ import main
from trainer.run_folder import RunFolder
from trainer.state import Checkpoints


@pytest.fixture
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The finished run's folder as the environment names it."""
    for name in ("data", "runs", "models"):
        monkeypatch.setenv(f"SMOLLM_{name.upper()}_DIR", str(finished / name))
    yield finished


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in ("prepare", "plan", "train", "evaluate", "sample", "plot", "export"):
        assert command in text
    assert "python -m trainer train cpu" in text


def test_dry_run_prints_the_plan_and_trains_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "smoke", "--run", "dry", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "Foundation" in text
    assert "time:    not measured" in text
    assert "dry run: nothing was trained" in text
    assert not (here / "runs" / "dry").exists()


def test_prepare_and_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "smoke"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("tokens to train on") == 1 and "of 3 sources" in shown.out
    assert main(["plan", "smoke"]) == 0
    text = capsys.readouterr().out
    for words in ("epochs", "repeats", "memory:", "disk:", "s per step", "for 20 steps"):
        assert words in text


def test_a_finished_run_says_so_and_does_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = here / "models" / "smoke" / "manifest.json"
    before = export.stat().st_mtime_ns
    assert main(["train", "smoke"]) == 0
    said = capsys.readouterr().err
    for words in (
        "'smoke' is finished: step 20 of 20",
        f"exported to {export.parent}",
        "--accept-changes",
        "--run NAME",
    ):
        assert words in said
    assert "tok/s" not in said and "resuming" not in said
    assert export.stat().st_mtime_ns == before


def test_evaluate_sample_plot_export(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "smoke"]) == 0
    assert "held-out text at step 20" in capsys.readouterr().out
    assert main(["sample", "smoke", "--prompt", "Second Citizen:", "--tokens", "4", "--seed", "3"]) == 0
    assert "Second Citizen:" in capsys.readouterr().out
    assert main(["plot", "smoke"]) == 0
    assert "loss.png" in capsys.readouterr().out
    assert main(["export", "smoke", "--checkpoint", "best", "--name", "other", "--gguf", "--gguf", "q8_0"]) == 0
    assert "top-1 agreement" in capsys.readouterr().out
    for name in ("other_half.pt", "other-F16.gguf", "other-Q8_0.gguf"):
        assert (here / "models" / "other" / name).is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "smok"], ["'smok'", "did you mean 'smoke'"]),
        (["train", "smoke", "--set", "learning_rat=1"], ["learning_rat", "did you mean 'learning_rate'"]),
        (["train", "smoke", "--set", "learning_rate=1"], ["run 'smoke' was started with another recipe", "--run"]),
        (["train", "smoke", "--run", "../evil"], ["'../evil' is no name"]),
        (["train", "smoke", "--run", "gpu", "--set", "device=cuda:99"], ["cuda:99"]),
        (["train", "smoke", "--run", "big", "--set", "model.vocab_size=49152"], ["49,152", "320"]),
        (["train", "smoke", "--run", "few", "--set", "data.max_epochs=0.01"], ["max_epochs"]),
        (["train", "smoke", "--text", "code=nowhere/x.py"], ["'code'", "nowhere/x.py leads to no text file"]),
        (["evaluate", "nothing"], ["there is no run 'nothing'", "smoke"]),
        (["export", "smoke", "--checkpoint", "7"], ["checkpoint '7' is not there", "last, best"]),
        (["sample", "smoke", "--temperature", "-1"], ["temperature"]),
        (["export", "smoke", "--name", "a/b"], ["'a/b' is no name"]),
    ],
)
def test_refusals(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    sentence = refused(capsys, *arguments)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(("content", "words"), [(b"", "input.txt"), (b"\x00\xff\xfe\x00" * 100, "input.txt")])
def test_text_that_cannot_be_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    words: str,
) -> None:
    small_directories(tmp_path)
    (tmp_path / "data" / "input.txt").write_bytes(content)
    for name in ("data", "runs", "models"):
        monkeypatch.setenv(f"SMOLLM_{name.upper()}_DIR", str(tmp_path / name))
    assert words in refused(capsys, "train", "smoke")
    assert not list((tmp_path / "runs").glob("*/checkpoints/step-*"))


def test_changed_text_is_refused_on_resume(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data", "runs", "models"):
        shutil.copytree(finished / name, tmp_path / name)
        monkeypatch.setenv(f"SMOLLM_{name.upper()}_DIR", str(tmp_path / name))
    with (tmp_path / "data" / "code.txt").open("a") as file:
        file.write("\n\nprint('more')\n" * 50)
    sentence = refused(capsys, "train", "smoke")
    assert "trained on" in sentence
    assert "--run NAME" in sentence
    assert Checkpoints(tmp_path / "runs" / "smoke" / "checkpoints", keep=2).choose("last") == 20
    assert RunFolder(tmp_path / "runs" / "smoke").read_recipe().num_steps == 20
