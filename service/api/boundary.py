"""Around every request, as pure ASGI: its id, the bound on its body, the unexpected, and what is counted of it."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import response_of
from service.api.state import ApiState
from service.errors import BodyTooLarge, InternalError

log = logging.getLogger("service.api")

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
PROBES = frozenset(("/live", "/ready", "/health", "/metrics"))
"""Asked every few seconds; the log is not told."""


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
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if int_of(headers.get("content-length", "")) > self.max_body_bytes:
                scope["state"]["refusal"] = BodyTooLarge.code
                await response_of(self.too_large())(scope, receive, send_with_id)
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

    def bounded(self, receive: Receive) -> Receive:
        """Count the body as it comes: a chunked one says no length before."""
        num_bytes = 0

        async def receive_part() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
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
        if refusal is not None:
            state.metrics.refusals.labels(refusal).inc()
        level = logging.DEBUG if route in PROBES else logging.INFO
        if log.isEnabledFor(level):
            log.log(
                level,
                "%s %s %d %.1f ms%s",
                method,
                route or "an unknown route",
                status,
                elapsed_s * 1000,
                f" {refusal}" if refusal else "",
                extra={"request_id": scope["state"]["request_id"]},
            )


def route_of(scope: Scope) -> str:
    """The route's pattern, "" for an address that is none: addresses are without number, patterns are few."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) if route is not None else ""


def int_of(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
