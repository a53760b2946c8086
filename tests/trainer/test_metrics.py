"""The honest speed, the rows on disk, what is forgotten on resume, and what the console shows."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.config import SMOLLM2_135M
from shared.errors import ConfigError
from tests.processes import wait_until
from tests.trainer.small_run import ROOT
from trainer.curriculum import Stage
from trainer.evaluate import HeldOut
from trainer.metrics import Clock, Metrics, SharesDrawn, flops_per_token
from trainer.progress import duration
from trainer.report import ProgressLines, overfit_alarms, progress_bar, stage_summary
from trainer.run_folder import RunFolder, append_row, keep_rows_through, read_rows
from trainer.run_log import RunLog
from trainer.signals import StopRequest
from trainer.track import Tracker


def test_flops_per_token_of_the_original() -> None:
    assert flops_per_token(SMOLLM2_135M, 128) == 6 * 134_515_008 + 12 * 30 * 576 * 128
    assert flops_per_token(SMOLLM2_135M, 2048) / 1e9 == pytest.approx(1.232, abs=0.001)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in the test's hands."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_evaluation_and_saves_do_not_count_as_training(now: list[float]) -> None:
    clock = Clock()
    now[0] += 10
    with clock.apart("evaluation"):
        now[0] += 5
    with clock.apart("saves"):
        now[0] += 2
    now[0] += 1
    assert clock.lap() == 11
    now[0] += 3
    assert clock.lap() == 3
    assert (clock.total_s, clock.training_s) == (21, 14)
    assert clock.apart_s == {"evaluation": 5, "saves": 2}


def test_a_save_within_an_evaluation_is_taken_off_once(now: list[float]) -> None:
    clock = Clock()
    now[0] += 3
    with clock.apart("evaluation"):
        now[0] += 5
        with clock.apart("saves"):
            now[0] += 2
    assert clock.lap() == 3
    assert clock.apart_s == {"evaluation": 5, "saves": 2}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3_729, "1:02:09")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def train_row(step: int) -> dict[str, object]:
    return {
        "step": step,
        "stage": "Foundation",
        "loss": 3.0,
        "learning_rate": 1e-3,
        "tokens_per_second": 10.0,
        "mfu": None,
        "grad_norm": 1.0,
        "source_loss": {"input": 3.0, "code": 2.5},
        "source_share": {"input": 0.75, "code": 0.25},
        "tokens": 10 * step,
    }


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    metrics = Metrics(folder, resume_step=0)
    metrics.run("running", at_step=0, num_steps=9, stages=[])
    for step in (1, 2, 3, 4):
        metrics.train(train_row(step))
    metrics.evaluation(2, {"input": {"loss": 3.0}}, {})
    metrics.evaluation(4, {"input": {"loss": 2.0}}, {})
    metrics.samples(4, [{"step": 4, "source": None, "prompt": "a", "text": "b", "seed": 1}])
    metrics.close()
    with folder.metrics.open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    resumed = Metrics(folder, resume_step=3)
    assert [row["step"] for row in resumed.of_kind("train")] == [1, 2, 3]
    assert (resumed.evaluated_steps, resumed.sampled_steps) == ({2}, set())
    resumed.train(train_row(4))
    resumed.close()
    assert [row["step"] for row in read_rows(folder.metrics) if row["kind"] == "train"] == [1, 2, 3, 4]
    assert read_rows(folder.samples) == []
    begun_anew = Metrics(folder, resume_step=0)
    assert begun_anew.rows == []
    begun_anew.close()


def test_rows_keep_any_text(tmp_path: Path) -> None:
    row = {"step": 1, "text": 'line\nbreak "quoted" \u2028 Größe \x00 🙂'}
    append_row(tmp_path / "rows.jsonl", row)
    append_row(tmp_path / "rows.jsonl", row)
    assert read_rows(tmp_path / "rows.jsonl") == [row, row]


def held_out(loss: float) -> dict[str, HeldOut]:
    return {"input": HeldOut(loss=loss, bits_per_byte=1.0, perplexity=1.0, num_tokens=1)}


def test_overfit_alarm_needs_a_gap_that_opens_while_held_out_loss_rises() -> None:
    earlier = [{"step": step, "held_out": {"input": {"loss": loss}}} for step, loss in ((10, 4.0), (20, 3.5))]
    alarms = overfit_alarms(held_out(3.7), {"input": 0.9}, earlier, largest_gap=0.5)
    assert len(alarms) == 1
    assert "input's held-out loss 3.700 is 0.90 above its train loss and has risen since step 20 (3.500)" in alarms[0]
    assert overfit_alarms(held_out(3.4), {"input": 0.9}, earlier, largest_gap=0.5) == []
    assert overfit_alarms(held_out(3.7), {"input": 0.4}, earlier, largest_gap=0.5) == []
    assert overfit_alarms(held_out(3.7), {}, earlier, largest_gap=0.5) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_live_line_and_a_file_gets_all(tmp_path: Path) -> None:
    terminal = Terminal()
    with RunLog(tmp_path / "training.log", terminal) as log:
        log.progress("step 1")
        log.progress("step 2")
        log.say("held-out")
        logging.getLogger("trainer").warning("careful")
    assert terminal.getvalue() == "\r\x1b[2Kstep 1\r\x1b[2Kstep 2\nheld-out\nWARNING: careful\n"
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["step 1", "step 2", "held-out", "careful"]


LINES = ProgressLines(train_row(4), num_steps=1_000, eta_s=245)


def test_a_line_of_the_log_holds_everything() -> None:
    for words in (
        "step    4/1000",
        "Foundation",
        "loss 3.000",
        "input 3.00 75%",
        "code 2.50 25%",
        "lr 1.00e-03",
        "ETA 4:05",
    ):
        assert words in LINES.plain()


def test_no_time_left_is_told_while_only_the_first_step_is_known() -> None:
    first = ProgressLines(train_row(1), num_steps=1_000, eta_s=None)
    assert first.plain().endswith("ETA --:--") and first.live(200).endswith("--:-- left")


def test_a_live_line_fits_its_terminal_and_keeps_what_matters() -> None:
    wide = LINES.live(200)
    assert wide.startswith("────────────────    0%  4/1,000  Foundation  loss 3.000  input 3.00 75% · code 2.50 25%")
    assert wide.endswith("lr 1.0e-03  10 tok/s  MFU n/a  4:05 left")
    for width in range(10, 140):
        assert len(LINES.live(width)) < width
    for width in range(32, 140):
        assert "loss 3.000" in LINES.live(width)
        assert "left" in LINES.live(width)
    assert progress_bar(0.5) == "━━━━━━━━────────"
    assert progress_bar(1 / 32) == "╸───────────────"


def test_a_terminal_gets_the_live_line(tmp_path: Path) -> None:
    terminal = Terminal()
    with RunLog(tmp_path / "training.log", terminal) as log:
        log.progress("plain", lambda width: f"live in {width}")
    assert "live in " in terminal.getvalue()
    assert "plain" not in terminal.getvalue()
    assert "plain" in (tmp_path / "training.log").read_text()


def test_shares_are_counted_between_rows() -> None:
    drawn = SharesDrawn(["input", "code", "math"])
    drawn.add([30, 10, 0])
    drawn.add([30, 10, 0])
    assert drawn.take() == {"input": 0.75, "code": 0.25}
    drawn.add([0, 0, 8])
    assert drawn.take() == {"math": 1.0}


def test_a_stage_summary_says_what_was_drawn_and_what_was_learnt() -> None:
    stage = Stage("Specialized", 10, 30, {"input": 0.75, "code": 0.25})
    rows = [{**train_row(20), "loss": 4.0}, {**train_row(30), "loss": 2.0}]
    evaluations = [{"held_out": {"math": {"loss": loss, "bits_per_byte": 1.5}}} for loss in (9.0, 7.0)]
    text = stage_summary(3, stage, rows, evaluations)
    assert "=== stage 3 (Specialized), steps 10-30" in text
    assert "first 4.0000, mean 3.0000, last 2.0000 (2 logged steps); median 10 tok/s" in text
    assert "input        share 75%, drawn 75.0%; train loss 3.0000 -> 3.0000" in text
    assert "math         share 0%; held-out loss 9.0000 -> 7.0000 (1.500 bits per byte)" in text


TRACKED = """
import sys
from pathlib import Path
from tests.trainer.test_metrics import train_row
from trainer.metrics import Metrics
from trainer.run_folder import RunFolder
from trainer.track import PROJECT, Tracker
metrics = Metrics(RunFolder(Path(sys.argv[1])), resume_step=0, tracker=Tracker("trackio", run="r", settings={"a": 1}))
metrics.train(train_row(1))
metrics.evaluation(1, {"input": {"loss": 2.5}}, {"input": 0.5})
metrics.close()
from trackio.sqlite_storage import SQLiteStorage
print([row for row in SQLiteStorage.get_logs(PROJECT, "r")])
"""


def test_curves_go_to_trackio_where_a_recipe_asks(tmp_path: Path) -> None:
    """In a process of its own: the package takes its folder from the environment when it is imported."""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRACKED, str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert "'train/loss': 3.0" in result.stdout
    assert "'train_share/code': 0.25" in result.stdout
    assert "'held_out_loss/input': 2.5" in result.stdout


@pytest.mark.parametrize("which", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_a_sentence(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, which, None)
    with pytest.raises(ConfigError, match=f"the package {which} is not installed: pip install"):
        Tracker(which, run="r", settings={})


def test_elsewhere_progress_is_a_plain_line_now_and_then(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path / "training.log", stream) as log:
        log.progress("step 1")
        log.progress("step 2")
    assert stream.getvalue() == "step 1\n"


def test_what_is_brought_on_the_way_is_told_too(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path / "training.log", stream):
        logging.getLogger("shared.pretrained").info("bringing the public weights")
    logging.getLogger("shared.pretrained").info("not of this run")
    assert stream.getvalue() == "bringing the public weights\n"
    assert (tmp_path / "training.log").read_text().endswith("bringing the public weights\n")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_takes_long_says_so_and_what_is_quick_does_not(tmp_path: Path, is_terminal: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    with RunLog(tmp_path / "training.log", stream) as log:
        with log.alive("quick", every_s=60):
            pass
        with log.alive("compiling", every_s=0.01):
            wait_until(lambda: stream.getvalue().count("compiling: 0 s so far") > 1, "two signs of life")
        log.say("done")
    assert "quick" not in stream.getvalue()
    assert stream.getvalue().endswith("\ndone\n")
    assert "compiling" not in (tmp_path / "training.log").read_text()


def test_the_first_signal_asks_and_the_second_insists() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_row_that_was_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 4):
        append_row(path, {"kind": "train", "step": step})
    path.write_bytes(path.read_bytes()[:-9])  # a disk that was full in the middle of the last
    assert [row["step"] for row in keep_rows_through(path, 3)] == [1, 2]
    append_row(path, {"kind": "train", "step": 3})
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
