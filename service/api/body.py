"""A request's body as a checked object: strict JSON, then a schema; every fault names its field and the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from service.api.errors import shorten
from service.errors import InvalidValue, MalformedRequest
from shared.tokenizer import lone_surrogate_in

Schema = TypeVar("Schema", bound=BaseModel)

COMPONENTS = "#/components/schemas/{model}"

MAX_DEPTH = 16
"""Lists and objects inside each other; no request needs more than four."""


def read_body(schema: type[Schema]) -> Callable[[Request], Coroutine[Any, Any, Schema]]:
    """Return a dependency that parses the body as `schema`.

    The dependency raises `MalformedRequest` for what is not a JSON object and `InvalidValue` for a field at fault.
    """

    async def parse(request: Request) -> Schema:
        refuse_pages_of_others(request)
        return check(schema, parse_json(await request.body()))

    return parse


def describe_body(schema: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a body read by `read_body`."""
    reference = {"$ref": COMPONENTS.format(model=schema.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def refuse_pages_of_others(request: Request) -> None:
    """Browsers let any page post text or forms to any address, this machine's too; JSON they only let through CORS.

    A client that names no Origin is no browser, so `curl -d '{...}'` needs no header.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if "origin" in request.headers and content_type != "application/json":
        raise MalformedRequest(
            f"The content type is {shorten(content_type)}; send the body as application/json.", param="Content-Type"
        )


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse one JSON object whose text is all valid Unicode."""
    if not body.strip():
        raise MalformedRequest("The body is empty; send a JSON object.")
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"The body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise MalformedRequest(f"The body is not JSON: {error.msg} at character {error.pos}.") from None
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        raise MalformedRequest(
            "The body is not JSON this service reads: nested too deep or a number too long."
        ) from None
    if not isinstance(value, dict):
        raise MalformedRequest('The body must be one JSON object, such as {"prompt": "First Citizen:"}.')
    if text.count("[") + text.count("{") > MAX_DEPTH and is_too_deep(value):
        raise MalformedRequest(f"The body is nested deeper than {MAX_DEPTH} levels; no field needs that.")
    # Text that was UTF-8 can hold half a surrogate pair only where the JSON wrote one as an escape.
    if "\\ud" in text or "\\uD" in text:
        refuse_lone_surrogates(value, ())
    return value


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects stand more than `MAX_DEPTH` deep; level by level, so that depth costs no recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        members = (member for one in level for member in (one.values() if isinstance(one, dict) else one))
        level = [member for member in members if isinstance(member, dict | list)]
    return bool(level)


def refuse_lone_surrogates(value: object, path: tuple[str, ...]) -> None:
    if isinstance(value, str) and (found := lone_surrogate_in(value)) is not None:
        name = ".".join(path) or None
        raise InvalidValue(
            f"{name or 'A name'} holds {found}; send whole characters.", param=name, code="lone_surrogate"
        )
    if isinstance(value, dict):
        for name in value:
            refuse_lone_surrogates(name, path)
        for name, member in value.items():
            refuse_lone_surrogates(member, (*path, name))
    elif isinstance(value, list):
        for place, member in enumerate(value):
            refuse_lone_surrogates(member, (*path, str(place)))


def check(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Validate values, turning the first fault into one sentence."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise explain(error, schema) from None


def explain(error: ValidationError, schema: type[BaseModel]) -> InvalidValue:
    """Name the field at fault, the value and what is allowed."""
    faults = error.errors(include_url=False)
    unknown = next((fault for fault in faults if fault["type"] == "extra_forbidden"), None)
    if unknown is not None:
        return explain_unknown(unknown, schema)
    fault = faults[0]
    if "field" in fault.get("ctx", {}):  # a sentence of our own, see `schemas`
        return InvalidValue(fault["msg"], param=fault["ctx"]["field"], code=fault["type"])
    name = ".".join(str(part) for part in fault["loc"])[:200] or None
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return InvalidValue(f"The field {name} is missing.", param=name, code="missing_field")
    if fault["type"] == "value_error" and name is None:  # a rule about several fields is a sentence of its own
        return InvalidValue(message)
    if fault["type"] in ("too_short", "string_too_short") and not fault["input"]:
        message = "it is empty; send something in it"
    elif fault["type"] not in ("too_long", "string_too_long"):
        message += f"; got {shorten(fault['input'])}"
    return InvalidValue(f"{name or 'body'}: {message}.", param=name)


def explain_unknown(fault: ErrorDetails, schema: type[BaseModel]) -> InvalidValue:
    """Name the known field nearest to an unknown one."""
    *place, unknown = (str(part) for part in fault["loc"])
    known = [field.alias or key for key, field in schema.model_fields.items()] if not place else []
    nearest = difflib.get_close_matches(unknown[:60], known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}."
    return InvalidValue(
        f"Unknown field {shorten(unknown)}" + (f"; {hint}" if known else f" in {'.'.join(place)}."),
        param=".".join((*place, unknown))[:200],
        code="unknown_field",
    )
