"""HTTP below the app: headers bounded in size and time, and the one shape of error for what is no HTTP."""

from __future__ import annotations

import asyncio
import http
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.errors import body_of, to_json
from service.errors import HeadersTooLarge, MalformedRequest, RequestError, SlowRequest

MAX_HEADER_BYTES: Final = 32 * 1024
"""Request line and headers together. Browsers send 2 KB, tracing and cookies may add 8."""
HEADER_TIMEOUT_S: Final = 15.0
"""From a request's first byte to the end of its headers; a connection that says nothing at all gets as long."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol over httptools, which alone would collect headers without end and wait for them for ever."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_header_bytes = 0
        self.is_reading_headers = True
        self.header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.is_reading_headers:
            self.start_timer()
        self.num_header_bytes += len(data)
        super().data_received(data)  # counts from 0 again when the headers end in it
        if self.is_reading_headers and self.num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            limit = f"{MAX_HEADER_BYTES:,}"
            self.refuse(HeadersTooLarge(f"Address and headers have more than {limit} bytes; send less."))

    def on_headers_complete(self) -> None:
        self.is_reading_headers = False
        self.stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.is_reading_headers, self.num_header_bytes = True, 0

    def start_timer(self) -> None:
        if self.header_timer is None:
            self.header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.on_slow_headers)

    def stop_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def on_slow_headers(self) -> None:
        self.refuse(SlowRequest(f"The request's headers did not end within {HEADER_TIMEOUT_S:g} s; send them at once."))

    def send_400_response(self, msg: str) -> None:
        """uvicorn's own answer to what is no HTTP is plain text."""
        self.refuse(MalformedRequest(f"{msg} Speak HTTP/1.1."))

    def refuse(self, error: RequestError) -> None:
        """Answer without the app, which never saw this request, and hang up."""
        self.stop_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer is under way: words of ours would land in the middle of it
            return
        content = to_json(body_of(error)).encode("ascii")
        head = (
            f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + content)
        self.transport.close()
