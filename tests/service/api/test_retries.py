"""A full queue as the `openai` package meets it, unmodified: it waits as long as it is told, and then succeeds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.service.api.stack import Api, ScriptedWorker, client_of, make_settings, running_api, wait_until

QUESTION: Any = [{"role": "user", "content": "Who speaks?"}]
IN_LINE: Any = {"json": {"prompt": "a"}, "headers": {"Prefer": "respond-async"}}


@pytest.fixture
def narrow(redis_url: str, models_dir: Path, runs_dir: Path, worker: ScriptedWorker) -> Iterator[Api]:
    """A service whose queue takes one job; its speed was measured, so that it asks for short waits."""
    with running_api(make_settings(redis_url, models_dir, runs_dir, max_queued_jobs=1)) as api:
        with client_of(api) as client:
            for _ in range(3):
                assert client.post("/generate", json={"prompt": "a", "max_new_tokens": 4}).status_code == 200
        yield api


def fill(client: httpx2.Client, worker: ScriptedWorker) -> None:
    worker.take_no_more()
    wait_until(lambda: client.post("/generate", **IN_LINE).status_code == 429, "a full queue", 60.0)


class Seen:
    """Every answer, with when it came, as its connection saw it; makes room in the queue after the first refusal."""

    def __init__(self, worker: ScriptedWorker) -> None:
        self.worker = worker
        self.answers: list[tuple[float, int, float]] = []
        self.asked: list[float] = []

    def note_request(self, _: Any) -> None:
        self.asked.append(time.monotonic())

    def note(self, response: Any) -> None:
        wait_s = float(response.headers.get("retry-after-ms", 0)) / 1000
        self.answers.append((time.monotonic(), response.status_code, wait_s))
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= wait_s
            self.worker.takes.set()

    def check(self) -> None:
        """Refused, then served, and never asked again before it was time."""
        codes = [code for _, code, _ in self.answers]
        assert codes[0] == 429 and codes[-1] == 200 and set(codes) == {429, 200}
        for (came, _, wait_s), asked in zip(self.answers, self.asked[1:], strict=False):
            assert asked - came >= wait_s > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_client_comes_back_when_it_is_told(narrow: Api, worker: ScriptedWorker, stream: bool) -> None:
    seen = Seen(worker)
    hooks: Any = {"request": [seen.note_request], "response": [seen.note]}
    http_client = openai.DefaultHttpxClient(event_hooks=hooks, trust_env=False)
    with (
        client_of(narrow) as client,
        openai.OpenAI(
            base_url=f"{narrow.url}/v1", api_key="none", max_retries=10, timeout=60, http_client=http_client
        ) as sdk,
    ):
        fill(client, worker)
        answer: Any = sdk.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=4, stream=stream)
        text = (
            "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            if stream
            else answer.choices[0].message.content
        )
        assert text
    seen.check()


@pytest.mark.anyio
async def test_the_asynchronous_client_too(narrow: Api, worker: ScriptedWorker) -> None:
    seen = Seen(worker)

    async def note_request(request: Any) -> None:
        seen.note_request(request)

    async def note(response: Any) -> None:
        seen.note(response)

    hooks: Any = {"request": [note_request], "response": [note]}
    http_client = openai.DefaultAsyncHttpxClient(event_hooks=hooks, trust_env=False)
    with client_of(narrow) as client:
        fill(client, worker)
    async with openai.AsyncOpenAI(
        base_url=f"{narrow.url}/v1", api_key="none", max_retries=10, timeout=60, http_client=http_client
    ) as sdk:
        answer = await sdk.completions.create(model="tiny", prompt="a", max_tokens=4)
        assert answer.choices[0].text
    seen.check()


def test_without_retries_it_is_the_package_s_rate_limit_error(narrow: Api, worker: ScriptedWorker) -> None:
    with (
        client_of(narrow) as client,
        openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        fill(client, worker)
        for stream, prompt in ((False, "a"), (True, "b")):  # the same prompt would have come back in its turn
            with pytest.raises(openai.RateLimitError) as refused:
                sdk.completions.create(model="tiny", prompt=prompt, stream=stream)
            assert refused.value.code == "queue_full" and float(refused.value.response.headers["retry-after"]) >= 1
        worker.takes.set()


def test_a_worker_that_comes_late_is_waited_for(api: Api, worker: ScriptedWorker) -> None:
    """503 with Retry-After, and a worker that is there by the time the package asks again."""
    worker.stop()
    worker.queue.withdraw()
    seen: list[int] = []
    late: list[ScriptedWorker] = []

    def note(response: Any) -> None:
        seen.append(response.status_code)
        if response.status_code == 503 and not late:
            late.append(ScriptedWorker(api.settings.redis_url.get_secret_value(), worker.models).start())

    hooks: Any = {"response": [note]}
    http_client = openai.DefaultHttpxClient(event_hooks=hooks, trust_env=False)
    with openai.OpenAI(
        base_url=f"{api.url}/v1", api_key="none", max_retries=5, timeout=60, http_client=http_client
    ) as sdk:
        answer = sdk.completions.create(model="tiny", prompt="a", max_tokens=4)
    for one in late:
        one.stop()
    assert answer.choices[0].text and seen[0] == 503 and seen[-1] == 200
