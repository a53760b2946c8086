"""The client against the real API process: streams, ends, and errors as sentences."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import anyio
import pytest

from frontend.client import ApiAway, ApiClient, ApiError, Done, Event, Piece, Queued, Started
from tests.frontend.stack import Stack
from tests.processes import PATIENCE_S

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"prompt": "First Citizen:", "model": "tiny", "max_new_tokens": 24, "seed": 7}


@asynccontextmanager
async def connect(url: str, **options: Any) -> AsyncIterator[ApiClient]:
    client = ApiClient(url, **options)
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[ApiClient]:
    async with connect(stack.api_url) as client:
        yield client


async def until_status(client: ApiClient, job_id: str, status: str) -> dict[str, Any]:
    with anyio.fail_after(PATIENCE_S):
        while (job := await client.job(job_id))["status"] != status:
            await anyio.sleep(0.02)
    return job


def job_id_of(event: Event) -> str:
    assert isinstance(event, Started)
    return event.job_id


async def test_a_completion_streams_and_ends_with_the_whole_answer(client: ApiClient) -> None:
    events = [event async for event in client.generate(BODY)]
    started, place, *pieces, done = events
    assert isinstance(started, Started) and isinstance(place, Queued) and isinstance(done, Done)
    texts = [piece for piece in pieces if isinstance(piece, Piece)]
    assert len(texts) > 1
    assert "".join(piece.text for piece in texts) == done.answer["text"]
    assert sum(piece.num_tokens or 0 for piece in texts) == done.answer["usage"]["completion_tokens"]
    assert done.answer["id"] == started.job_id
    assert done.answer["seed"] == 7


async def test_a_chat_streams_and_ends_with_the_job_behind_it(client: ApiClient) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Speak."}], "max_tokens": 16}
    started, *pieces, done = [event async for event in client.chat(body)]
    assert isinstance(done, Done) and done.answer["id"] == job_id_of(started)
    assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == done.answer["text"]
    assert {"seed", "timings", "revision"} <= done.answer.keys()


async def test_cancel_ends_a_running_job_and_its_stream(client: ApiClient) -> None:
    events = client.generate({**BODY, "model": "slow", "max_new_tokens": 2000})
    job_id, last = "", None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Started):
                job_id = event.job_id
            if isinstance(event, Piece) and not isinstance(last, Piece):
                await client.cancel(job_id)
            last = event
    assert isinstance(last, Done) and last.answer["finish_reason"] == "cancelled"
    await client.cancel(job_id)  # again: nothing happens


@pytest.mark.parametrize("route", ["generate", "chat"])
async def test_leaving_cancels_the_job(client: ApiClient, route: str) -> None:
    body = {"model": "slow", "seed": 1}
    if route == "generate":
        events = client.generate({**body, "prompt": "First", "max_new_tokens": 2000})
    else:
        messages = [{"role": "user", "content": "First"}]
        events = client.chat({**body, "messages": messages, "max_tokens": 2000})
    async with aclosing(events):
        job_id = job_id_of(await anext(events))
        async for event in events:
            if isinstance(event, Piece):
                break
    await until_status(client, job_id, "cancelled")


async def test_waiting_jobs_tell_their_place_and_a_full_queue_when_to_come_back(
    client: ApiClient, stack: Stack
) -> None:
    stack.worker.pause()
    try:
        async with AsyncExitStack() as waiting:
            for position in (1, 2):
                events = await waiting.enter_async_context(aclosing(client.generate(BODY)))
                job_id_of(await anext(events))
                place = await anext(events)
                assert isinstance(place, Queued) and place.position == position
            with pytest.raises(ApiError, match=r"(?s)^.*full.*; try again in [\d.]+ s\.$"):
                await anext(client.generate(BODY))
    finally:
        stack.worker.go_on()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": ""}, r"prompt"),
        ({"model": "nobody"}, r"no model 'nobody'.*tiny"),
        ({"temperature": -1}, r"temperature.*-1"),
        ({"seed": "abc"}, r"seed.*abc"),
        ({"prompt": "speak " * 2_000}, r"256"),
    ],
)
async def test_refusals_are_the_apis_own_sentences(client: ApiClient, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ApiError, match=rf"(?s)^[^{{}}]*{sentence}[^{{}}]*[.!?]$") as caught:
        await anext(client.generate({**BODY, **change}))
    assert "Traceback" not in str(caught.value)


async def test_an_api_that_is_away_is_one_sentence() -> None:
    with socket.socket() as silent:  # bound, not listening
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with connect(url) as client:
            for ask in (client.models(), client.runs(), client.cancel("1"), anext(client.generate(BODY))):
                with pytest.raises(ApiAway, match=re.escape(url) + r".*SMOLLM_API_URL\.$"):
                    await ask


async def test_something_else_at_that_address_is_one_sentence(stack: Stack) -> None:
    async with connect(f"{stack.page_url}/config?") as client:  # the page itself: JSON, but not the API's
        with pytest.raises(ApiError, match=r"SMOLLM_API_URL\.$"):
            await client.models()


async def test_an_api_that_ends_half_way_is_one_sentence(client: ApiClient, stack: Stack) -> None:
    events = client.generate({**BODY, "model": "slow", "max_new_tokens": 2000})
    async with aclosing(events):
        job_id = job_id_of(await anext(events))
        with pytest.raises(ApiAway, match=r"again"):
            async for event in events:
                if isinstance(event, Piece) and stack.api.popen.poll() is None:
                    stack.stop_api(kill=True)
    stack.restart_api()
    await client.cancel(job_id)


async def test_models_runs_and_health_are_plain_values(client: ApiClient) -> None:
    models = {model["id"]: model for model in await client.models()}
    assert models["tiny"]["is_default"] and models["slow"]["has_chat_template"]
    assert (await client.health())["status"] == "ok"
    with anyio.fail_after(PATIENCE_S):
        while not any(run["state"] == "finished" for run in await client.runs()):
            await anyio.sleep(0.1)
    rows, texts = await client.run_metrics("smoke"), await client.run_samples("smoke")
    assert {row["kind"] for row in rows} == {"run", "train", "evaluation"}
    assert texts and {"step", "prompt", "text"} <= texts[0].keys()


async def test_the_key_is_sent(stack: Stack) -> None:
    async with connect(stack.api_url, api_key="secret") as client:
        assert client.http.headers["authorization"] == "Bearer secret"
