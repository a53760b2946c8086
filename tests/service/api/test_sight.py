"""What can be seen of a job from outside, by real processes: one trace in both logs, spans, metrics, no words."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from service.api.server import take_port
from service.api_keys import hash_of
from service.queue.local_server import start_redis
from service.tracing import new_traceparent, read_traceparent
from tests.service.api.events import read_stream
from tests.service.api.stack import wait_until
from tests.service.worker_process import WorkerProcess
from tests.tiny import write_tiny_export

PATIENCE_S = 60.0
WORDS = "Xylophones whisper"
KEY = "sk-only-for-this-test"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


@dataclass
class Stack:
    """Both processes, writing JSON logs and spans."""

    api_log: Path
    worker: WorkerProcess
    api_url: str
    metrics_url: str
    spans: list[dict[str, Any]]
    """As the collector got them: name, service, trace, id, parent, attributes."""

    def client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx2.Client(base_url=self.api_url, headers=headers, trust_env=False, verify=False, timeout=PATIENCE_S)

    def logs(self) -> dict[str, list[dict[str, Any]]]:
        """Lines of both, each of which must be one JSON object."""
        texts = {"api": self.api_log.read_text(), "worker": self.worker.log}
        return {process: [json.loads(line) for line in text.splitlines()] for process, text in texts.items()}


def free_port() -> int:
    with take_port("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


def start_collector(spans: list[dict[str, Any]]) -> http.server.ThreadingHTTPServer:
    """An OTLP collector as small as can be."""

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in request.resource_spans:
                service = {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"]
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    ids = {"trace": span.trace_id.hex(), "id": span.span_id.hex(), "parent": span.parent_span_id.hex()}
                    attributes = {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
                    spans.append({"name": span.name, "service": service, **ids, "attributes": attributes})
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("sight")
    write_tiny_export(directory / "models", "tiny")
    spans: list[dict[str, Any]] = []
    collector = start_collector(spans)
    port, metrics_port = free_port(), free_port()
    with start_redis() as redis, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_address[1]}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        worker = WorkerProcess(
            redis.url,
            directory / "models",
            directory / "worker.log",
            log_format="json",
            worker_metrics_port=metrics_port,
        )
        api_log = directory / "api.log"
        environment = {
            **os.environ,
            "API_PORT": str(port),
            "SMOLLM_REDIS_URL": redis.url,
            "SMOLLM_MODELS_DIR": str(directory / "models"),
            "SMOLLM_RUNS_DIR": str(directory),
            "SMOLLM_LOG_FORMAT": "json",
            "SMOLLM_API_KEYS": KEY,
        }
        with api_log.open("w") as file:
            api = subprocess.Popen([sys.executable, "-m", "service", "api"], stderr=file, env=environment)
        url = f"http://127.0.0.1:{port}"
        stack = Stack(api_log, worker, url, f"http://127.0.0.1:{metrics_port}/metrics", spans)
        try:
            with stack.client() as client:

                def is_ready() -> bool:
                    try:
                        return client.get("/ready").status_code == 200
                    except httpx2.TransportError:
                        assert api.poll() is None, api_log.read_text()
                        return False

                wait_until(is_ready, "both processes", PATIENCE_S)
            yield stack
            api.terminate()
            assert api.wait(PATIENCE_S) == 0
        finally:
            api.kill()
            api.wait()
            worker.kill()
            collector.shutdown()
            collector.server_close()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_one_trace_goes_through_both_logs(stack: Stack) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "asked-7"}
    with stack.client() as client:
        answer = client.post("/generate", json={"prompt": WORDS, "max_new_tokens": 8}, headers=headers)
        assert answer.status_code == 200 and answer.headers["x-request-id"] == "asked-7"
        job_id = answer.json()["id"]

        def lines() -> dict[str, list[dict[str, Any]]] | None:
            found = {p: [one for one in lines if one.get("job") == job_id] for p, lines in stack.logs().items()}
            return found if len(found["api"]) >= 2 and found["worker"] else None

        found = wait_until(lines, "lines of both", PATIENCE_S)
        for process in ("api", "worker"):
            assert {line["trace"] for line in found[process]} == {TRACE_ID}
            assert {line["process"] for line in found[process]} == {process}
        assert "asked-7" in {line.get("request_id") for line in found["api"]}
        assert {line["key"] for line in found["api"]} == {hash_of(KEY)[:16]}

        def whole() -> dict[str, dict[str, Any]] | None:
            mine = {span["name"]: span for span in stack.spans if span["trace"] == TRACE_ID}
            return mine if len(mine) == 4 else None

        spans = wait_until(whole, "spans of both", PATIENCE_S)
        assert set(spans) == {"POST /generate", "queue", "prefill", "decode"}
        request = spans["POST /generate"]
        assert request["parent"] == PARENT_ID and request["service"] == "smollm-api"
        assert request["attributes"]["http.response.status_code"] == 200
        for name, service in (("queue", "smollm-api"), ("prefill", "smollm-worker"), ("decode", "smollm-worker")):
            assert spans[name]["parent"] == request["id"] and spans[name]["service"] == service
            assert spans[name]["attributes"]["job.id"] == job_id


def test_a_request_without_a_trace_gets_one(stack: Stack) -> None:
    with stack.client() as client:
        job_id = read_stream(client, "POST", "/generate", json={"prompt": WORDS, "stream": True})[-1].data["id"]

        def traces() -> set[str] | None:
            logs = stack.logs()
            found = [{one["trace"] for one in logs[process] if one.get("job") == job_id} for process in logs]
            return found[0] if all(found) and found[0] == found[1] else None

        (trace_id,) = wait_until(traces, "one trace in both logs", PATIENCE_S)
        assert len(trace_id) == 32


def test_metrics_of_both_processes_tell_of_every_phase(stack: Stack) -> None:
    with stack.client() as client:
        for stream in (True, False):
            body = {"prompt": WORDS, "max_new_tokens": 12, "seed": 3, "stream": stream}
            assert client.post("/generate", json=body).status_code == 200
        client.post("/generate", json={"prompt": WORDS, "temperature": -1})
        api = samples(client.get("/metrics").text)
        worker = samples(httpx2.get(stack.metrics_url, trust_env=False, verify=False).text)
    key = ("key", hash_of(KEY)[:16])
    model = ("model", "tiny")
    for phase in ("queue", "prefill", "first_token", "between_tokens", "job"):
        assert api[f"api_{phase}_seconds_count", (model,)] >= 2, phase
        assert (f"api_{phase}_seconds_bucket", (("le", "0.00025"), model)) in api
    assert api["api_admission_seconds_count", ()] >= 2
    assert api["api_key_jobs_total", (key, ("state", "succeeded"))] >= 2
    assert api["api_key_prompt_tokens_total", (key,)] > 0 and api["api_key_completion_tokens_total", (key,)] > 0
    assert api["api_key_refusals_total", (("code", "invalid_value"), key)] >= 1
    assert api["queue_slots", ()] == api["queue_free_slots", ()] > 0
    assert api["queue_max_cached_tokens", ()] > 0
    for phase in ("first_token", "between_tokens", "job", "step"):
        assert worker[f"worker_{phase}_seconds_count", (model,)] >= 2, phase
    assert worker["worker_free_slots", (model,)] > 0
    text = json.dumps([[str(name) for name in group] for group in (api, worker)])
    assert KEY not in text and WORDS not in text


def test_neither_log_holds_words_or_keys(stack: Stack) -> None:
    chat = [{"role": "user", "content": WORDS}]
    with stack.client() as client:
        texts = [client.post("/generate", json={"prompt": WORDS, "stop": [WORDS]}).json()["text"]]
        client.post("/v1/chat/completions", json={"messages": chat, "max_tokens": 5})
        client.post("/v1/completions", json={"prompt": WORDS, "max_tokens": 5, "stream": True, "user": WORDS})
        client.post("/tokenize", json={"text": WORDS})
        client.post("/generate", json={"prompt": WORDS * 500})
        client.post("/generate", json={"prompt": WORDS, WORDS: 1})
        client.post("/generate", json={"prompt": WORDS, "temperature": WORDS})
        client.post("/generate", content=f'{{"prompt": "{WORDS}')
        client.get(f"/{WORDS}", params={"q": WORDS})
        client.get("/v1/models", headers={"Authorization": f"Bearer {WORDS}"})
    log = stack.api_log.read_text() + stack.worker.log
    assert log.count('"level": "INFO"') > 10
    for secret in (WORDS, WORDS[:10], KEY, hash_of(KEY), *[text for text in texts if len(text) > 4]):
        assert secret not in log and json.dumps(secret)[1:-1] not in log


@pytest.mark.parametrize(
    ("header", "is_one"),
    [
        (new_traceparent(), True),
        (f"00-{TRACE_ID}-{PARENT_ID}-01", True),
        (f"ff-{TRACE_ID}-{PARENT_ID}-01", False),
        (f"00-{'0' * 32}-{PARENT_ID}-01", False),
        (f"00-{TRACE_ID}-{'0' * 16}-01", False),
        (f"00-{TRACE_ID.upper()}-{PARENT_ID}-01", False),
        (f"00-{TRACE_ID}-{PARENT_ID}-01-x", False),
        ("", False),
    ],
)
def test_what_is_no_trace_is_passed_over(header: str, is_one: bool) -> None:
    assert (read_traceparent(header) == header) is is_one
