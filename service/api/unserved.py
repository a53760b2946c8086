"""Fields of other services' requests that would change the answer and are not served: refused, never passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

UNSERVED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that would change the answer, each with the values that do not."""


def without_nulls(value: Any) -> Any:
    """OpenAI's clients send null for "nothing said", also in messages that came from an answer."""
    if isinstance(value, dict):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    return [without_nulls(member) for member in value] if isinstance(value, list) else value


def refuse_unserved(values: dict[str, Any], unserved: Mapping[str, tuple[object, ...]]) -> dict[str, Any]:
    """Return the values without fields that are not served, if what they say is what happens anyway."""
    for name in unserved.keys() & values.keys():
        value = values[name]
        if not any(type(value) is type(same) and value == same for same in unserved[name]):  # 0 is not False here
            message = f"{name} is not served here; leave it out."
            raise PydanticCustomError("unserved", "{message}", {"message": message, "field": name})
    return {name: value for name, value in values.items() if name not in unserved}
