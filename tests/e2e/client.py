"""A small HTTP/1.1 client on asyncio: server-sent events as they come, a connection that can be cut at any moment.

Measurements need one that costs less than the service it measures, which no whole client library does: this one is
httptools, the parser the service itself uses, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools


class ConnectionLost(Exception):
    """The server closed the connection before the answer was whole, or takes none."""


@dataclass(frozen=True)
class Event:
    """One server-sent event; `[DONE]` stays text."""

    name: str
    data: Any
    id: str


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def retry_after_s(self) -> float | None:
        """As a client reads it: whole seconds."""
        return float(self.headers["retry-after"]) if "retry-after" in self.headers else None


@dataclass
class Connection(asyncio.Protocol):
    """One connection, kept alive between answers."""

    url: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    """Whether the whole answer is there."""

    async def __aenter__(self) -> Connection:
        address = urlsplit(self.url)
        assert address.hostname is not None and address.port is not None, self.url
        self._lost = self.complete = False
        self._changed = asyncio.Event()
        self._body = bytearray()
        try:
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: self, address.hostname, address.port
            )
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        self._transport = transport
        return self

    async def __aexit__(self, *_: object) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        """Leave, whatever is still to come."""
        self._transport.abort()

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request and wait for the whole answer; header names are written with underscores."""
        self.send(method, path, body, **headers)
        while not self.complete:
            await self._wait()
        return Answer(self.status, self.headers, bytes(self._body))

    async def begin(self, method: str, path: str, body: Any = None, **headers: str) -> int:
        """Send a request and return its status as soon as the headers are there."""
        self.send(method, path, body, **headers)
        while not self.status:
            await self._wait()
        return self.status

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of an answer that `begin` began."""
        while True:
            while (end := self._body.find(b"\n\n")) < 0:
                if self.complete:
                    return
                await self._wait()
            frame = self._body[:end].decode()
            del self._body[: end + 2]
            if (event := read_event(frame)) is not None:
                yield event

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(content)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.status, self.headers, self.complete = 0, {}, False
        self._body.clear()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write("\r\n".join([*lines, "", ""]).encode() + content)

    def pause(self) -> None:
        """Read nothing more: what the server sends fills the buffers in between, and then it waits."""
        self._transport.pause_reading()

    def go_on(self) -> None:
        self._transport.resume_reading()

    async def _wait(self) -> None:
        self._changed.clear()
        if self._lost:
            raise ConnectionLost(f"{self.url} hung up")
        await self._changed.wait()

    # What asyncio and httptools call.
    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        self._changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._changed.set()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.complete = True


def read_event(frame: str) -> Event | None:
    """Return an event; None for a comment (a ping)."""
    fields = dict(line.split(": ", 1) for line in frame.splitlines() if ": " in line and not line.startswith(":"))
    if "data" not in fields:
        return None
    data = fields["data"]
    return Event(fields.get("event", "message"), data if data == "[DONE]" else json.loads(data), fields.get("id", ""))


async def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """One request on a connection of its own."""
    async with Connection(url) as connection:
        return await connection.ask(method, path, body, **headers)
