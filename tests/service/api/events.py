"""Reading server-sent events in tests."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2


@dataclass(frozen=True)
class Event:
    name: str
    data: Any
    id: str


@contextlib.contextmanager
def open_stream(
    client: httpx2.Client, method: str, path: str, **options: Any
) -> Iterator[tuple[httpx2.Response, Iterator[Event]]]:
    """Open a stream that must begin well; yields the response and its events as they come."""
    with client.stream(method, path, **options) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield response, events_of(response)


def events_of(response: httpx2.Response) -> Iterator[Event]:
    for event in httpx2.EventSource(response):
        data = event.data if event.data == "[DONE]" else json.loads(event.data)
        yield Event(name=event.event, data=data, id=event.id)


def read_stream(client: httpx2.Client, method: str, path: str, **options: Any) -> list[Event]:
    with open_stream(client, method, path, **options) as (_, events):
        return list(events)


def text_of(events: list[Event]) -> str:
    return "".join(event.data["text"] for event in events if event.name == "token")


def ids_of(events: list[Event]) -> list[int]:
    return [token for event in events if event.name == "token" for token in event.data["token_ids"]]
