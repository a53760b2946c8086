"""Keys, what each is entitled to, bounds below the app, CORS, and what must not be told."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

import service.api.boundary
import service.api.wire
from service.api.server import is_loopback
from service.api.wire import MAX_HEADER_BYTES
from service.api_keys import KeyRing, find_key, hash_of, parse_list, read_file
from service.queue.worker_queue import WorkerQueue
from shared.errors import ConfigError
from tests.service.api.stack import Api, ScriptedWorker, client_of, make_settings, running_api, wait_until
from tests.service.api.test_bad_input import assert_error

BODY = {"prompt": "First Citizen:", "max_new_tokens": 4}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys(redis_url: str, models_dir: Path, runs_dir: Path, worker: ScriptedWorker) -> None:
    keys = ("first-secret", "second-secret")
    listed = f"first-secret, sha256:{hash_of('second-secret').upper()},"
    settings = make_settings(redis_url, models_dir, runs_dir, api_keys=listed)
    assert "secret" not in repr(settings) and "secret" not in str(settings.model_dump()), "hashed at once"
    with running_api(settings) as api, client_of(api) as client:
        for headers in (
            {},
            bearer("wrong"),
            bearer(hash_of("second-secret")),  # who reads the settings cannot ask
            {"Authorization": "first-secret"},
            {"Authorization": "Bearer"},
        ):
            for method, path in (("POST", "/generate"), ("GET", "/v1/models"), ("GET", "/runs"), ("GET", "/jobs/x")):
                response = client.request(method, path, headers=headers, json=BODY if method == "POST" else None)
                assert_error(response, 401, type="authentication_error", code="invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
                assert "secret" not in response.text
        for path in ("/live", "/ready", "/health", "/metrics", "/docs"):
            assert client.get(path).status_code == 200, path
        for key in keys:
            assert client.post("/generate", json=BODY, headers=bearer(key)).status_code == 200
        assert_error(client.post("/generate", content=b"not json"), 401)
        queue: WorkerQueue = worker.queue
        for job in worker.taken:
            fields = queue._client.hgetall("{smollm}:job:" + job.id)
            assert "secret" not in str(fields), "only a hash of a key is kept"
            assert fields["key"] in {hash_of(key)[:16] for key in keys}


def test_a_job_is_its_own_key_s(redis_url: str, models_dir: Path, runs_dir: Path, worker: ScriptedWorker) -> None:
    settings = make_settings(redis_url, models_dir, runs_dir, api_keys="one,two")
    with running_api(settings) as api, client_of(api) as client:
        job_id = client.post("/generate", json=BODY, headers=bearer("one")).json()["id"]
        for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            response = client.request(method, f"/jobs/{job_id}{path}", headers=bearer("two"))
            assert_error(response, 404, code="job_not_found")
            assert client.request(method, f"/jobs/{job_id}{path}", headers=bearer("one")).status_code == 200


def test_a_keys_file_says_what_each_may(
    redis_url: str, models_dir: Path, runs_dir: Path, worker: ScriptedWorker, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    page = f'[[key]]\nname = "page"\nsha256 = "sha256:{hash_of("page-key")}"\nweight = 4\n'
    path.write_text(page + f'[[key]]\nsha256 = "{hash_of("night-key")}"\nmax_priority = "batch"\n')
    settings = make_settings(redis_url, models_dir, runs_dir, api_keys_file=path)
    with running_api(settings) as api, client_of(api) as client:
        assert client.post("/generate", json=BODY | {"priority": "high"}, headers=bearer("page-key")).status_code == 200
        for priority in ("high", "normal"):
            response = client.post("/generate", json=BODY | {"priority": priority}, headers=bearer("night-key"))
            error = assert_error(response, 422, param="priority")
            assert priority in error["message"] and "batch" in error["message"]
        batch = BODY | {"priority": "batch"}
        assert client.post("/generate", json=batch, headers=bearer("night-key")).status_code == 200
        path.write_text(page)  # taken away without a restart
        wait_until(
            lambda: client.post("/generate", json=batch, headers=bearer("night-key")).status_code == 401,
            "the key to be forgotten",
            60.0,
        )
        path.write_text("[[key]\n")
        assert client.post("/generate", json=BODY, headers=bearer("page-key")).status_code == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[key]\n", "cannot be read"),
        ("", "[[key]] tables"),
        ("x = 1", "[[key]] tables"),
        ('[[key]]\nsha256 = "abc"', "64 hexadecimal"),
        (f'[[key]]\nsha256 = "{"a" * 64}"\nwieght = 1', "wieght"),
        (f'[[key]]\nsha256 = "{"a" * 64}"\nweight = 0', "weight"),
        (f'[[key]]\nsha256 = "{"a" * 64}"\n[[key]]\nsha256 = "{"A" * 64}"', "twice"),
    ],
)
def test_a_keys_file_at_fault_is_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="SMOLLM_API_KEYS_FILE") as error:
        read_file(path)
    assert said in str(error.value) and "\n" not in str(error.value)
    answer = (
        subprocess.run(
            [sys.executable, "-m", "service", "api"],
            env={**os.environ, "SMOLLM_API_KEYS_FILE": str(path), "SMOLLM_REDIS_URL": "redis://127.0.0.1:1/0"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if text == "x = 1"
        else None
    )
    assert answer is None or (answer.returncode == 2 and "Traceback" not in answer.stderr), answer


def test_a_key_of_both_places_has_the_file_s_record(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[[key]]\nsha256 = "{hash_of("a")}"\nname = "filed"\nrequests_per_minute = 6\n')
    ring = KeyRing(parse_list("a,b"), path)
    assert {key.name for key in ring.keys} == {"filed", ""}
    found = find_key(ring.keys, "a")
    assert found is not None and found.requests_per_minute == 6 and found.id == hash_of("a")[:16]
    assert find_key(ring.keys, "c") is None
    asyncio.run(ring.refresh())
    assert len(ring.keys) == 2


def test_the_command_makes_a_key() -> None:
    command = [sys.executable, "-m", "service", "key"]
    lines = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    for words in lines:
        assert words[1].startswith("sk-") and words[3] == f"sha256:{hash_of(words[1])}"
        assert find_key(parse_list(words[3]), words[1]) is not None
    assert lines[0][1] != lines[1][1]


@pytest.mark.parametrize(
    ("host", "only_this_machine"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("api.example", False),
    ],
)
def test_hosts_that_others_reach_are_known(host: str, only_this_machine: bool) -> None:
    """There the API says loudly that no key is asked for."""
    assert is_loopback(host) is only_this_machine


@pytest.mark.parametrize("asked", [True, False])
def test_prompts_are_logged_only_if_asked(
    redis_url: str,
    models_dir: Path,
    runs_dir: Path,
    worker: ScriptedWorker,
    caplog: pytest.LogCaptureFixture,
    asked: bool,
) -> None:
    caplog.set_level("INFO")
    with (
        running_api(make_settings(redis_url, models_dir, runs_dir, log_prompts=asked)) as api,
        client_of(api) as client,
    ):
        answer = client.post("/generate", json=BODY).json()
    assert ("First Citizen:" in caplog.text) is asked and (repr(answer["text"]) in caplog.text) is asked
    assert f"job {answer['id']} succeeded: 4 tokens" in caplog.text


def test_pages_of_others_may_not_read_answers_unless_set(
    redis_url: str, models_dir: Path, runs_dir: Path, worker: ScriptedWorker, api: Api
) -> None:
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type"
    with client_of(api) as client:
        preflight = client.options("/generate", headers=asks)
        answer = client.post("/generate", json=BODY, headers={"Origin": "https://a.example"})
        for response in (preflight, answer):
            assert not [name for name in response.headers if name.startswith("access-control")]
        assert_error(preflight, 405)
    settings = make_settings(redis_url, models_dir, runs_dir, cors_origins="https://a.example")
    with running_api(settings) as own, client_of(own) as client:
        preflight = client.options("/generate", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        answer = client.post("/generate", json=BODY, headers={"Origin": "https://a.example"})
        assert answer.status_code == 200 and "x-job-id" in answer.headers["access-control-expose-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers
        other = client.post("/generate", json=BODY, headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def talk(api: Api, *parts: bytes) -> tuple[int, dict[str, Any]]:
    """Send bytes as they are; return status and body of the answer, after which the server must hang up."""
    address = urlsplit(api.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=60) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except ConnectionError:  # refused before all was sent, which is the point
            pass
        answer = b""
        try:
            while part := connection.recv(65_536):
                answer += part
        except ConnectionResetError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


REQUEST = b"POST /generate HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"


def test_headers_without_end_are_refused(api: Api) -> None:
    lines = [b"x-%d: %s\r\n" % (number, b"a" * 1_000) for number in range(MAX_HEADER_BYTES // 500)]
    for parts in ((REQUEST, *lines), (REQUEST, b"x: " + b"a" * (2 * MAX_HEADER_BYTES))):
        status, body = talk(api, *parts)
        assert status == 431 and body["error"]["code"] == "headers_too_large"


def test_headers_just_too_long_are_refused_by_the_app(client: httpx2.Client) -> None:
    response = client.post("/generate", json=BODY, headers={"x": "a" * MAX_HEADER_BYTES})
    assert_error(response, 431, code="headers_too_large") if response.headers.get("x-request-id") else None
    assert response.status_code == 431
    assert client.post("/generate", json=BODY, headers={"x": "a" * (MAX_HEADER_BYTES // 2)}).status_code == 200


@pytest.mark.parametrize("bytes_sent", [b"hello\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_has_the_one_shape_too(api: Api, bytes_sent: bytes) -> None:
    status, body = talk(api, bytes_sent)
    assert status == 400 and set(body["error"]) == {"message", "type", "param", "code"}


def test_slow_headers_and_slow_bodies_are_hung_up_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.api.wire, "HEADER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(service.api.boundary, "BODY_TIMEOUT_S", 0.2)
    for parts in ((), (b"POST /gen",), (REQUEST,), (REQUEST, b"content-length: 50\r\n\r\n", b'{"prompt":')):
        status, body = talk(api, *parts)
        assert status == 408 and body["error"]["code"] == "request_timeout", parts
