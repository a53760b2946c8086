"""Server-sent events, and noticing that a client has gone. One rule for both: gone means `http.disconnect`.

uvicorn tells a disconnect to whoever waits in `receive`, so somebody always does while an answer is in the making. A
cancelled task is something else: the process is told to stop, the client is still there and goes on elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.errors import body_of, to_json
from service.errors import InternalError, RequestError
from service.metrics import ApiMetrics

log = logging.getLogger("service.api")

PING_S = 10.0
"""Clients are promised a sign of life every 15 s."""

Answer = TypeVar("Answer")


class ClientGone(Exception):
    """Nobody is left to answer."""


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Return what `work` returns; `ClientGone` as soon as the client is."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await end_tasks(task, gone)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they are gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def event(data: Any, *, name: str | None = None, id: int | None = None) -> bytes:
    """Frame one event; the JSON is ASCII, so no reader finds a line end of its own in it."""
    text = data if isinstance(data, str) else to_json(data)
    return format_sse_event(data_str=text, event=name, id=None if id is None else str(id))


def error_event(error: RequestError) -> bytes:
    return event(body_of(error), name="error")


class EventStream(Response):
    """Sends events as they come, a ping when none do, and calls `on_gone` if the client leaves before the end.

    Everything a generator raises becomes an event; what can be refused must be refused before this response exists.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        metrics: ApiMetrics,
        on_gone: Callable[[], Awaitable[None]] | None = None,
        describe_error: Callable[[RequestError], bytes] = error_event,
        headers: dict[str, str] | None = None,
        ping_s: float = PING_S,
    ) -> None:
        self.events = events
        self.metrics = metrics
        self.on_gone = on_gone
        self.describe_error = describe_error
        self.ping_s = ping_s
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache, no-transform", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        sent_at = time.monotonic()

        async def send_part(part: bytes) -> None:
            nonlocal sent_at
            await send({"type": "http.response.body", "body": part, "more_body": True})
            sent_at = time.monotonic()

        async def ping() -> None:
            while True:
                await asyncio.sleep(max(0.01, sent_at + self.ping_s - time.monotonic()))
                if time.monotonic() >= sent_at + self.ping_s:
                    await send_part(KEEPALIVE_COMMENT)

        self.metrics.open_streams.inc()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writing = asyncio.create_task(self._write(send_part), name="event-stream")
        pinging = asyncio.create_task(ping(), name="event-stream-ping")
        gone = asyncio.create_task(wait_for_disconnect(receive), name="event-stream-client")
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            finished = writing.done()
        finally:
            self.metrics.open_streams.dec()
            await end_tasks(writing, pinging, gone)
        if not finished:
            self.metrics.disconnects.inc()
            if self.on_gone is not None:
                await self.on_gone()
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send_part: Callable[[bytes], Awaitable[None]]) -> None:
        async with contextlib.aclosing(self.events) as events:
            try:
                async for part in events:
                    await send_part(part)
            except RequestError as error:
                await send_part(self.describe_error(error))
            except Exception:
                log.exception("a stream failed")
                await send_part(self.describe_error(InternalError("The service failed; its log says why.")))
