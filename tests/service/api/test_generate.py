"""POST /generate: blocking, streaming and async are one path; what the answer says is true."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import httpx2
import pytest

from service.queue.job import Finish
from shared.catalog import ModelFolder
from shared.tokenizer import Tokenizer
from tests.service.api.events import Event, ids_of, open_stream, read_stream, text_of
from tests.service.api.stack import TEXT, Api, ScriptedWorker, client_of, wait_until
from tests.service.api.test_bad_input import assert_error

BODY = {"prompt": "First Citizen:", "max_new_tokens": 12, "seed": 7}
SSE = {"Accept": "text/event-stream"}


def test_the_blocking_answer_is_the_contract_s(
    client: httpx2.Client, folders: dict[str, ModelFolder], tokenizer: Tokenizer
) -> None:
    body = BODY | {"temperature": 0.5, "top_k": 3, "stop": "never there"}
    response = client.post("/generate", json=body)
    assert response.status_code == 200
    answer = response.json()
    assert response.headers["x-job-id"] == answer["id"] and re.fullmatch(r"[0-9a-f]{16,64}", answer["id"])
    expected_ids = (tokenizer.encode(TEXT) * 2)[:12]
    assert answer["token_ids"] == expected_ids
    assert answer["text"] == tokenizer.decode(expected_ids)
    assert answer["model"] == "tiny" and answer["revision"] == folders["tiny"].revision
    assert answer["status"] == "succeeded" and answer["finish_reason"] == "length"
    assert answer["stop_sequence"] is None and answer["warnings"] == [] and answer["seed"] == 7
    num_prompt = len(tokenizer.encode("First Citizen:"))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 12,
        "total_tokens": num_prompt + 12,
        "cached_tokens": 1,
    }
    assert set(answer["timings"]) >= {"queue_ms", "prefill_ms", "decode_ms", "ttft_ms", "tokens_per_second"}
    assert answer["timings"]["prefill_ms"] == 1.5
    assert all(answer["timings"][name] >= 0 for name in ("queue_ms", "decode_ms", "ttft_ms"))
    parameters = answer["parameters"]
    assert parameters["temperature"] == 0.5 and parameters["top_k"] == 3 and parameters["max_new_tokens"] == 12
    assert parameters["top_p"] == 0.95 and parameters["repetition_penalty"] == 1.0
    assert parameters["stop"] == ["never there"]


def test_the_worker_gets_what_the_client_asked(
    client: httpx2.Client, worker: ScriptedWorker, tokenizer: Tokenizer, folders: dict[str, ModelFolder]
) -> None:
    asked = {
        "temperature": 0,
        "top_k": 5,
        "top_p": 1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {"5": -1.5},
        "min_tokens": 1,
        "seed": 2**53,
    }
    client.post("/generate", json={"prompt": "All:", "max_new_tokens": 2, "stop": ["a", "\n"], "logprobs": 2} | asked)
    request = worker.taken[-1].request
    assert request.sampling == asked
    assert request.prompt_ids == tuple(tokenizer.encode("All:"))
    assert request.max_new_tokens == 2 and request.stop == ("a", "\n") and request.logprobs == 2
    assert request.model == "tiny" and request.options["tokenizer_sha256"] == folders["tiny"].tokenizer_sha256


def test_a_seed_is_drawn_and_told(client: httpx2.Client, worker: ScriptedWorker) -> None:
    seeds = [client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).json()["seed"] for _ in range(3)]
    assert len(set(seeds)) == 3
    assert [job.request.sampling["seed"] for job in worker.taken] == seeds
    assert all(0 <= seed <= 2**53 for seed in seeds), "JavaScript can send it back exactly"


def test_max_tokens_is_max_new_tokens(client: httpx2.Client) -> None:
    answer = client.post("/generate", json={"prompt": "a", "max_tokens": 3}).json()
    assert answer["usage"]["completion_tokens"] == 3


def test_a_length_beyond_the_context_is_lowered_and_told(client: httpx2.Client, tokenizer: Tokenizer) -> None:
    answer = client.post("/generate", json={"prompt": "First Citizen:", "max_new_tokens": 1_000}).json()
    room = 256 - len(tokenizer.encode("First Citizen:"))
    assert answer["usage"]["completion_tokens"] == room == answer["parameters"]["max_new_tokens"]
    assert any("1000" in warning.replace(",", "") and str(room) in warning for warning in answer["warnings"])


def test_positions_that_were_never_trained_are_told(client: httpx2.Client) -> None:
    """The tiny model was trained on 64 tokens; its context is 256."""
    assert client.post("/generate", json=BODY).json()["warnings"] == []
    warnings = client.post("/generate", json=BODY | {"max_new_tokens": 100}).json()["warnings"]
    assert len(warnings) == 1 and "64" in warnings[0]


def test_the_longest_prompt_leaves_room_for_one_token(client: httpx2.Client, tokenizer: Tokenizer) -> None:
    prompt = "1" * 255
    assert len(tokenizer.encode(prompt)) == 255
    answer = client.post("/generate", json={"prompt": prompt}).json()
    assert answer["usage"] == {
        "prompt_tokens": 255,
        "completion_tokens": 1,
        "total_tokens": 256,
        "cached_tokens": 1,
    }
    error = assert_error(client.post("/generate", json={"prompt": prompt + "1"}), 422, param="prompt")
    assert "256" in error["message"] and "255" in error["message"]


@pytest.mark.parametrize(("options", "change"), [({}, {"stream": True}), ({"headers": SSE}, {})])
def test_the_stream_is_the_blocking_answer_in_pieces(
    client: httpx2.Client, options: dict[str, Any], change: dict[str, Any]
) -> None:
    whole = client.post("/generate", json=BODY).json()
    with open_stream(client, "POST", "/generate", json=BODY | change, **options) as (response, stream):
        events = list(stream)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    assert "no-cache" in response.headers["cache-control"]
    names = [event.name for event in events]
    assert names[0] == "queued" and names[-1] == "done" and names.count("done") == 1
    assert set(names[1:-1]) <= {"queued", "token"}
    assert {"position", "eta_s"} <= set(events[0].data)
    done = events[-1].data
    assert response.headers["x-job-id"] == done["id"]
    assert text_of(events) == done["text"] == whole["text"]
    assert ids_of(events) == done["token_ids"] == whole["token_ids"]
    varies = {"id", "timings"}
    assert {k: v for k, v in done.items() if k not in varies} == {k: v for k, v in whole.items() if k not in varies}
    tokens = [event for event in events if event.name == "token"]
    assert set(tokens[0].data) == {"index", "text", "token_ids"}
    for event in tokens[:-1]:
        assert int(event.id) == event.data["index"] + len(event.data["token_ids"])


def test_a_stream_is_ascii_with_one_line_per_field(client: httpx2.Client) -> None:
    """U+2028 and the like end a line for some readers of streams."""
    with client.stream("POST", "/generate", json=BODY | {"max_new_tokens": 40, "stream": True}) as response:
        raw = response.read()
    assert raw.isascii() and raw.endswith(b"\n\n")
    for line in raw.decode().split("\n"):
        assert not line or line.partition(":")[0] in ("event", "data", "id", "")


def test_logprobs_are_told_where_asked(client: httpx2.Client, tokenizer: Tokenizer) -> None:
    answer = client.post("/generate", json=BODY | {"logprobs": 2}).json()
    assert len(answer["logprobs"]) == 12
    for token_id, entry in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert entry["token_id"] == token_id and entry["logprob"] == -1.0
        assert json.dumps(entry, allow_nan=False)
    assert client.post("/generate", json=BODY).json().get("logprobs") is None
    events = read_stream(client, "POST", "/generate", json=BODY | {"logprobs": 2, "stream": True})
    assert [entry for event in events if event.name == "token" for entry in event.data["logprobs"]] == answer[
        "logprobs"
    ]


def test_a_queued_stream_tells_its_place_and_pings(
    client: httpx2.Client, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.take_no_more()
    first = client.post("/generate", json=BODY, headers={"Prefer": "respond-async"}).json()
    with open_stream(client, "POST", "/generate", json=BODY | {"stream": True}) as (_, events):
        event = next(events)
        assert event.name == "queued" and event.data["position"] == 2
        client.delete(f"/jobs/{first['id']}")
        event = next(events)
        assert event.name == "queued" and event.data["position"] == 1
        worker.takes.set()
        assert [event.name for event in events][-1] == "done"


def test_async_answers_202_and_goes_on_by_itself(client: httpx2.Client, worker: ScriptedWorker) -> None:
    worker.take_no_more()
    response = client.post("/generate", json=BODY, headers={"Prefer": "respond-async"})
    assert response.status_code == 202
    answer = response.json()
    assert response.headers["location"] == f"/jobs/{answer['id']}"
    assert answer["status"] == "queued" and answer["text"] == "" and answer["finish_reason"] is None
    assert answer["position"] == 1
    assert client.get(response.headers["location"]).json()["status"] == "queued"
    worker.takes.set()
    job = wait_until(lambda: _ended(client, answer["id"]), "the job to end")
    assert job["status"] == "succeeded" and job["usage"]["completion_tokens"] == 12
    assert job["text"] == client.post("/generate", json=BODY).json()["text"]


def _ended(client: httpx2.Client, job_id: str) -> dict[str, Any] | None:
    job: dict[str, Any] = client.get(f"/jobs/{job_id}").json()
    return job if job["status"] not in ("queued", "running") else None


def test_a_running_job_shows_what_it_has(client: httpx2.Client, worker: ScriptedWorker) -> None:
    worker.ends.clear()
    job_id = client.post("/generate", json=BODY, headers={"Prefer": "respond-async"}).json()["id"]
    job = wait_until(
        lambda: (job := client.get(f"/jobs/{job_id}").json())["usage"]["completion_tokens"] == 12 and job, "tokens"
    )
    assert job["status"] == "running" and job["finish_reason"] is None and len(job["token_ids"]) == 12
    worker.ends.set()
    assert wait_until(lambda: _ended(client, job_id), "the end")["text"].startswith(job["text"])


@pytest.mark.parametrize("after", range(0, 13, 3))
@pytest.mark.parametrize("by_header", [True, False])
def test_replay_goes_on_behind_any_index(client: httpx2.Client, after: int, by_header: bool) -> None:
    whole = read_stream(client, "POST", "/generate", json=BODY | {"stream": True})
    job_id = whole[-1].data["id"]
    options: dict[str, Any] = {"headers": {"Last-Event-ID": str(after)}} if by_header else {"params": {"after": after}}
    events = read_stream(client, "GET", f"/jobs/{job_id}/events", **options)
    behind = [event for event in whole if event.name == "token" and int(event.id) > after]
    assert [(event.id, event.data) for event in events if event.name == "token"] == [
        (event.id, event.data) for event in behind
    ]
    assert events[-1].name == "done" and events[-1].data == whole[-1].data


def test_an_id_of_last_event_wins_over_the_address(client: httpx2.Client) -> None:
    """A browser reconnects to the same address with the header added."""
    job_id = client.post("/generate", json=BODY).json()["id"]
    events = read_stream(client, "GET", f"/jobs/{job_id}/events?after=0", headers={"Last-Event-ID": "12"})
    assert len(ids_of(events)) == 0 and events[-1].name == "done"


def test_a_stream_is_followed_on_another_api_process(client: httpx2.Client, worker: ScriptedWorker, api: Api) -> None:
    with Api_of_its_own(api) as other, client_of(other) as elsewhere:
        worker.ends.clear()
        with open_stream(client, "POST", "/generate", json=BODY | {"stream": True}) as (response, events):
            seen: list[Event] = []
            while len(seen) < 5:
                event = next(events)
                if event.name == "token":
                    seen.append(event)
            job_id = response.headers["x-job-id"]
            options = {"headers": {"Last-Event-ID": seen[-1].id}}
            with open_stream(elsewhere, "GET", f"/jobs/{job_id}/events", **options) as (_, others):
                worker.ends.set()
                rest = list(others)
        assert rest[-1].name == "done"
        assert "".join(event.data["text"] for event in seen) + text_of(rest) == rest[-1].data["text"]


class Api_of_its_own:
    """A second API process' worth on the same Redis."""

    def __init__(self, api: Api) -> None:
        self.settings = api.settings

    def __enter__(self) -> Api:
        self.api = Api(self.settings)
        return self.api

    def __exit__(self, *_: object) -> None:
        self.api.stop()


@pytest.mark.parametrize("running", [True, False])
def test_cancelling_is_idempotent(client: httpx2.Client, worker: ScriptedWorker, running: bool) -> None:
    worker.ends.clear()
    if not running:
        worker.take_no_more()
    job_id = client.post("/generate", json=BODY, headers={"Prefer": "respond-async"}).json()["id"]
    if running:
        wait_until(lambda: client.get(f"/jobs/{job_id}").json()["usage"]["completion_tokens"] == 12, "tokens")
    answers = [client.delete(f"/jobs/{job_id}") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    for answer in answers:
        assert answer.json()["status"] == "cancelled" and answer.json()["finish_reason"] == "cancelled"
    if running:
        wait_until(lambda: job_id in worker.dropped, "the worker to drop it")
        assert len(answers[0].json()["token_ids"]) == 12
    worker.ends.set()
    worker.takes.set()
    finished = client.post("/generate", json=BODY).json()
    assert client.delete(f"/jobs/{finished['id']}").json() == finished, "what ended stays as it ended"


@pytest.mark.parametrize("stream", [True, False])
def test_somebody_else_s_cancel_ends_the_answer(client: httpx2.Client, worker: ScriptedWorker, stream: bool) -> None:
    worker.ends.clear()

    def cancel() -> None:
        wait_until(lambda: worker.taken, "the job")
        client.delete(f"/jobs/{worker.taken[0].id}")

    thread = threading.Thread(target=cancel)
    thread.start()
    if stream:
        event = read_stream(client, "POST", "/generate", json=BODY | {"stream": True})[-1]
        assert event.name == "done"
        answer = event.data
    else:
        answer = client.post("/generate", json=BODY).json()
    thread.join()
    assert answer["status"] == "cancelled" and answer["finish_reason"] == "cancelled"


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_job(
    client: httpx2.Client, worker: ScriptedWorker, api: Api, stream: bool, taken: bool
) -> None:
    worker.ends.clear()
    if not taken:
        worker.take_no_more()
    marker = client.post("/generate", json=BODY, headers={"Prefer": "respond-async"}).json()["id"]
    leaving = threading.Event()
    job_ids: list[str] = []

    def leave() -> None:
        if stream:
            with (
                client_of(api) as guest,
                open_stream(guest, "POST", "/generate", json=BODY | {"stream": True}) as (
                    response,
                    events,
                ),
            ):
                job_ids.append(response.headers["x-job-id"])
                next(events)
                leaving.wait(5)
        else:
            with client_of(api) as guest, pytest.raises(httpx2.ReadTimeout):
                guest.post("/generate", json=BODY, timeout=0.3)

    thread = threading.Thread(target=leave)
    thread.start()
    if stream:
        wait_until(lambda: job_ids, "the stream")
    if taken:
        wait_until(lambda: len(worker.taken) == 2, "the worker to take both")
    left_at = time.monotonic()
    leaving.set()
    thread.join()
    if taken:
        job_id = worker.taken[1].id
        wait_until(lambda: job_id in worker.dropped, "the worker to drop it", 2.0)
        assert client.get(f"/jobs/{job_id}").json()["status"] == "cancelled"
    else:
        wait_until(lambda: client.get("/metrics").text.count('queue_queued_jobs{model="tiny"} 1.0') == 1, "one left")
    assert time.monotonic() - left_at < 2.0
    assert client.get(f"/jobs/{marker}").json()["status"] in ("queued", "running"), "an async job runs on"
    client.delete(f"/jobs/{marker}")


def test_the_same_idempotency_key_and_body_meet_the_same_job(client: httpx2.Client, worker: ScriptedWorker) -> None:
    body = {"prompt": "a", "max_new_tokens": 5}  # no seed: a second job would draw another
    headers = {"Idempotency-Key": "order-17"}
    first = client.post("/generate", json=body, headers=headers).json()
    second = client.post("/generate", json=dict(reversed(body.items())), headers=headers).json()
    assert second == first
    events = read_stream(client, "POST", "/generate", json=body, headers=headers | SSE)
    assert events[-1].data == first and text_of(events) == first["text"]
    assert len(worker.taken) == 1
    conflict = client.post("/generate", json=body | {"max_new_tokens": 6}, headers=headers)
    assert_error(conflict, 409, code="idempotency_conflict", type="conflict_error")
    assert conflict.headers["x-should-retry"] == "false"
    other = client.post("/generate", json=body, headers={"Idempotency-Key": "order-18"}).json()
    assert other["id"] != first["id"]


def test_a_lost_connection_can_be_taken_up_again_with_the_key(
    client: httpx2.Client, worker: ScriptedWorker, api: Api
) -> None:
    worker.ends.clear()
    headers = {"Idempotency-Key": "lost"}
    with client_of(api) as guest, pytest.raises(httpx2.ReadTimeout):
        guest.post("/generate", json=BODY, headers=headers, timeout=0.3)
    wait_until(lambda: worker.taken, "the job")
    worker.ends.set()
    answer = client.post("/generate", json=BODY, headers=headers).json()
    assert answer["status"] == "succeeded" and len(worker.taken) == 1


def test_a_deadline_ends_the_job_with_what_it_has(client: httpx2.Client, worker: ScriptedWorker) -> None:
    worker.ends.clear()
    answer = client.post("/generate", json=BODY | {"timeout_s": 0.3}).json()
    assert answer["status"] == "expired" and answer["finish_reason"] == "deadline"
    assert len(answer["token_ids"]) == 12
    worker.take_no_more()
    events = read_stream(client, "POST", "/generate", json=BODY | {"timeout_s": 0.2, "stream": True})
    assert events[-1].name == "done" and events[-1].data["finish_reason"] == "deadline"


def test_a_job_that_fails_is_an_error(client: httpx2.Client, worker: ScriptedWorker) -> None:
    worker.finish = Finish(reason="error", error="The weights hold no numbers; export them again.")
    response = client.post("/generate", json=BODY)
    error = assert_error(response, 500, type="server_error")
    assert error["message"] == "The weights hold no numbers; export them again."
    assert response.headers["x-should-retry"] == "false"
    events = read_stream(client, "POST", "/generate", json=BODY | {"stream": True})
    assert events[-1].name == "error" and events[-1].data == {"error": error}
    assert [event.name for event in events].count("token") == 3
    job = client.get(f"/jobs/{worker.taken[-1].id}").json()
    assert job["status"] == "failed" and job["finish_reason"] == "error" and job["error"] == error


def test_a_stop_sequence_is_told(client: httpx2.Client, worker: ScriptedWorker) -> None:
    worker.finish = Finish(reason="stop", stop_sequence="hear")
    answer = client.post("/generate", json=BODY | {"stop": ["x", "hear"]}).json()
    assert answer["finish_reason"] == "stop" and answer["stop_sequence"] == "hear" and answer["status"] == "succeeded"


def test_many_clients_at_once_get_each_their_own(client: httpx2.Client, api: Api) -> None:
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        with client_of(api) as guest:
            body = BODY | {"max_new_tokens": number + 1, "stream": number % 2 == 0}
            if number % 2 == 0:
                answers[number] = read_stream(guest, "POST", "/generate", json=body)[-1].data
            else:
                answers[number] = guest.post("/generate", json=body).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: len(answer["token_ids"]) for number, answer in answers.items()} == {n: n + 1 for n in range(24)}


def test_the_request_id_of_the_client_comes_back(client: httpx2.Client, worker: ScriptedWorker) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"x-request-id": "my-id-1", "traceparent": trace}
    assert client.post("/generate", json=BODY, headers=headers).headers["x-request-id"] == "my-id-1"
    assert worker.taken[-1].trace == trace
    first, second = (client.get("/live").headers["x-request-id"] for _ in range(2))
    assert first != second
