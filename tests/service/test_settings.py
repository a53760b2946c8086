"""A setting that cannot work is one sentence and exit code 2 at the start, not a fault later."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from annotated_types import Ge, Gt, Le, Lt

from frontend.settings import Settings as PageSettings
from service.queue.job import QueueLimits
from service.settings import Settings, doubtful_names, get_settings, variables_of
from shared.errors import ConfigError, StorageError
from tests.processes import ROOT
from trainer.config import Directories


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_PORT", "0"),
        ("SMOLLM_MAX_BODY_BYTES", "0"),
        ("SMOLLM_MAX_QUEUED_JOBS", "0"),
        ("SMOLLM_MAX_QUEUED_TOKENS", "1"),
        ("SMOLLM_MAX_TIMEOUT_S", "0"),
        ("SMOLLM_RESULT_TTL_S", "0"),
        ("SMOLLM_LEASE_MS", "0"),
        ("SMOLLM_MAX_ATTEMPTS", "0"),
        ("SMOLLM_NUM_WORKERS", "0"),
        ("SMOLLM_NUM_SLOTS", "0"),
        ("SMOLLM_NUM_SLOTS", "4097"),
        ("SMOLLM_MAX_CACHED_TOKENS", "1"),
        ("SMOLLM_NUM_THREADS", "-1"),
        ("SMOLLM_SHUTDOWN_GRACE_S", "inf"),
        ("SMOLLM_MODEL_POLL_S", "0"),
        ("SMOLLM_WORKER_METRICS_PORT", "70000"),
    ],
)
def test_a_number_out_of_bounds_is_named_with_its_bound(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    with pytest.raises(ConfigError, match=rf"The setting {name} is '{value}': Input should be .*\d"):
        get_settings()


def test_every_number_has_bounds() -> None:
    """Below and above, but where the memory of Redis or of the device is the only bound there is."""
    numbers = {
        name: field
        for name, field in Settings.model_fields.items()
        if {int, float} & {field.annotation, *get_args(field.annotation)}
    }
    unbounded_below = {
        name for name, field in numbers.items() if not any(isinstance(it, Ge | Gt) for it in field.metadata)
    }
    unbounded_above = {
        name for name, field in numbers.items() if not any(isinstance(it, Le | Lt) for it in field.metadata)
    }
    assert "api_port" in numbers and not unbounded_below
    assert unbounded_above == {"max_queued_jobs", "max_queued_tokens", "max_cached_tokens"}


def test_the_queue_s_limits_are_the_settings() -> None:
    assert Settings(max_attempts=5, lease_ms=700).queue_limits == QueueLimits(max_attempts=5, lease_ms=700)


@pytest.mark.parametrize("kernels", ["avx512bf16", "nonesuch"])
def test_a_level_of_kernels_that_is_not_there_ends_the_start(kernels: str, tmp_path: Path) -> None:
    """A slip of the pen in its name must not mean PyTorch, several times as slow."""
    environment = {**os.environ, "SMOLLM_KERNELS": kernels, "SMOLLM_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "service", "worker"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == ConfigError.exit_code
    assert f"kernels is {kernels!r}, but this CPU has no such level; use auto, off, " in ended.stderr


@pytest.mark.parametrize("process", ["api", "worker"])
def test_a_file_for_the_models_folder_ends_the_start(process: str, tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    environment = {**os.environ, "SMOLLM_MODELS_DIR": "models", "SMOLLM_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "service", process]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == StorageError.exit_code
    assert ended.stderr.endswith("models cannot be read: Not a directory\n")
    assert "Traceback" not in ended.stderr


def test_a_misspelt_setting_is_told_what_was_meant() -> None:
    given = ["SMOLLM_WEIGTHS", "smollm_slots", "SMOLLM_API_PORT", "SMOLLM_MODEL_DIR", "SMOLLM_SERVICE_HOST", "PATH"]
    meant = ["API_PORT", "SMOLLM_MODELS_DIR", "SMOLLM_WEIGHTS", "SMOLLM_NUM_SLOTS"]
    assert [sentence.rpartition("did you mean ")[2].rstrip("?") for sentence in doubtful_names(given)] == meant


def test_no_setting_of_any_process_is_doubted() -> None:
    every = [*variables_of(Settings), *variables_of(PageSettings), *variables_of(Directories)]
    assert doubtful_names(every) == []


def test_a_misspelt_setting_in_env_is_a_warning_at_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SMOLLM_WEIGTHS=int8\n")
    command = [sys.executable, "-m", "service", "api"]
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that it ends at once
        environment = {**os.environ, "API_PORT": str(taken.getsockname()[1]), "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert "There is no setting SMOLLM_WEIGTHS, so it sets nothing; did you mean SMOLLM_WEIGHTS?" in ended.stderr
    assert ended.returncode == 2
