"""The whole house as processes: Redis, API, worker, trainer and page, each on a port of its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from service.queue.local_server import LocalRedis
from tests.processes import Process, free_port, wait_until


class Stack:
    """Everything, started at once and waited for where it is needed."""

    def __init__(self, root: Path, redis: LocalRedis) -> None:
        self.root = root
        self.redis = redis
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
            "SMOLLM_REDIS_URL": self.redis.url,
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

    @contextmanager
    def without_redis(self) -> Iterator[None]:
        """Redis answers nobody meanwhile, and has everything afterwards."""
        assert self.redis.process is not None
        self.redis.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.redis.process.send_signal(signal.SIGCONT)

    def num_answers(self, method: str, route: str, status: int) -> int:
        """How many requests of a kind the API answered so."""
        name = f'api_requests_total{{method="{method}",route="{route}",status="{status}"}} '
        lines = self.http.get("/metrics").text.splitlines()
        return sum(int(float(line.removeprefix(name))) for line in lines if line.startswith(name))

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
