"""The honest speed, the rows on disk, what is forgotten on resume, and what the console shows."""

from __future__ import annotations

import io
import logging
import signal
import time
from pathlib import Path

import pytest

from shared.config import SMOLLM2_135M
from trainer.evaluate import HeldOut
from trainer.metrics import Clock, Metrics, flops_per_token
from trainer.progress import duration
from trainer.report import overfit_alarms
from trainer.run_folder import RunFolder, append_row, read_rows
from trainer.run_log import RunLog
from trainer.signals import StopRequest


def test_flops_per_token_of_the_original() -> None:
    assert flops_per_token(SMOLLM2_135M, 128) == 6 * 134_515_008 + 12 * 30 * 576 * 128
    assert flops_per_token(SMOLLM2_135M, 2048) / 1e9 == pytest.approx(1.232, abs=0.001)


def test_evaluation_and_saves_do_not_count_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
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
        "source_loss": {"input": 3.0},
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


def test_elsewhere_progress_is_a_plain_line_now_and_then(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path / "training.log", stream) as log:
        log.progress("step 1")
        log.progress("step 2")
    assert stream.getvalue() == "step 1\n"


def test_the_first_signal_asks_and_the_second_insists() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
