"""One shape for every error, wherever it was raised: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.errors import (
    InternalError,
    InvalidValue,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    RequestError,
)
from shared.errors import SmolLMError
from shared.tokenizer import lone_surrogate_in

MAX_MESSAGE_CHARACTERS = 500
"""Messages quote what was sent; a large body must not come back as a larger error."""

TGI_ROUTE = "/"
ERROR_TYPES = {
    **dict.fromkeys((400, 401, 404, 413, 422), "validation"),
    **dict.fromkeys((408, 409), "incomplete_generation"),
    **dict.fromkeys((429, 503), "overloaded"),
}

ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class JsonResponse(Response):
    """JSON that any text survives in: plain ASCII, so neither a lone surrogate nor U+2028 can break it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode("ascii")


def to_json(content: Any) -> str:
    return ENCODER.encode(content)


def body_of(error: RequestError) -> dict[str, Any]:
    """The one shape."""
    message = str(error)
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code_name}}


def headers_of(error: RequestError) -> dict[str, str]:
    """`Retry-After` in whole seconds for everyone, `retry-after-ms` for clients that read it (OpenAI's do)."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    if not error.is_worth_retrying:  # OpenAI's client repeats 408, 409 and 5xx unless told not to
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def body_with_type(error: RequestError) -> dict[str, Any]:
    """The one shape, and beside it TGI's word for the kind, by which its clients choose their exception."""
    return {**body_of(error), "error_type": ERROR_TYPES.get(error.status, "generation")}


def response_of(
    error: RequestError, headers: Mapping[str, str] | None = None, *, body: Callable[..., dict[str, Any]] = body_of
) -> JsonResponse:
    return JsonResponse(body(error), error.status, {**headers_of(error), **(headers or {})})


def install_error_handlers(app: FastAPI) -> None:
    """Turn everything a route can raise into that shape; the unexpected is caught further out, in `boundary`."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        request.state.refusal = error.code_name
        if isinstance(error, NotReady):
            request.app.state.api.redis.report(error)
        route = request.scope.get("route")
        return response_of(error, body=body_with_type if getattr(route, "path", "") == TGI_ROUTE else body_of)

    @app.exception_handler(SmolLMError)
    async def users_fault(request: Request, error: SmolLMError) -> Response:
        return await refused(request, InvalidValue(str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place, name = first["loc"][0], str(first["loc"][-1])
        problem = first["msg"].removeprefix("Input ")
        return await refused(request, InvalidValue(f"The {place} parameter {name} {problem}.", param=name))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = shorten(request.url.path)
        refusal: RequestError
        if error.status_code == 404:
            refusal = NotFound(f"There is nothing at {path}; /docs lists what there is.", code="unknown_route")
        elif error.status_code == 405:
            allowed = ", ".join(methods_of(request)) or (error.headers or {}).get("Allow", "GET")
            refusal = MethodNotAllowed(f"{request.method} does not work on {path}; use {allowed}.")
            request.state.refusal = refusal.code_name
            return response_of(refusal, {"allow": allowed})
        elif error.status_code < 500:
            refusal = MalformedRequest(str(error.detail))
        else:
            refusal = InternalError(str(error.detail))
        request.state.refusal = refusal.code_name
        return response_of(refusal, error.headers)


def methods_of(request: Request) -> list[str]:
    """What works on an address: routes of one path are several, and the router tells of the first alone."""
    known = request.app.openapi()["paths"]
    path = getattr(request.scope.get("route"), "path", request.url.path)
    return [method.upper() for method in known.get(path, {})]


def shorten(value: object) -> str:
    """Quote what a client sent, short enough to stand in a sentence; half a surrogate pair comes out escaped."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    if isinstance(value, str):
        text = json.dumps(value[:60], ensure_ascii=lone_surrogate_in(value) is not None)
        return text if len(value) <= 60 else f"{text}… ({len(value):,} characters)"
    text = repr(value) if value is None or isinstance(value, float) else json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
