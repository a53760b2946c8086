"""Around every request, as pure ASGI: its id, the bound on its body, the unexpected, and what is counted of it."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import response_of
from service.api.state import ApiState
from service.api.wire import MAX_HEADER_BYTES
from service.errors import BodyTooLarge, HeadersTooLarge, InternalError, RequestError, SlowRequest
from service.tracing import new_traceparent, read_traceparent, trace_id_of, traceparent_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger("service.api")

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
BODY_TIMEOUT_S = 30.0
"""From the request's headers to the end of its body, which is at most `max_body_bytes`."""
PROBES = frozenset(("/live", "/ready", "/health", "/metrics"))
"""Asked every few seconds; the log is not told."""
WATCHED = frozenset(("/v1/models", "/runs", "/runs/{name}/metrics", "/runs/{name}/samples"))
"""Asked every few seconds by an open page; the log is told of refusals only."""


class Boundary:
    """Middleware, the outermost of ours."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        span = self.open_trace(scope, headers)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            refusal = self.refusal_of(scope, headers)
            if refusal is not None:
                scope["state"]["refusal"] = refusal.code_name
                await response_of(refusal)(scope, receive, send_with_id)
            else:
                await self.app(scope, self.bounded(receive), send_with_id)
        except Exception:
            log.exception("%s %s failed", scope["method"], route_of(scope), extra={"request_id": request_id})
            if status:  # too late for an error; cutting the connection says that the answer is not whole
                raise
            scope["state"]["refusal"] = InternalError.code
            error = InternalError(f"The service failed; its log says why, under the request id {request_id}.")
            await response_of(error)(scope, receive, send_with_id)
        finally:
            self.count(scope, status, time.perf_counter() - started)
            if span is not None:
                span.update_name(f"{scope['method']} {route_of(scope)}")
                span.set_attributes({"http.route": route_of(scope), "http.response.status_code": status})
                span.end()

    def open_trace(self, scope: Scope, headers: Headers) -> Span | None:
        """Note the request's traceparent; return its span where spans are written."""
        state: ApiState = scope["app"].state.api
        trace = read_traceparent(headers.get("traceparent", ""))
        span = None
        if state.tracer.is_on and scope["path"] not in PROBES:
            attributes = {"http.request.method": scope["method"], "http.request.id": scope["state"]["request_id"]}
            span = state.tracer.begin(scope["method"], parent=trace, attributes=attributes)
        scope["state"]["trace"] = traceparent_of(span) if span is not None else trace or new_traceparent()
        return span

    def refusal_of(self, scope: Scope, headers: Headers) -> RequestError | None:
        """What can be refused by the headers alone."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return HeadersTooLarge(f"The headers have more than {MAX_HEADER_BYTES:,} bytes; send less.")
        if int_of(headers.get("content-length", "")) > self.max_body_bytes:
            return self.too_large()
        return None

    def bounded(self, receive: Receive) -> Receive:
        """Bound the body in size, counted as it comes (a chunked one says no length before), and in time."""
        num_bytes = 0
        is_whole = False
        give_up_at: float | None = None

        async def receive_part() -> Message:
            nonlocal num_bytes, is_whole, give_up_at
            if is_whole:  # somebody waits for the client to leave
                return await receive()
            give_up_at = give_up_at or asyncio.get_running_loop().time() + BODY_TIMEOUT_S
            try:
                async with asyncio.timeout_at(give_up_at):
                    message = await receive()
            except TimeoutError:
                raise SlowRequest(f"The body did not end within {BODY_TIMEOUT_S:g} s; send it at once.") from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if num_bytes > self.max_body_bytes:
                    raise self.too_large()
            return message

        return receive_part

    def too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body has more than {self.max_body_bytes:,} bytes; send less.")

    def count(self, scope: Scope, status: int, elapsed_s: float) -> None:
        state: ApiState = scope["app"].state.api
        route, method = route_of(scope), scope["method"]
        state.metrics.requests.labels(route, method if route else "", status).inc()
        state.metrics.request_seconds.labels(route).observe(elapsed_s)
        refusal = scope["state"].get("refusal")
        told = scope["state"]
        if refusal is not None:
            state.metrics.refusals.labels(refusal).inc()
            if "key" in told:
                state.metrics.key_refusals.labels(told["key"], refusal).inc()
        is_polled = route in PROBES or (route in WATCHED and status < 400)
        level = logging.DEBUG if is_polled else logging.INFO
        if log.isEnabledFor(level):
            log.log(
                level,
                "%s %s %d %.1f ms%s",
                method,
                route or "an unknown route",
                status,
                elapsed_s * 1000,
                f" {refusal}" if refusal else "",
                extra={
                    "request_id": told["request_id"],
                    "trace": trace_id_of(told["trace"]),
                    "job": told.get("job"),
                    "key": told.get("key"),
                },
            )


def route_of(scope: Scope) -> str:
    """The route's pattern, "" for an address that is none: addresses are without number, patterns are few."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) if route is not None else ""


def int_of(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
