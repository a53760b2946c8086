"""What the API says of itself, and how it refuses while it cannot serve."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.queue.local_server import LocalRedis, start_redis
from tests.service.api.events import open_stream
from tests.service.api.stack import Api, ScriptedWorker, client_of, make_settings, running_api, wait_until
from tests.service.api.test_bad_input import assert_error

BODY = {"prompt": "First Citizen:", "max_new_tokens": 4}


def test_live_and_ready(client: httpx2.Client) -> None:
    assert client.get("/live").status_code == 200
    ready = client.get("/ready")
    assert ready.status_code == 200 and ready.json()["model"] == "tiny"


def test_without_a_worker_nothing_is_admitted(api: Api) -> None:
    with client_of(api) as client:
        assert client.get("/live").status_code == 200
        error = assert_error(client.get("/ready"), 503, type="unavailable_error")
        assert "tiny" in error["message"]
        for body in (BODY, BODY | {"stream": True}):
            error = assert_error(client.post("/generate", json=body), 503, code="no_worker")
        assert_error(client.post("/v1/completions", json={"prompt": "a"}), 503, code="no_worker")
        health = client.get("/health").json()
        assert health["workers"] == []


def test_health_is_for_people(client: httpx2.Client) -> None:
    client.post("/generate", json=BODY)
    health = client.get("/health").json()
    assert health["default_model"] == "tiny"
    models = {model["name"]: model for model in health["models"]}
    assert set(models) == {"tiny", "plain"}
    assert {"queued", "running", "workers", "tokens_per_second", "revision"} <= set(models["tiny"])
    (worker,) = health["workers"]
    assert worker["id"] == "scripted" and worker["device"] == "cpu"
    assert health["versions"]


def test_metrics_are_prometheus_s(client: httpx2.Client) -> None:
    for _ in range(3):
        client.post("/generate", json=BODY)
    client.post("/generate", json=BODY | {"temperature": -1})
    client.get("/no/such/route/1")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert all(name.startswith(("api_", "queue_")) for name in families), sorted(families)
    routes = {sample.labels["route"] for sample in families["api_requests"].samples}
    assert "/generate" in routes and "/no/such/route/1" not in routes, "one series per route, not per address"
    jobs = [
        s for s in families["api_jobs"].samples if s.labels.get("state") == "succeeded" and s.name == "api_jobs_total"
    ]
    assert sum(sample.value for sample in jobs) >= 3
    refusals = {s.labels["code"]: s.value for s in families["api_refusals"].samples if s.name == "api_refusals_total"}
    assert refusals["invalid_value"] >= 1
    smallest = min(float(s.labels["le"]) for s in families["api_first_token_seconds"].samples if "le" in s.labels)
    assert smallest < 0.001


def test_open_streams_are_counted(client: httpx2.Client, worker: ScriptedWorker) -> None:
    worker.ends.clear()
    with open_stream(client, "POST", "/generate", json=BODY | {"stream": True}) as (_, events):
        next(events)
        assert "api_open_streams 1.0" in client.get("/metrics").text
        worker.ends.set()
        list(events)
    wait_until(lambda: "api_open_streams 0.0" in client.get("/metrics").text, "the stream to be closed")


def test_the_description_is_whole(client: httpx2.Client) -> None:
    description = client.get("/openapi.json").json()
    for route in ("/docs", "/redoc"):
        page = client.get(route).raise_for_status().text
        addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
        assert addresses and all(address.startswith("/docs/assets/") for address in addresses)
        assert all(client.get(address).status_code == 200 for address in addresses)
    for path, methods in {
        "/generate": {"post"},
        "/jobs/{job_id}": {"get", "delete"},
        "/jobs/{job_id}/events": {"get"},
        "/v1/completions": {"post"},
        "/v1/chat/completions": {"post"},
        "/v1/models": {"get"},
        "/tokenize": {"post"},
        "/detokenize": {"post"},
        "/runs": {"get"},
    }.items():
        assert methods <= set(description["paths"][path]), path
    references = set(re.findall(r'"\$ref":\s*"([^"]+)"', client.get("/openapi.json").text))
    for reference in references:
        assert reference.startswith("#/components/schemas/")
        assert reference.rpartition("/")[2] in description["components"]["schemas"], reference
    assert description["components"]["schemas"]["GenerateRequest"]["examples"]


@pytest.fixture
def own_redis() -> Iterator[LocalRedis]:
    with start_redis() as server:
        yield server


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_while_redis_is_away_requests_are_refused_at_once(
    own_redis: LocalRedis, models_dir: Path, runs_dir: Path, how: str
) -> None:
    with running_api(make_settings(own_redis.url, models_dir, runs_dir)) as api, client_of(api) as client:
        assert_error(client.post("/generate", json=BODY), 503, code="no_worker")
        process = own_redis.process
        assert process is not None
        if how == "stopped":
            own_redis.stop(kill=True)
        else:
            process.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: client.get("/ready").json()["error"]["code"] == "redis_unavailable", "the outage")
            for path, body in (("/generate", BODY), ("/generate", BODY | {"stream": True}), ("/v1/completions", BODY)):
                started = time.monotonic()
                response = client.post(path, json={k: v for k, v in body.items() if "/v1" not in path or k == "prompt"})
                assert time.monotonic() - started < 0.1
                assert_error(response, 503, code="redis_unavailable")
            assert client.get("/live").status_code == 200
            assert client.get("/health").status_code in (200, 503)
            assert client.get("/metrics").status_code == 200
            assert client.get("/v1/models").status_code == 200
        finally:
            if how == "frozen":
                process.send_signal(signal.SIGCONT)
        if how == "frozen":
            wait_until(lambda: client.get("/ready").json()["error"]["code"] == "no_worker", "Redis to be back", 3.0)


def test_a_full_queue_is_429_and_says_when(
    redis_url: str, models_dir: Path, runs_dir: Path, worker: ScriptedWorker
) -> None:
    worker.take_no_more()
    settings = make_settings(redis_url, models_dir, runs_dir, max_queued_jobs=2)
    with running_api(settings) as api, client_of(api) as client:
        queued = [client.post("/generate", json=BODY, headers={"Prefer": "respond-async"}) for _ in range(2)]
        assert [response.status_code for response in queued] == [202, 202]
        for body in (BODY, BODY | {"stream": True}):
            response = client.post("/generate", json=body)
            assert_error(response, 429, type="rate_limit_error", code="queue_full")
            assert int(response.headers["retry-after-ms"]) <= 1000 * int(response.headers["retry-after"])
        response = client.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert_error(response, 429)
        worker.takes.set()
        wait_until(lambda: client.get(queued[1].headers["location"]).json()["status"] == "succeeded", "room")
        assert client.post("/generate", json=BODY).status_code == 200


def test_of_several_choices_all_or_none_are_admitted(
    redis_url: str, models_dir: Path, runs_dir: Path, worker: ScriptedWorker
) -> None:
    worker.take_no_more()
    settings = make_settings(redis_url, models_dir, runs_dir, max_queued_jobs=2)
    with running_api(settings) as api, client_of(api) as client:
        assert_error(client.post("/v1/completions", json={"prompt": "a", "n": 3}), 429)
        models = {model["name"]: model for model in client.get("/health").json()["models"]}
        assert models["tiny"]["queued"] == 0


def test_a_cost_that_no_empty_queue_could_take_is_lowered(
    redis_url: str, models_dir: Path, runs_dir: Path, worker: ScriptedWorker
) -> None:
    """Else a client would be told for ever to try again."""
    settings = make_settings(redis_url, models_dir, runs_dir, max_queued_tokens=50)
    with running_api(settings) as api, client_of(api) as client:
        response = client.post("/generate", json={"prompt": "a", "max_new_tokens": 100})
        assert response.status_code == 200 and response.json()["usage"]["total_tokens"] <= 50


def test_the_api_imports_no_torch() -> None:
    code = (
        "import service.api.app, service.api.server, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"


def run_service(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_taken_port_is_a_sentence(api: Api) -> None:
    port = api.url.rpartition(":")[2]
    answer = run_service("api", API_PORT=port, SMOLLM_REDIS_URL=api.settings.redis_url.get_secret_value())
    assert answer.returncode == 2
    assert f"Port {port}" in answer.stderr and "API_PORT" in answer.stderr and "Traceback" not in answer.stderr


def test_a_setting_that_cannot_be_is_a_sentence() -> None:
    answer = run_service("api", API_PORT="many")
    assert answer.returncode == 2 and "API_PORT" in answer.stderr and "Traceback" not in answer.stderr


def test_health_tells_in_words(api: Api, worker: ScriptedWorker) -> None:
    port = api.url.rpartition(":")[2]
    answer = run_service("health", "--ready", API_PORT=port)
    assert answer.returncode == 0 and "ready" in answer.stdout
    worker.stop()
    worker.queue.withdraw()
    assert run_service("health", API_PORT=port).returncode == 0
    answer = run_service("health", "--ready", API_PORT=port)
    assert answer.returncode == 1 and "not ready" in answer.stdout


def test_the_process_serves_and_leaves_cleanly(
    redis_url: str, models_dir: Path, worker: ScriptedWorker, tmp_path: Path
) -> None:
    environment = {**os.environ, "API_PORT": "0", "SMOLLM_REDIS_URL": redis_url, "SMOLLM_MODELS_DIR": str(models_dir)}
    environment["SMOLLM_SHUTDOWN_GRACE_S"] = "1"
    with socket_of_free_port() as port:
        environment["API_PORT"] = str(port)
    log = tmp_path / "api.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "service", "api"], stderr=file, env=environment)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

            def is_ready() -> bool:
                try:
                    return client.get("/ready").status_code == 200
                except httpx2.ConnectError:
                    assert process.poll() is None, log.read_text()
                    return False

            wait_until(is_ready, "the process", 30.0)
            assert client.post("/generate", json={"prompt": "secret words"}).status_code == 200
            worker.ends.clear()
            with client.stream("POST", "/generate", json={"prompt": "a", "stream": True}) as stream:
                lines = stream.iter_lines()  # kept: a forgotten iterator closes the connection
                assert next(lines)
                process.terminate()
                assert process.wait(10) == 0
        assert "secret words" not in log.read_text(), "prompts are not logged unless asked"
        assert "Traceback" not in log.read_text(), "a stream that outlasts the grace is no fault of ours"
        assert "timeout graceful shutdown exceeded" in log.read_text()
    finally:
        process.kill()
        process.wait()


class socket_of_free_port:
    """A port that was free a moment ago."""

    def __enter__(self) -> int:
        from service.api.server import take_port

        self.socket = take_port("127.0.0.1", 0)
        return int(self.socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.socket.close()
