"""What /docs says of every route beyond its own words: bodies that routes read themselves, streams, errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.api.body import COMPONENTS
from service.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorAnswer,
    GenerateRequest,
    TokenizeRequest,
)
from service.api.tgi_schemas import TgiRequest

BODIES = (GenerateRequest, CompletionRequest, ChatRequest, TgiRequest, TokenizeRequest, DetokenizeRequest)

MEANINGS = {
    400: "The body is not a JSON object",
    401: "An API key is asked for and this one is missing or wrong",
    404: "No such model, job or run",
    408: "The job did not end within timeout_s",
    409: "The Idempotency-Key came with another body, or the job was cancelled",
    413: "The body is too large",
    422: "A value cannot be served; `param` names the field",
    429: "The queue is full; `Retry-After` says when to come back",
    500: "The accepted job could not be served",
    503: "Redis or the workers are away; `Retry-After` says when to come back",
}
ADMISSION = (400, 401, 404, 409, 413, 422, 429, 500, 503)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can refuse with these."""
    return {status: {"model": ErrorAnswer, "description": MEANINGS[status]} for status in statuses}


def events(description: str) -> dict[str, Any]:
    """The part of `responses[200]` for an answer that can also be a stream."""
    return {"content": {"text/event-stream": {"schema": {"type": "string", "description": description}}}}


def install_documentation(app: FastAPI) -> None:
    """Make `/openapi.json` whole: FastAPI does not know the schemas of bodies that dependencies read."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template=COMPONENTS)
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}, {}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
