"""One API for the session, one scripted worker per test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from service.queue.local_server import LocalRedis, start_redis
from shared.catalog import ModelFolder, list_model_folders
from shared.tokenizer import Tokenizer
from tests.service.api.stack import Api, ScriptedWorker, client_of, make_settings, running_api, wait_until
from tests.service.worker_process import WorkerProcess
from tests.tiny import write_tiny_export


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` has a chat template, `plain` has none."""
    directory = tmp_path_factory.mktemp("models")
    write_tiny_export(directory, "tiny", seed=0)
    folder = write_tiny_export(directory, "plain", seed=1)
    path = folder.path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def folders(models_dir: Path) -> dict[str, ModelFolder]:
    return list_model_folders(models_dir)


@pytest.fixture(scope="session")
def tokenizer(models_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(models_dir / "tiny")


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def shared_api(redis_server: LocalRedis, models_dir: Path, runs_dir: Path) -> Iterator[Api]:
    with running_api(make_settings(redis_server.url, models_dir, runs_dir)) as api:
        yield api


@pytest.fixture
def worker(redis_url: str, folders: dict[str, ModelFolder], tokenizer: Tokenizer) -> Iterator[ScriptedWorker]:
    worker = ScriptedWorker(redis_url, {name: (folder.revision, tokenizer) for name, folder in folders.items()})
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
def api(shared_api: Api, redis_url: str) -> Api:
    """The API with an empty Redis and no worker."""
    return shared_api


@pytest.fixture
def client(api: Api, worker: ScriptedWorker) -> Iterator[httpx2.Client]:
    """A client of an API that has a worker."""
    with client_of(api) as client:
        yield client


@pytest.fixture(scope="session")
def whole_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A Redis, a worker process and an API of their own: nothing in it is scripted."""
    directory = tmp_path_factory.mktemp("whole")
    write_tiny_export(directory / "models", "tiny")
    run = directory / "runs" / "first"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    with start_redis() as redis:
        worker = WorkerProcess(redis.url, directory / "models", directory / "worker.log", num_slots=8)
        try:
            with running_api(make_settings(redis.url, directory / "models", directory / "runs")) as api:
                with client_of(api) as client:
                    wait_until(lambda: client.get("/ready").status_code == 200, "the worker", 60.0)
                yield api
        finally:
            worker.kill()
