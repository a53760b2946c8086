"""The response class itself, called as a server calls it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from service.api.event_stream import EventStream, event, unless_gone
from service.errors import NotReady
from service.metrics import ApiMetrics

pytestmark = pytest.mark.anyio


class Connection:
    """An ASGI server's side of one response."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.is_complete = False
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.parts.append(message["body"])
            self.is_complete = not message["more_body"]


async def serve(connection: Connection, events: AsyncGenerator[bytes], **options: Any) -> None:
    stream = EventStream(events, metrics=ApiMetrics(), **options)
    await stream({"type": "http"}, connection.receive, connection.send)


async def test_a_silent_stream_pings() -> None:
    connection = Connection()
    enough = asyncio.Event()

    async def events() -> AsyncGenerator[bytes]:
        await enough.wait()
        yield event({"a": 1})

    task = asyncio.create_task(serve(connection, events(), ping_s=0.02))
    while len(connection.parts) < 3:
        await asyncio.sleep(0.005)
    enough.set()
    await task
    assert connection.parts[:3] == [b": ping\n\n"] * 3
    assert connection.parts[-2:] == [b'data: {"a":1}\n\n', b""] and connection.is_complete


@pytest.mark.parametrize(
    ("error", "code"),
    [(NotReady("Redis is away."), "not_ready"), (KeyError("bug"), "internal_error")],
)
async def test_what_is_raised_in_the_middle_is_an_event(error: Exception, code: str) -> None:
    async def events() -> AsyncGenerator[bytes]:
        yield event({"a": 1})
        raise error

    connection = Connection()
    await serve(connection, events())
    name, data = connection.parts[1].decode().strip().split("\n")
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["error"]["code"] == code
    assert b"bug" not in connection.parts[1]
    assert connection.is_complete


async def test_leaving_is_told_and_closes_the_generator() -> None:
    connection, told, closed = Connection(), asyncio.Event(), asyncio.Event()

    async def events() -> AsyncGenerator[bytes]:
        try:
            yield event({"a": 1})
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def on_gone() -> None:
        told.set()

    task = asyncio.create_task(serve(connection, events(), on_gone=on_gone))
    while not connection.parts:
        await asyncio.sleep(0.005)
    connection.left.set()
    await task
    assert told.is_set() and closed.is_set()


async def test_a_process_that_is_told_to_stop_cancels_no_job() -> None:
    """The client is still there and will go on elsewhere."""
    connection, told = Connection(), asyncio.Event()

    async def events() -> AsyncGenerator[bytes]:
        yield event({"a": 1})
        await asyncio.Event().wait()

    async def on_gone() -> None:
        told.set()

    task = asyncio.create_task(serve(connection, events(), on_gone=on_gone))
    while not connection.parts:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not told.is_set() and not connection.is_complete


async def test_work_whose_client_stays_returns() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await unless_gone(Connection().receive, work()) == 7
