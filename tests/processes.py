"""Processes of ours for tests: each `python -m ...` with settings of its own and a log, and ways to harm it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0

T = TypeVar("T")


def wait_until(look: Callable[[], T | None], what: str, *, timeout_s: float = PATIENCE_S) -> T:
    """Return the first answer that is true."""
    give_up_at = time.monotonic() + timeout_s
    while not (answer := look()):
        assert time.monotonic() < give_up_at, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.02)
    return answer


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Process:
    """`python -m ...` with settings of its own and a log."""

    def __init__(self, arguments: list[str], *, log: Path, **settings: Any) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SMOLLM_", "UI_", "API_", "GRADIO_"))}
        environment = {**inherited, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in settings.items()}}
        self.log_path = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.popen.kill()
        self.popen.wait()

    def pause(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def ask_to_end(self) -> None:
        self.go_on()
        self.popen.terminate()

    def wait(self, timeout_s: float = 15.0) -> int:
        """Return the exit code."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
