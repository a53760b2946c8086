"""A service of several processes on this machine, each of which may be killed, frozen or told to stop at any time."""

from __future__ import annotations

import dataclasses
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import redis

from service.engine.kernels.build import KernelsUnavailable
from service.engine.kernels.library import load_library
from service.queue import keys
from service.queue.connection import blocking_redis
from service.queue.local_server import LocalRedis, start_redis
from shared.checkpoint import write_export
from shared.config import ModelConfig
from shared.model import SmolLM2
from tests.e2e.nursery import Foundling, Nursery
from tests.processes import Process, free_port, wait_until
from tests.tiny import TINY, tiny_tokenizer

MODEL = "steady"
AnyProcess = Process | Foundling

STEADY: ModelConfig = dataclasses.replace(
    TINY, hidden_size=192, intermediate_size=512, num_hidden_layers=48, max_position_embeddings=2_048
)
"""19 million numbers: milliseconds a token, so that something can happen to a completion in its middle."""


def write_steady_export(models_dir: Path) -> None:
    """A model that never ends by itself, so that every completion has the length asked for."""
    model = SmolLM2(STEADY)
    model.initialize(3)
    write_export(models_dir / MODEL, model.eval(), tiny_tokenizer(), trained_length=None)
    path = models_dir / MODEL / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": []}))


def steady_dtype() -> str:
    """Return the arithmetic in which a completion does not depend on what runs beside it.

    The compiled kernels compute each row by itself, to the bit. PyTorch's fp32 sums in an order that depends on the
    number of rows, which changes a draw once in some thousands of tokens; it is left where nothing can be compiled.
    """
    try:
        load_library("auto")
    except KernelsUnavailable:
        return "float32"
    return "bfloat16"


class Cluster:
    """One Redis with an append-only file, any number of API and worker processes."""

    def __init__(
        self,
        root: Path,
        *,
        model: str = MODEL,
        models_dir: Path | None = None,
        nursery: Nursery | None = None,
        **settings: Any,
    ) -> None:
        """`settings` are those of the service, for all processes, in lower case. A nursery starts them sooner."""
        self.root = root
        self.model = model
        self.nursery = nursery
        self.settings = {
            "models_dir": models_dir or root / "models",
            "runs_dir": root / "runs",
            "default_model": model,
            "dtype": steady_dtype(),
            "device": "cpu",
            "num_threads": 1,
            "log_format": "text",
            **settings,
        }
        if models_dir is None and not (root / "models" / MODEL).exists():
            write_steady_export(root / "models")
        self.redis_port = free_port()
        self.redis = self.start_redis()
        self.client: redis.Redis = blocking_redis(self.redis.url)
        self.apis: dict[str, AnyProcess] = {}
        """URL -> process."""
        self.workers: list[AnyProcess] = []
        self._num_started = 0

    def start_redis(self) -> LocalRedis:
        self.redis = start_redis(port=self.redis_port, directory=self.root / "redis")
        return self.redis

    def start_worker(self, **settings: Any) -> AnyProcess:
        worker = self._start("worker", settings)
        self.workers.append(worker)
        return worker

    def start_api(self) -> str:
        """Return the URL of a new API process, which may not listen yet."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self.apis[url] = self._start("api", {}, API_PORT=port)
        return url

    def _start(self, command: str, settings: dict[str, Any], **environment: Any) -> AnyProcess:
        self._num_started += 1
        environment |= {f"SMOLLM_{name.upper()}": value for name, value in (self.settings | settings).items()}
        log = self.root / f"{command}{self._num_started}.log"
        environment["SMOLLM_REDIS_URL"] = self.redis.url
        if self.nursery is not None:
            return self.nursery.start(command, log=log, **environment)
        return Process(["service", command], log=log, **environment)

    def wait_until_ready(self, num_workers: int | None = None) -> None:
        """Wait until every API process serves and so many workers take jobs (all that were started, by default)."""
        for url in self.apis:
            wait_until(lambda url=url: get(url, "/ready")[0] == 200, f"{url} to be ready")  # type: ignore[misc]
        wanted = len(self.workers) if num_workers is None else num_workers
        wait_until(lambda: len(self.serving_workers()) >= wanted, f"{wanted} workers")

    def serving_workers(self) -> list[AnyProcess]:
        """Workers of ours that say now that they take jobs."""
        seen = [str(name) for name in self.client.zrange(keys.SERVED + self.model, 0, -1)]
        return [worker for worker in self.workers if any(is_of(name, worker) for name in seen)]

    def holder_of(self, job_id: str) -> AnyProcess:
        """The worker that has, or last had, a job."""
        wait_until(lambda: self.find_holder(job_id) is not None, f"a worker to take {job_id}")
        holder = self.find_holder(job_id)
        assert holder is not None
        return holder

    def find_holder(self, job_id: str) -> AnyProcess | None:
        """As `holder_of`, or None if nobody took it yet or who did was killed."""
        name = str(self.client.hget(keys.JOB + job_id, "worker"))
        return next((worker for worker in self.workers if is_of(name, worker)), None)

    def kill_worker(self, worker: AnyProcess) -> None:
        worker.kill()
        self.workers.remove(worker)

    def kill_api(self, url: str) -> None:
        self.apis.pop(url).kill()

    def counts(self) -> dict[str, int]:
        """Queued and running jobs and their cost, as Redis counts them."""
        found = self.client.hgetall(keys.COUNTS + self.model)
        return {name: int(found.get(name, 0)) for name in ("queued", "queued_cost", "running", "running_cost")}

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that each process has taken so far; `client` is the one that asks."""
        import psutil

        redis = self.redis.process
        assert redis is not None
        pids = {"client": os.getpid(), "redis": redis.pid}
        pids |= {f"api{place}": api.pid for place, api in enumerate(self.apis.values())}
        pids |= {f"worker{place}": worker.pid for place, worker in enumerate(self.workers)}
        return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}

    def stop(self) -> None:
        """End everything, whatever state it is in."""
        for process in [*self.apis.values(), *self.workers]:
            process.kill()
        self.client.close()
        self.redis.stop()


def is_of(worker_name: str, process: AnyProcess) -> bool:
    """A worker's name is host, process id and four digits."""
    return worker_name.rsplit("-", 2)[-2:-1] == [str(process.pid)]


def get(url: str, path: str) -> tuple[int, Any]:
    """Return status and JSON; status 0 where nobody listens."""
    try:
        with urllib.request.urlopen(url + path, timeout=5) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, None
