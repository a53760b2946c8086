"""Kill a training process at a chosen moment: a stage's border, in a save, in an evaluation, in sampling, anywhere."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tests.trainer.small_run import command
from trainer.config import TrainConfig
from trainer.run_folder import RunFolder, read_rows

What = Literal["start-up", "border", "save", "evaluation", "samples", "anywhere"]

PATIENCE_S = 240.0

SLOWLY = [
    *("--set", "sample_every=1", "--set", "sample_tokens=24"),
    *("--set", "prompts=[{ text = 'First' }, { text = 'def' }, { text = 'Question' }, { text = 'We speak' }]"),
]
"""Arguments that make a run of `smoke` take seconds and change no update, so that a busy test looks before its end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: at the first `what` at or after a step; "start-up" and "anywhere" wait `delay_s` besides."""

    what: What
    step: int = 0
    delay_s: float = 0.0

    def has_come(self, folder: RunFolder, config: TrainConfig) -> bool:
        """Look at what the run has left on the disk so far."""
        if self.what == "save":
            return any(int(path.name[6:14]) >= self.step for path in folder.checkpoints.glob(".step-*"))
        rows = read_rows(folder.metrics)
        trained = max((row["step"] for row in rows if row["kind"] == "train"), default=0)
        if trained < self.step or self.what in ("border", "anywhere"):
            return trained >= self.step
        evaluated = {row["step"] for row in rows if row["kind"] == "evaluation"}
        is_evaluated, is_sampled = trained in evaluated, trained in {row["step"] for row in read_rows(folder.samples)}
        if self.what == "evaluation":
            ends = {stage.end_step for stage in config.stages}
            return (trained % config.evaluate_every == 0 or trained in ends) and not is_evaluated
        return trained % config.sample_every == 0 and is_evaluated and not is_sampled


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Return True as soon as the condition holds, False where the process ended first."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)
    return True


def num_starts(folder: RunFolder) -> int:
    """How often a process has begun or gone on with the run; by then it has put the files of the last one in order."""
    return folder.training_log.read_text().count("at step") if folder.training_log.is_file() else 0


def kill_at(moment: Moment, root: Path, config: TrainConfig, *arguments: str) -> dict[str, Any] | None:
    """Train until the moment, kill -9, and return what was found after it; None where the run ended before it came."""
    folder = RunFolder(root / "runs" / config.name)
    starts = num_starts(folder)
    process = command(root, "train", *arguments)
    try:
        if moment.what == "start-up":
            time.sleep(moment.delay_s)
        else:
            begun = wait_for(lambda: num_starts(folder) > starts, process)
            if not begun or not wait_for(lambda: moment.has_come(folder, config), process):
                return None
            time.sleep(moment.delay_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if process.returncode == 0:
        return None
    rows = read_rows(folder.metrics)
    return {
        "trained": max((row["step"] for row in rows if row["kind"] == "train"), default=0),
        "last": rows[-1]["kind"] if rows else "nothing",
        "checkpoints": sorted(int(path.name[5:]) for path in folder.checkpoints.glob("step-*")),
        "half_written": sorted(int(path.name[6:14]) for path in folder.checkpoints.glob(".step-*")),
    }
