"""`response_format`: what the text of an answer must be. One field, one meaning, on every route."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import Field

from service.api.models import Model
from service.api.strict import Name, Strict
from service.errors import InvalidValue
from shared.errors import GenerationError
from shared.grammar import ANY_OBJECT, check_grammar, json_grammar, regex_grammar

MAX_PATTERN = 4_000


class TextFormat(Strict):
    """Any text: the default."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]
    value: dict[str, Any] | None = Field(None, description="a JSON schema, where Hugging Face's client puts one")


class NamedSchema(Strict):
    """A JSON schema as OpenAI wraps it."""

    name: Name | None = Field(None, description="accepted and ignored")
    description: str | None = Field(None, description="accepted and ignored")
    strict: bool | None = Field(None, description="accepted and ignored: a schema is always enforced")
    schema_: dict[str, Any] = Field(alias="schema", description="the JSON schema; keywords not known are refused")


class JsonSchemaFormat(Strict):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Strict):
    """Ours: text that a regular expression matches as a whole."""

    type: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat,
    Field(discriminator="type"),
]


async def grammar_for(model: Model, asked: ResponseFormat | None) -> str | None:
    """Return the grammar that enforces a format; None where any text will do.

    Raises:
        InvalidValue: the schema or pattern cannot be enforced; it says why.
    """
    if asked is None or isinstance(asked, TextFormat):
        return None
    field = "response_format"
    try:
        if isinstance(asked, RegexFormat):
            field += ".pattern"
            source = regex_grammar(asked.pattern)
        elif isinstance(asked, JsonSchemaFormat):
            field += ".json_schema.schema"
            source = json_grammar(asked.json_schema.schema_)
        else:
            source = json_grammar(ANY_OBJECT if asked.value is None else asked.value)
        await asyncio.to_thread(check_grammar, source, model.tokenizer)
    except (GenerationError, ValueError) as error:
        raise InvalidValue(f"{field}: {error}.", param=field) from error
    return source
