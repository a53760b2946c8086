"""A whole run in seconds: tiny texts of the three sources and the recipe `smoke` over them."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.config import Directories, TrainConfig
from trainer.prepare import PreparedData
from trainer.recipe import load_recipe
from trainer.recipe_data import prepare_data
from trainer.run import Run
from trainer.run_folder import RunFolder
from trainer.run_log import RunLog
from trainer.state import Checkpoints

ROOT = Path(__file__).parents[2]

WORDS = ("gentle", "noble", "speak", "before", "proceed", "further", "citizen", "honest", "people", "corn", "hunger")


@functools.cache
def texts() -> dict[str, str]:
    """About ten kilobytes per source, in many short documents."""
    word = [WORDS[n % len(WORDS)] for n in range(7 * 120)]
    prose = [
        f"{'First' if n % 2 else 'Second'} Citizen:\nWe {word[n]} of {word[5 * n]} and {word[7 * n]}, "
        f"ere the {word[3 * n]} {n} be known."
        for n in range(120)
    ]
    code = [
        f'def add_{n}(value: int) -> int:\n    """Add {n}."""\n    return value + {n * n}\n\n\nprint(add_{n}({n}))'
        for n in range(120)
    ]
    math = [
        f"Question: What is {n} + {3 * n}?\nAnswer: {n} + {3 * n} = {4 * n}. The answer is {4 * n}." for n in range(120)
    ]
    return {name: "\n\n".join(parts) + "\n" for name, parts in {"input": prose, "code": code, "math": math}.items()}


def small_directories(root: Path) -> Directories:
    """Make data/ with the three texts below `root` and name its neighbours."""
    data_dir = root / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (data_dir / f"{name}.txt").write_text(text, encoding="utf-8")
    return Directories(data_dir=data_dir, runs_dir=root / "runs", models_dir=root / "models")


def small_data(root: Path, config: TrainConfig | None = None) -> PreparedData:
    return prepare_data((config or load_recipe("smoke")).data, small_directories(root))


def train_small(
    root: Path, name: str = "smoke", overrides: Sequence[str] = (), *, accept_changes: bool = False
) -> RunFolder:
    """Train `smoke` below `root` in this process, to the end."""
    config = load_recipe("smoke", overrides)
    folder = RunFolder(root / "runs" / name)
    with folder.locked(), open(os.devnull, "w") as nowhere:
        folder.open(config, accept_changes=accept_changes)
        with RunLog(folder.training_log, nowhere) as log:
            run = Run(config, small_data(root, config), folder, models_dir=root / "models", log=log)
            assert run.to_the_end() == "finished"
    return folder


def command(
    root: Path, *arguments: str, launcher: Sequence[str] = (), before: Sequence[str] = (), num_threads: int | None = 1
) -> subprocess.Popen[str]:
    """Start `python -m trainer ...` over the texts below `root`.

    Args:
        launcher: Python's arguments that start another module first: torchrun.
        before: a command that runs Python, such as one that enters a namespace.
        num_threads: of PyTorch until the recipe says otherwise; None: all.
    """
    small_directories(root)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SMOLLM_")}
    environment |= {f"SMOLLM_{name.upper()}_DIR": str(root / name) for name in ("data", "runs", "models")}
    environment["PYTHONPATH"] = str(ROOT)
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return subprocess.Popen(
        [*before, sys.executable, *launcher, "-m", "trainer", *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail and return its sentence."""
    assert main(arguments) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    return sentence


def weights_sha256(folder: RunFolder) -> str:
    """Hash of the last checkpoint's fp32 weights and optimizer averages."""
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    state = checkpoints.load(checkpoints.choose("last"))
    digest = hashlib.sha256(str(state["step"]).encode())
    averages = state["optimizer"]["state"].values()
    for tensor in [*state["model"].values(), *(average[key] for average in averages for key in sorted(average))]:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
