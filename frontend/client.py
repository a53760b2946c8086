"""The REST API as the page sees it: one connection pool, plain values, and errors that are one sentence.

ApiError        the API refused or failed; the text is for people, with the time to wait where it gave one
└── ApiAway     nothing answers at that address, or it stopped answering half-way
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

import httpx2

Json = dict[str, Any]

# The API sends a comment at least every 15 s while a stream is quiet: three missed ones mean that it is gone.
STREAM_TIMEOUT = httpx2.Timeout(5.0, read=50.0, pool=None)
CALL_TIMEOUT = httpx2.Timeout(5.0, read=15.0, pool=None)

CUT_OFF = "The API ended the stream before the answer was complete: try again."


class ApiError(Exception):
    """The API refused or failed; one sentence for people."""


class ApiAway(ApiError):
    """Nothing answers at the API's address, or it stopped answering half-way."""


@dataclass(frozen=True)
class Started:
    """The API took the request under this id."""

    job_id: str


@dataclass(frozen=True)
class Queued:
    """It waits; 1 is next."""

    position: int
    eta_s: float | None


@dataclass(frozen=True)
class Piece:
    """Some more of the completion."""

    text: str
    num_tokens: int | None
    """None where the route does not tell."""


@dataclass(frozen=True)
class Done:
    """The whole answer, as the blocking call would have given it."""

    answer: Json


Event = Started | Queued | Piece | Done


class ApiClient:
    """Everything the page asks the API for."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        self.base_url = base_url
        self.http = httpx2.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=CALL_TIMEOUT,
            # A page in front of a queue must not be the narrow place.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
            # Ours is one address, given in the settings: proxies and credentials of the environment do not apply.
            trust_env=False,
        )

    async def close(self) -> None:
        await self.http.aclose()

    async def models(self) -> list[Json]:
        return cast(list[Json], await self._get("/v1/models", "data"))

    async def health(self) -> Json:
        return cast(Json, await self._get("/health"))

    async def runs(self) -> list[Json]:
        return cast(list[Json], await self._get("/runs", "runs"))

    async def run_metrics(self, name: str) -> list[Json]:
        return cast(list[Json], await self._get(f"/runs/{quote(name, safe='')}/metrics", "rows"))

    async def run_samples(self, name: str) -> list[Json]:
        return cast(list[Json], await self._get(f"/runs/{quote(name, safe='')}/samples", "rows"))

    async def job(self, job_id: str) -> Json:
        return cast(Json, await self._get(f"/jobs/{job_id}"))

    async def cancel(self, job_id: str) -> None:
        """Ask for the end of a job; a job that has ended already is left alone."""
        async with self._sentences():
            response = await self.http.delete(f"/jobs/{job_id}")
            await self._check(response)

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Stream one completion. Closing the iterator early closes the connection, which cancels the job."""
        async with self._sentences(), self._stream("/generate", {**body, "stream": True}) as response:
            yield Started(response.headers["x-job-id"])
            async for event in httpx2.EventSource(response):
                data = cast(Json, event.json())
                if event.event == "queued":
                    yield Queued(data["position"], data.get("eta_s"))
                elif event.event == "token":
                    yield Piece(data["text"], len(data["token_ids"]))
                elif event.event == "done":
                    yield Done(data)
                    return
                elif event.event == "error":
                    raise ApiError(_sentence(data, response))
            raise ApiAway(CUT_OFF)

    async def chat(self, body: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Stream one reply, as `generate` does. OpenAI's chunks tell little: the job behind them tells the rest."""
        async with self._sentences(), self._stream("/v1/chat/completions", {**body, "stream": True}) as response:
            job_id = response.headers["x-job-id"]
            yield Started(job_id)
            async for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    yield Done(await self.job(job_id))
                    return
                chunk = cast(Json, event.json())
                if "error" in chunk:
                    raise ApiError(_sentence(chunk, response))
                if text := chunk["choices"][0]["delta"].get("content"):
                    yield Piece(text, None)
            raise ApiAway(CUT_OFF)

    async def _get(self, path: str, member: str | None = None) -> Any:
        """Return the answer, or one member of it."""
        async with self._sentences():
            response = await self.http.get(path)
            await self._check(response)
            return response.json() if member is None else response.json()[member]

    @asynccontextmanager
    async def _stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[httpx2.Response]:
        headers = {"Accept": "text/event-stream"}
        async with self.http.stream("POST", path, json=body, headers=headers, timeout=STREAM_TIMEOUT) as response:
            await self._check(response)
            yield response

    async def _check(self, response: httpx2.Response) -> None:
        if response.is_success:
            return
        await response.aread()
        try:
            body = response.json()
        except ValueError:
            body = {}
        raise ApiError(_sentence(body, response))

    @asynccontextmanager
    async def _sentences(self) -> AsyncIterator[None]:
        """Turn what the HTTP library and the JSON parser raise into one sentence."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise ApiAway(f"The API at {self.base_url} does not answer: start it, or set SMOLLM_API_URL.") from error
        except httpx2.TimeoutException as error:
            raise ApiAway(f"The API at {self.base_url} went silent: try again in a moment.") from error
        except httpx2.HTTPError as error:
            raise ApiAway(f"The connection to the API at {self.base_url} broke: try again in a moment.") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ApiError(f"What answers at {self.base_url} is not this API: check SMOLLM_API_URL.") from error


def _sentence(body: Any, response: httpx2.Response) -> str:
    """Take the API's own message, and say when to come back where it tells."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    sentence = str(message or f"The API answered {response.status_code} without saying why").rstrip()
    if not sentence.endswith((".", "!", "?")):
        sentence += "."
    wait_s = response.headers.get("retry-after")
    if wait_s and "try again" not in sentence.lower():
        sentence += f" Try again in {wait_s} s."
    return sentence
