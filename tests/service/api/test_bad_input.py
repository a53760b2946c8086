"""What clients send by mistake or malice: one shape of error, never a 5xx, and the worker still serves afterwards."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

GOOD = {"prompt": "First Citizen:", "max_new_tokens": 4}


def assert_error(response: httpx2.Response, status: int, **expected: Any) -> dict[str, Any]:
    """The one shape: exactly four members, a sentence for people, bounded."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and 10 < len(error["message"]) <= 600
    assert isinstance(error["type"], str) and isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert response.headers["x-request-id"]
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    for name, value in expected.items():
        assert error[name] == value, error
    return error


MALFORMED = [
    b"",
    b" ",
    b"not json",
    b'{"prompt": "a"',
    b'{"prompt": "a"} x',
    b"[1, 2]",
    b'"text"',
    b"null",
    b"12",
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b"\x00\x01\x02",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": "a", "max_new_tokens": ' + b"9" * 5_000 + b"}",
    b"prompt=First Citizen&max_new_tokens=4",
]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_body_that_is_no_json_object_is_400(client: httpx2.Client, path: str) -> None:
    for body in MALFORMED:
        assert_error(client.post(path, content=body), 400, type="invalid_request_error")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"model": 3}, "model"),
        ({"max_new_tokens": "4"}, "max_new_tokens"),
        ({"max_new_tokens": 4.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 10**30}, "max_new_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.01}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ""}, "stop.0"),
        ({"stop": [1]}, "stop.0"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 10_000]}, "stop.0"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": -5}, "timeout_s"),
        ({"timeout_s": 1e9}, "timeout_s"),
        ({"timeout_s": "5"}, "timeout_s"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_value_that_cannot_be_served_is_422_with_its_field(
    client: httpx2.Client, change: dict[str, Any], param: str
) -> None:
    error = assert_error(client.post("/generate", json=GOOD | change), 422, type="invalid_request_error", param=param)
    assert param.partition(".")[0] in error["message"]


def test_a_timeout_too_long_is_told_the_limit_at_once(client: httpx2.Client) -> None:
    error = assert_error(client.post("/generate", json=GOOD | {"timeout_s": 1e6}), 422, param="timeout_s")
    assert "at most 3600" in error["message"]


@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "timeout_s", "max_new_tokens", "seed"])
def test_numbers_that_are_none_are_refused(client: httpx2.Client, field: str) -> None:
    for literal in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
        response = client.post("/generate", content=f'{{"prompt": "a", "{field}": {literal}}}')
        assert_error(response, 422, param=field)


@pytest.mark.parametrize(
    ("field", "nearest"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("Prompt", "prompt"), ("topp", "top_p")],
)
def test_an_unknown_field_names_the_nearest_known_one(client: httpx2.Client, field: str, nearest: str) -> None:
    error = assert_error(client.post("/generate", json=GOOD | {field: 1}), 422, param=field, code="unknown_field")
    assert nearest in error["message"]


def test_an_unknown_field_like_no_other_lists_the_known_ones(client: httpx2.Client) -> None:
    error = assert_error(client.post("/generate", json=GOOD | {"zzzzqqqq": 1}), 422, param="zzzzqqqq")
    assert "prompt" in error["message"] and "temperature" in error["message"]


def test_a_missing_prompt_is_named(client: httpx2.Client) -> None:
    assert_error(client.post("/generate", json={"max_new_tokens": 3}), 422, param="prompt", code="missing_field")


def test_both_names_of_the_length_at_once_are_refused(client: httpx2.Client) -> None:
    assert_error(client.post("/generate", json=GOOD | {"max_tokens": 5}), 422)


def test_a_prompt_too_long_names_limit_and_actual(client: httpx2.Client) -> None:
    prompt = "hear " * 300
    actual = client.post("/tokenize", json={"text": prompt}).json()["count"]
    error = assert_error(client.post("/generate", json={"prompt": prompt}), 422, param="prompt")
    assert str(actual) in error["message"].replace(",", "")
    assert "255" in error["message"] or "256" in error["message"]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/tokenize"])
def test_lone_surrogates_are_refused(client: httpx2.Client, path: str) -> None:
    field = "text" if path == "/tokenize" else "prompt"
    for text in ("\\ud800", "ok \\udfff ok", "\\ud83d x", "\\uDC00\\uD800"):
        assert_error(client.post(path, content=f'{{"{field}": "{text}"}}'), 422, param=field, code="lone_surrogate")


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "a", "stop": ["\\ud800"]}',
        '{"prompt": "a", "model": "\\ud800"}',
        '{"prompt": "a", "\\ud800": 1}',
        '{"prompt": "a", "priority": "\\udfff"}',
    ],
)
def test_lone_surrogates_elsewhere_are_refused_too(client: httpx2.Client, body: str) -> None:
    error = assert_error(client.post("/generate", content=body), 422, code="lone_surrogate")
    assert "lone surrogate U+D" in error["message"]


def test_a_surrogate_pair_is_a_character(client: httpx2.Client) -> None:
    answer = client.post("/tokenize", content='{"text": "\\ud83d\\ude42"}').json()
    assert client.post("/detokenize", json={"token_ids": answer["token_ids"]}).json()["text"] == "🙂"


@pytest.mark.parametrize(
    "text", ["\u0000", "a\u0000b\u0000", "\u0001\u001f\u007f\u0085\u2028\u2029\ufeff", "\r\n\t\b\f"]
)
def test_nul_and_control_characters_round_trip(client: httpx2.Client, text: str) -> None:
    token_ids = client.post("/tokenize", json={"text": text}).json()["token_ids"]
    assert client.post("/detokenize", json={"token_ids": token_ids}).json()["text"] == text
    assert client.post("/generate", json=GOOD | {"prompt": text}).json()["status"] == "succeeded"
    echoed = client.post("/v1/completions", json={"prompt": text, "echo": True, "max_tokens": 1}).json()
    assert echoed["choices"][0]["text"].startswith(text)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_body_too_large_is_413(client: httpx2.Client, path: str) -> None:
    body = json.dumps({"prompt": "a" * 2_000_000}).encode()
    error = assert_error(client.post(path, content=body), 413, code="body_too_large")
    assert "1,000,000" in error["message"] or "1000000" in error["message"]

    def parts() -> Any:  # no Content-Length: it must be counted
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    assert_error(client.post(path, content=parts()), 413, code="body_too_large")
    assert client.post("/generate", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", GOOD),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"text": "a"}),
        ("/detokenize", {"token_ids": [1]}),
    ],
)
def test_an_unknown_model_is_404(client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    for name in ("tinny", "../tiny", "a" * 5_000, "\u0000", "tiny/"):
        response = client.post(path, json=body | {"model": name})
        assert response.status_code in (404, 422)
        error = assert_error(response, response.status_code, param="model")
    response = client.post(path, json=body | {"model": "tinny"})
    error = assert_error(response, 404, param="model", code="model_not_found", type="not_found_error")
    assert "tinny" in error["message"] and "plain" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/", 405),
        ("GET", "/no/such/route", 404),
        ("GET", "/" + "x" * 3_000, 404),
        ("POST", "/generate/", 404),
        ("GET", "/generate", 405),
        ("PUT", "/generate", 405),
        ("POST", "/v1/models", 405),
        ("PATCH", "/jobs/0123456789abcdef01234567", 405),
        ("GET", "/jobs/0123456789abcdef01234567", 404),
        ("DELETE", "/jobs/0123456789abcdef01234567", 404),
        ("GET", "/jobs/0123456789abcdef01234567/events", 404),
        ("GET", "/jobs/%00%ff%2e%2e", 404),
        ("GET", "/jobs/" + "a" * 2_000, 404),
        ("GET", "/jobs/{smollm}:job:x/events", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/runs/none/metrics", 404),
        ("GET", "/runs/none/samples", 404),
    ],
    ids=lambda value: str(value)[:50],
)
def test_routes_that_are_not_there(client: httpx2.Client, method: str, path: str, status: int) -> None:
    assert_error(client.request(method, path), status)


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 30, "", "0x10", "\u00bd"])
def test_a_cursor_that_is_no_index_is_refused(client: httpx2.Client, after: str) -> None:
    job_id = client.post("/generate", json=GOOD).json()["id"]
    for options in ({"params": {"after": after}}, {"headers": {"Last-Event-ID": after.encode()}}):
        response = client.get(f"/jobs/{job_id}/events", **options)
        if after == "":
            assert response.status_code in (200, 422)  # an EventSource sends an empty id when it has none
            continue
        assert_error(response, 422)


@pytest.mark.parametrize(
    "headers",
    [
        {"Idempotency-Key": "a" * 2_000},
        {"Idempotency-Key": b"\xff\x00"[:1]},
        {"Prefer": "respond-async, wait=, ;;,"},
        {"Accept": "text/event-stream;q=zzz, */*"},
        {"traceparent": "not a trace"},
        {"traceparent": "00-" + "f" * 5_000},
        {"x-request-id": "\u00e9".encode("latin-1")},
        {"x-request-id": "a" * 5_000},
        {"Content-Type": "application/xml"},
        {"Content-Type": "\u00e9".encode("latin-1")},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Authorization": b"\xff\xff"},
        {"Last-Event-ID": "x"},
        {"Cookie": "a" * 5_000},
    ],
    ids=lambda headers: str(headers)[:50],
)
def test_strange_headers_are_no_failure(client: httpx2.Client, headers: dict[str, Any]) -> None:
    response = client.post("/generate", json=GOOD, headers=headers)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert_error(response, response.status_code)
    assert len(response.headers["x-request-id"]) <= 200


def test_errors_do_not_echo_more_than_a_sentence(client: httpx2.Client) -> None:
    long = "x" * 500_000
    for body in (
        {"prompt": "a", long: 1},
        {"prompt": "a", "temperature": long},
        {"prompt": "a", "model": long},
        {"prompt": "a", "stop": [long]},
        {"prompt": "a", "seed": [long] * 1},
    ):
        response = client.post("/generate", json=body)
        assert response.status_code in (404, 422)
        assert len(response.content) < 2_000


NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, 5e-324, "", " ", "a", "\u0000"),
    *("🙂" * 50, "null", "../..", "{{7*7}}", "%s%n", "<|im_end|>", "a" * 5_000, [], [[]], [None], [""], ["a", 1]),
    *({}, {"a": {}}, {"$ref": "#"}, [{}], {"__class__": 1}),
]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_no_value_of_any_field_gives_a_5xx(client: httpx2.Client, path: str) -> None:
    description = client.get("/openapi.json").json()
    reference = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = description["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
    bodies: dict[str, dict[str, Any]] = {
        "/generate": GOOD,
        "/v1/completions": {"prompt": "a", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/tokenize": {"text": "a"},
        "/detokenize": {"token_ids": [1]},
    }
    good = bodies[path]
    for field in [*fields, "unknown"]:
        for value in NASTY:
            if field in ("max_new_tokens", "max_tokens", "timeout_s", "n", "best_of") and value in (1, True, 1.5):
                continue  # valid; jobs would only cost time
            response = client.post(path, json=good | {field: value})
            assert response.status_code < 500, (field, value, response.text)
            if response.status_code >= 400:
                assert_error(response, response.status_code)


def test_a_page_of_another_origin_cannot_post_forms_here(client: httpx2.Client) -> None:
    body = json.dumps(GOOD)
    as_form = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    assert_error(client.post("/generate", content=body, headers=as_form), 400)
    assert client.post("/generate", content=body).status_code == 200, "curl -d needs no header"
