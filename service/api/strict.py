"""The base of all that clients send, and its fields' types: nothing unknown, nothing converted.

That text is whole characters `body.parse_json` sees to, for names and values alike.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_NAME = 200


def whole_number(value: object) -> object:
    """Take 5.0 for 5, as JavaScript sends it, but never true for 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not a truth value")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a truth value")
    return value


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Int = Annotated[int, BeforeValidator(whole_number)]
Float = Annotated[float, BeforeValidator(number)]


class Strict(BaseModel):
    """No unknown field, no conversion from another type, nothing that is not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


def example(**fields: Any) -> ConfigDict:
    """The configuration of a schema that shows one in /openapi.json."""
    return ConfigDict(json_schema_extra={"examples": [fields]})
