"""Whole runs of the recipe `smoke`: to an export that transformers loads, through kills, signals, sickness, damage."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.catalog import read_model_folder
from shared.checkpoint import load_export
from shared.errors import ConfigError, WeightsError
from tests.trainer.kills import SLOWLY, Moment, kill_at, wait_for
from tests.trainer.small_run import ROOT, command, small_data, small_directories, train_small, weights_sha256
from trainer.recipe import load_recipe
from trainer.run import Run
from trainer.run_folder import RunFolder, read_rows
from trainer.run_log import RunLog
from trainer.signals import StopRequest
from trainer.state import Checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An undisturbed run; read only."""
    return train_small(tmp_path_factory.mktemp("whole"))


def trained_steps(folder: RunFolder) -> int:
    return sum(row["kind"] == "train" for row in read_rows(folder.metrics))


def losses(folder: RunFolder) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(folder.metrics) if row["kind"] == "train"]


def open_run(root: Path, log: RunLog, *overrides: str) -> Run:
    config = load_recipe("smoke", overrides)
    folder = RunFolder(root / "runs" / "smoke")
    folder.open(config)
    return Run(config, small_data(root, config), folder, models_dir=root / "models", log=log)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def log(root: Path) -> Iterator[RunLog]:
    with RunLog(root / "runs" / "smoke" / "training.log", io.StringIO()) as log:
        yield log


def test_a_long_silence_is_broken_by_a_line(root: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.PLAIN_PROGRESS_EVERY_S", 0.0)
    run = open_run(root, log, "log_every=20")
    assert run.to_the_end() == "finished"
    lines = (root / "runs" / "smoke" / "training.log").read_text()
    assert "step 0/20 done, the next one is under way" in lines
    assert re.search(r"step 3/20 15% \| [\d,]+ tok/s \| ETA \d", lines)


# What a run leaves behind


def test_export_is_what_transformers_loads(whole: RunFolder) -> None:
    export = whole.path.parents[1] / "models" / "smoke"
    assert {path.name for path in export.iterdir()} == {
        "smoke_half.pt",
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "manifest.json",
    }
    ours, tokenizer = load_export(export, device=torch.device("cpu"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    text = "First Citizen:\nWe speak"
    ids = tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(export)(text)["input_ids"] == ids
    with torch.inference_mode():
        batch = torch.tensor([ids])
        torch.testing.assert_close(ours(batch), theirs(batch).logits, rtol=0, atol=1e-5)


def test_manifest_says_where_the_weights_come_from(whole: RunFolder) -> None:
    folder = read_model_folder(whole.path.parents[1] / "models" / "smoke")
    assert (folder.trained_here, folder.trained_length) == (True, 32)
    manifest = folder.manifest
    assert (manifest["run"], manifest["recipe"], manifest["step"]) == ("smoke", "smoke", 20)
    assert len(manifest["data_hash"]) == 64
    assert manifest["fp16_parity"]["top1_agreement"] >= 0.99
    assert manifest["fp16_parity"]["largest_logit_difference"] < 0.01
    assert manifest["recipe_settings"]["num_steps"] == 20


def test_learning_shows_on_held_out_text(whole: RunFolder) -> None:
    evaluations = [row for row in read_rows(whole.metrics) if row["kind"] == "evaluation"]
    assert [row["step"] for row in evaluations] == [0, 4, 5, 8, 10, 12, 15, 18, 20]
    for source in ("input", "code", "math"):
        first, last = (evaluations[index]["held_out"][source] for index in (0, -1))
        assert last["loss"] < first["loss"] - 0.5
        assert last["bits_per_byte"] < first["bits_per_byte"]
        assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))


def test_metrics_have_the_rows_the_page_reads(whole: RunFolder) -> None:
    rows = read_rows(whole.metrics)
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 21))
    assert train[0].keys() == {
        *("kind", "step", "stage", "loss", "learning_rate", "tokens_per_second", "mfu", "grad_norm"),
        *("source_loss", "source_share", "tokens", "time"),
    }
    assert train[0]["mfu"] is None
    assert [set(row["source_loss"]) for row in train[3:9:5]] == [{"input"}, {"input", "code", "math"}]
    config = load_recipe("smoke")
    schedule = config.build_schedule()
    assert [row["learning_rate"] for row in train] == [schedule.learning_rate(step) for step in range(20)]
    assert [row["tokens"] for row in train] == [256 * step for step in range(1, 21)]
    runs = [row for row in rows if row["kind"] == "run"]
    assert [(row["state"], row["num_steps"], len(row["stages"])) for row in runs] == [
        ("running", 20, 5),
        ("finished", 20, 5),
    ]


def test_log_samples_plots_and_tensorboard_are_there(whole: RunFolder) -> None:
    log = whole.training_log.read_text()
    for number, stage in enumerate(load_recipe("smoke").stages, start=1):
        assert f"=== stage {number} ({stage.name}), steps {stage.start_step}-{stage.end_step}" in log
    assert "First Citizen:" in log
    assert "tok/s while training" in log
    samples = read_rows(whole.samples)
    assert [(row["step"], row["source"]) for row in samples] == [(s, x) for s in (10, 20) for x in ("input", "code")]
    assert all(row["prompt"] and isinstance(row["text"], str) for row in samples)
    for name in ("loss", "loss_by_source", "bits_per_byte", "shares", "learning_rate", "throughput"):
        assert (whole.plots / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list(whole.tensorboard.glob("events.*"))
    assert len(Checkpoints(whole.checkpoints, keep=2).steps()) in (2, 3)


def test_the_shares_that_were_drawn_are_those_of_the_stages(whole: RunFolder) -> None:
    """A row a step here: 8 rows each, so every source is within one of them, and exact over a stage."""
    rows = [row for row in read_rows(whole.metrics) if row["kind"] == "train"]
    for stage in load_recipe("smoke").stages:
        drawn = [row["source_share"] for row in rows if stage.start_step < row["step"] <= stage.end_step]
        for source, share in stage.shares.items():
            mean = sum(shares.get(source, 0.0) for shares in drawn) / len(drawn)
            assert mean == pytest.approx(share, abs=1 / (8 * len(drawn)) + 1e-9), (stage.name, source)


def keys_within(value: Any) -> set[str]:
    """Every key of nested dictionaries and lists."""
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_within(inner)}
    return {key for inner in value for key in keys_within(inner)} if isinstance(value, list) else set()


def test_every_key_of_the_rows_stands_in_the_docs(whole: RunFolder) -> None:
    text = (ROOT / "docs/training.md").read_text()
    keys = keys_within(read_rows(whole.metrics)) | keys_within(read_rows(whole.samples))
    assert {"source_share", "perplexity", "prompt"} <= keys
    assert not {key for key in keys - set(load_recipe("smoke").data.sources) if f"`{key}`" not in text}


# Disturbed runs end the same


def test_killed_three_times_the_weights_are_the_same(root: Path, whole: RunFolder) -> None:
    """`make prove-resume` does it 25 times and aims at saves, evaluations and samples as well."""
    config, folder = load_recipe("smoke"), RunFolder(root / "runs" / "smoke")
    for moment in (Moment(what="border", step=4), Moment(what="anywhere", step=7), Moment(what="border", step=12)):
        found = kill_at(moment, root, config, "smoke", *SLOWLY)
        assert found is not None, "it was to be killed on the way"
        assert found["trained"] >= moment.step
    process = command(root, "train", "smoke")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resuming run 'smoke'" in errors
    assert weights_sha256(folder) == weights_sha256(whole)
    assert losses(folder) == losses(whole)
    assert (root / "models" / "smoke" / "manifest.json").is_file()


def check_it_stopped_and_goes_on(root: Path, whole: RunFolder, returncode: int, errors: str) -> None:
    """The row says what the last checkpoint holds, and from there the same command comes to the same weights."""
    folder = RunFolder(root / "runs" / "smoke")
    assert returncode == 0, errors
    stopped = read_rows(folder.metrics)[-1]
    assert stopped["state"] == "stopped"
    assert Checkpoints(folder.checkpoints, keep=2).steps()[-1] == stopped["at_step"]
    train_small(root)
    assert weights_sha256(folder) == weights_sha256(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_exits_0_and_goes_on(root: Path, whole: RunFolder, number: signal.Signals) -> None:
    folder = RunFolder(root / "runs" / "smoke")
    process = command(root, "train", "smoke", *SLOWLY, "--set", "save_every=1000", "--set", "evaluate_every=1000")
    assert wait_for(lambda: trained_steps(folder) >= 5, process)
    process.send_signal(number)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert "saved; the same command goes on from here" in errors
    check_it_stopped_and_goes_on(root, whole, process.returncode, errors)


def test_asked_to_stop_in_a_save_it_finishes_that_one_and_goes_on_from_there(root: Path, whole: RunFolder) -> None:
    folder = RunFolder(root / "runs" / "smoke")
    process = command(root, "train", "smoke", *SLOWLY, "--set", "save_every=1", "--set", "evaluate_every=1000")
    assert wait_for(lambda: any(folder.checkpoints.glob(".step-*")), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "saved; the same command goes on from" in errors
    check_it_stopped_and_goes_on(root, whole, process.returncode, errors)
    assert losses(folder) == losses(whole)


def test_stopped_during_evaluation_the_debt_is_paid_later(root: Path, log: RunLog, whole: RunFolder) -> None:
    run = open_run(root, log)
    for _ in range(5):
        run.advance(StopRequest())
    run.observe(lambda: True)  # a signal has come: step 5's evaluation is not begun
    run.save()
    run.close()
    resumed = open_run(root, log)
    assert resumed.owes_evaluation()
    assert resumed.to_the_end() == "finished"
    steps = [row["step"] for row in read_rows(resumed.folder.metrics) if row["kind"] == "evaluation"]
    assert 5 in steps
    assert weights_sha256(resumed.folder) == weights_sha256(whole)


def test_without_evaluation_and_samples_the_weights_are_the_same(root: Path, whole: RunFolder) -> None:
    folder = train_small(root, overrides=["evaluate_every=1000", "prompts=[]", "micro_batch_size=4", "log_every=20"])
    assert weights_sha256(folder) == weights_sha256(whole)


def test_a_damaged_checkpoint_costs_only_the_steps_since(root: Path, log: RunLog, whole: RunFolder) -> None:
    run = open_run(root, log)
    while run.step < 12:
        run.observe(lambda: False)
        if run.owes_save():
            run.save()
        run.advance(StopRequest())
    run.close()
    newest = run.checkpoints.steps()[-1]
    (run.checkpoints.path(newest) / "state.pt").write_bytes(b"gone")
    resumed = open_run(root, log)
    assert 0 < resumed.step < newest
    assert resumed.to_the_end() == "finished"
    assert "is damaged; passing over it" in resumed.folder.training_log.read_text()
    assert weights_sha256(resumed.folder) == weights_sha256(whole)


def test_a_loss_that_is_no_number_rolls_back_once(root: Path, log: RunLog, whole: RunFolder) -> None:
    run = open_run(root, log)
    for _ in range(7):
        run.advance(StopRequest())
        run.observe(lambda: False)
    with torch.no_grad():
        run.trainer.model.model.norm.weight[0] = float("nan")  # as a flipped bit would
    assert run.to_the_end() == "finished"
    assert "the loss is not a number by step 8; rolled back to step" in run.folder.training_log.read_text()
    assert weights_sha256(run.folder) == weights_sha256(whole)
    assert [row["step"] for row in read_rows(run.folder.metrics) if row["kind"] == "train"] == list(range(1, 21))


def test_a_recipe_that_always_diverges_stops_with_advice(root: Path, log: RunLog) -> None:
    overrides = ("learning_rate=1e30", "min_learning_rate=1e30", "weight_decay=0.0", "save_every=1")
    run = open_run(root, log, *overrides)
    with pytest.raises(ConfigError, match=r"not a number by step \d+, twice .* lower learning_rate \(1e\+30\)"):
        run.to_the_end()
    assert run.trainer.is_healthy()


# What is refused


def test_a_changed_recipe_is_refused_by_key(whole: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"run 'smoke' .* learning_rate \(0.003 -> 0.01\); change that back"):
        whole.open(load_recipe("smoke", ["learning_rate=1e-2"]))
    whole.open(load_recipe("smoke", ["log_every=3"]))


def test_two_processes_cannot_train_one_run(root: Path) -> None:
    folder = RunFolder(root / "runs" / "smoke")
    with (
        folder.locked(),
        pytest.raises(ConfigError, match="another process is training run 'smoke'"),
        folder.locked(),
    ):
        pass


def test_a_finished_run_trains_no_more(whole: RunFolder) -> None:
    before = weights_sha256(whole)
    train_small(whole.path.parents[1])
    assert weights_sha256(whole) == before


def test_all_checkpoints_damaged_is_said(root: Path, log: RunLog) -> None:
    run = open_run(root, log)
    run.advance(StopRequest())
    run.save()
    run.close()
    (run.checkpoints.path(1) / "state.pt").unlink()
    with pytest.raises(WeightsError, match="all 1 checkpoints in"):
        open_run(root, log)


def test_small_directories_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trainer.config import Directories

    for name in ("data", "runs", "models"):
        monkeypatch.setenv(f"SMOLLM_{name.upper()}_DIR", str(tmp_path / name))
    assert Directories() == small_directories(tmp_path)
    assert json.loads(json.dumps(os.environ["SMOLLM_DATA_DIR"])) == str(tmp_path / "data")
