"""The whole house as processes: Redis, API, worker, trainer and page, each on a port of its own."""

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

import httpx2

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0

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
    def log(self) -> str:
        return self.log_path.read_text()

    def pause(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def ask_to_end(self) -> None:
        self.go_on()
        self.popen.terminate()

    def wait(self) -> int:
        """Return the exit code."""
        try:
            return self.popen.wait(15)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise


class Stack:
    """Everything, started at once and waited for where it is needed."""

    def __init__(self, root: Path, redis_url: str) -> None:
        self.root = root
        self.redis_url = redis_url
        self.processes: list[Process] = []
        self.api_port, self.page_port = free_port(), free_port()
        self.api_url, self.page_url = f"http://127.0.0.1:{self.api_port}", f"http://127.0.0.1:{self.page_port}"
        self.api = self.start_api()
        self.worker = self.start("worker", ["service", "worker"], **self.service_settings)
        self.page = self.start("page", ["frontend"], UI_PORT=self.page_port, SMOLLM_API_URL=self.api_url)
        self.http = httpx2.Client(base_url=self.api_url, trust_env=False, timeout=10.0)

    @property
    def service_settings(self) -> dict[str, Any]:
        return {
            "SMOLLM_REDIS_URL": self.redis_url,
            "SMOLLM_MODELS_DIR": self.root / "models",
            "SMOLLM_RUNS_DIR": self.root / "runs",
            "SMOLLM_DEFAULT_MODEL": "tiny",
            "SMOLLM_MAX_QUEUED_JOBS": 2,
            "SMOLLM_MODEL_POLL_S": 0.2,
            "SMOLLM_DTYPE": "float32",
            "SMOLLM_NUM_THREADS": 1,
        }

    def start(self, name: str, arguments: list[str], **settings: Any) -> Process:
        process = Process(arguments, log=self.root / f"{name}.log", **settings)
        self.processes.append(process)
        return process

    def start_api(self) -> Process:
        return self.start("api", ["service", "api"], API_PORT=self.api_port, **self.service_settings)

    def stop_api(self, *, kill: bool = False) -> None:
        self.processes.remove(self.api)
        if kill:
            self.api.popen.kill()
            self.api.popen.wait()
        else:
            self.api.ask_to_end()
            assert self.api.wait() == 0

    def restart_api(self) -> None:
        self.api = self.start_api()
        wait_until(lambda: answers(f"{self.api_url}/ready"), "the API to be ready again")

    def wait_until_ready(self) -> None:
        wait_until(lambda: answers(f"{self.api_url}/ready"), "the API to be ready")
        wait_until(lambda: answers(f"{self.page_url}/health"), "the page to be up")

    def job(self, job_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get(f"/jobs/{job_id}").raise_for_status().json()
        return answer

    def num_unfinished(self) -> int:
        models = self.http.get("/health").raise_for_status().json()["models"]
        return sum(model["queued"] + model["running"] for model in models)

    def stop(self) -> list[int]:
        """End everything; return the exit codes."""
        self.http.close()
        for process in self.processes:
            process.ask_to_end()
        return [process.wait() for process in self.processes]


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False, timeout=2.0).status_code == 200
    except httpx2.HTTPError:
        return False
