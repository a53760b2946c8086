"""What /docs says of every route beyond its own words: bodies that routes read themselves, streams, errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api.answers import (
    ChatAnswer,
    CompletionAnswer,
    HealthAnswer,
    LiveAnswer,
    ModelAnswer,
    ModelsAnswer,
    ReadyAnswer,
    RowsAnswer,
    RunsAnswer,
)
from service.api.body import COMPONENTS
from service.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorAnswer,
    GenerateAnswer,
    GenerateRequest,
    TextAnswer,
    TokenizeRequest,
    TokensAnswer,
)
from service.api.tgi_schemas import UNSERVED as UNSERVED_TGI
from service.api.tgi_schemas import TgiAnswer, TgiRequest
from service.api.unserved import UNSERVED

BODIES = (GenerateRequest, CompletionRequest, ChatRequest, TgiRequest, TokenizeRequest, DetokenizeRequest)

ANSWERS = (
    *(ChatAnswer, CompletionAnswer, ErrorAnswer, GenerateAnswer, HealthAnswer, LiveAnswer, ModelAnswer, ModelsAnswer),
    *(ReadyAnswer, RowsAnswer, RunsAnswer, TextAnswer, TgiAnswer, TokensAnswer),
)

MEANINGS = {
    400: "The body is not a JSON object",
    401: "An API key is asked for and this one is missing or wrong",
    404: "No such model, job or run",
    408: "The request took too long to arrive; on /v1 and /, the job did not end within timeout_s",
    409: "The Idempotency-Key came with another body, or the job was cancelled",
    413: "The body is too large",
    422: "A value cannot be served; `param` names the field",
    429: "The queue is full; `Retry-After` says when to come back",
    431: "The address and headers are too large",
    500: "The accepted job could not be served",
    503: "Redis or the workers are away; `Retry-After` says when to come back",
}
ADMISSION = (400, 401, 404, 408, 409, 413, 422, 429, 431, 500, 503)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can refuse with these."""
    return {status: {"model": ErrorAnswer, "description": MEANINGS[status]} for status in statuses}


def events(description: str) -> dict[str, Any]:
    """The part of `responses[200]` for an answer that can also be a stream."""
    fields = {name: {"type": "string"} for name in ("event", "data", "id")}
    schema = {"type": "object", "properties": fields, "required": ["data"], "description": description}
    return {"content": {"text/event-stream": {"itemSchema": schema}}}


TAKES_NULLS: dict[str, Mapping[str, tuple[object, ...]]] = {
    "CompletionRequest": UNSERVED,
    "ChatRequest": UNSERVED,
    "StreamOptions": {},
    "Message": {},
    "ContentPart": {},
    "TgiParameters": UNSERVED_TGI,
}
"""Schemas in which null means that nothing was said, with the fields that are taken only while they say nothing."""


def tell_of_nulls(schema: dict[str, Any], unserved: Mapping[str, tuple[object, ...]]) -> None:
    """Write into a schema what `without_nulls` and `refuse_unserved` do."""
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        if name not in required and {"type": "null"} not in field.get("anyOf", []):
            about = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}
    for name, values in unserved.items():
        schema["properties"][name] = {"enum": [None, *values], "description": "not served; these change nothing"}
    schema["additionalProperties"] = {"type": "null"}


def examples_of(schema: type[BaseModel]) -> list[Any]:
    extra = schema.model_config.get("json_schema_extra")
    assert isinstance(extra, dict) and isinstance(extra["examples"], list), schema
    return extra["examples"]


def install_documentation(app: FastAPI) -> None:
    """Make `/openapi.json` whole: FastAPI does not know the schemas of bodies that dependencies read."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template=COMPONENTS)
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            for model in ANSWERS:  # FastAPI leaves nulls out of examples
                document["components"]["schemas"][model.__name__]["examples"] = examples_of(model)
            for name, unserved in TAKES_NULLS.items():
                tell_of_nulls(document["components"]["schemas"][name], unserved)
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}, {}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
