"""What a checkpoint of the 135M network costs a training: the wait for its copy, slower steps while it is written.

    python -m benchmarks.checkpoint [--steps N] [--interval-s S] [--folder DIR]

Trains SmolLM2-135M at 4 x 128 tokens a step: some steps in peace, one save in the background, steps until it is on the
disk, then one save in the foreground. The cost over an interval of S seconds is (wait + slowdown) / S.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.trainer.kills import wait_for
from tests.trainer.small_run import command, small_directories
from trainer.config import Directories
from trainer.recipe import load_recipe
from trainer.recipe_data import prepare_data
from trainer.run_folder import RunFolder, read_rows
from trainer.saver import Saver
from trainer.state import Checkpoints
from trainer.train import Trainer

MODELS = Path(__file__).parents[1] / "models"


def timed(trainer: Trainer) -> float:
    """Seconds of one step, the device waited for."""
    start = time.perf_counter()
    trainer.train_step()
    trainer.is_healthy()
    return time.perf_counter() - start


def seconds_to_stop(place: Path, *, during_save: bool) -> float:
    """How long `python -m trainer train original` takes to exit after a SIGTERM, in a save or right after a step."""
    settings = {
        "save_every": 1 if during_save else 250,
        "evaluate_every": 10_000,
        "evaluate_windows": 1,
        "data.max_epochs": 1e6,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    folder = RunFolder(place / "runs" / "original")
    (place / "models").mkdir(parents=True)
    (place / "models" / "smollm2-135m-instruct").symlink_to(MODELS / "smollm2-135m-instruct")
    process = command(place, "train", "original", *overrides, num_threads=None)

    def has_come() -> bool:
        if during_save:
            return any(folder.checkpoints.glob(".step-*"))
        return any(row["kind"] == "train" for row in read_rows(folder.metrics))

    assert wait_for(has_come, process), process.communicate()[1]
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "saved; the same command goes on from" in errors
    return time.perf_counter() - start


def main() -> int:
    """Print the figures; 1 where the overhead misses 2 % or the stop 10 s."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=12, help="undisturbed steps to compare with")
    parser.add_argument("--interval-s", type=float, default=600.0, help="seconds of training between checkpoints")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    config = load_recipe("original", ["gradient_accumulation_steps=1"])
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        texts = small_directories(Path(place))
        trainer = Trainer(config, prepare_data(config.data, Directories(data_dir=texts.data_dir, models_dir=MODELS)))
        checkpoints = Checkpoints(Path(place) / "checkpoints", keep=1)
        saver = Saver(checkpoints)
        for _ in range(3):
            timed(trainer)
        undisturbed = [timed(trainer) for _ in range(options.steps)]
        usual_s = statistics.median(undisturbed)

        start = time.perf_counter()
        saver.save(trainer.state())
        wait_s = time.perf_counter() - start
        slowed = []
        while saver.is_busy:
            slowed.append(timed(trainer))
        written_s = time.perf_counter() - start
        saver.wait()
        slowdown_s = sum(slowed) - usual_s * len(slowed)
        size = sum(path.stat().st_size for path in checkpoints.path(trainer.step - len(slowed)).iterdir())

        start = time.perf_counter()
        checkpoints.save(trainer.state())
        foreground_s = time.perf_counter() - start
        saver.close()
        del trainer, saver
        stop_s = seconds_to_stop(Path(place) / "between", during_save=False)
        stop_in_save_s = seconds_to_stop(Path(place) / "in-save", during_save=True)

    cost_s = wait_s + slowdown_s
    overhead = cost_s / options.interval_s
    print(f"checkpoint                      {size / 1e9:.2f} GB")
    print(f"a step of 4 x 128 tokens        {usual_s:.3f} s (median of {len(undisturbed)})")
    print(f"training waits for the copy     {wait_s:.2f} s")
    print(
        f"written in the background in    {written_s:.2f} s, {len(slowed)} steps meanwhile, "
        f"{slowdown_s:.2f} s slower in all"
    )
    print(f"cost of one checkpoint          {cost_s:.2f} s; in the foreground {foreground_s:.2f} s")
    print(
        f"overhead at one in {options.interval_s:.0f} s        {overhead:.2%}; "
        f"below 2 % from one in {cost_s / 0.02:.0f} s on"
    )
    print(
        f"SIGTERM to exit 0               {stop_s:.1f} s, with 4 x 8 x 128 tokens a step; "
        f"{stop_in_save_s:.1f} s where a save is under way"
    )
    return int(overhead >= 0.02 or stop_s >= 10)


if __name__ == "__main__":
    sys.exit(main())
