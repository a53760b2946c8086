"""TGI's request and answer, field by field. What would change the answer and cannot be served is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from service.api.schemas import MAX_LOGPROBS, Length, Seed, Stops
from service.api.strict import Float, Int, Strict, example
from service.api.unserved import refuse_unserved, without_nulls

DEFAULT_LENGTH = 100
"""TGI's."""

UNSERVED: dict[str, tuple[object, ...]] = {
    "adapter_id": (),
    "best_of": (1,),
    "decoder_input_details": (False,),
    "typical_p": (1, 1.0),
    "watermark": (False,),
}
"""Fields of TGI's that would change the answer, each with the values that do not."""


class TgiGrammar(Strict):
    """What the text must be; as `response_format` of the other routes."""

    type: Literal["json", "json_schema", "regex"]
    value: Any = Field(description="a JSON schema, or a regular expression")

    def as_response_format(self) -> dict[str, Any]:
        if self.type == "regex":
            return {"type": "regex", "pattern": self.value}
        value = self.value
        if self.type == "json_schema" and isinstance(value, dict):  # {"name", "schema"}, or the schema alone
            value = value.get("schema", value)
        return {"type": "json_schema", "json_schema": {"schema": value}}


class TgiParameters(Strict):
    """How tokens are drawn: greedy, unless something says otherwise."""

    do_sample: bool = Field(False, description="draw; so does a temperature, top_k or top_p that is not neutral")
    temperature: Annotated[Float, Field(ge=0, le=10)] | None = Field(None, description="1 where it draws")
    top_k: Annotated[Int, Field(ge=0, le=1_000_000)] | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[Float, Field(ge=0.01, le=10)] = 1.0
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] = 0.0
    max_new_tokens: Length = DEFAULT_LENGTH
    seed: Seed | None = None
    stop: Stops = Field(default_factory=list, description="not part of the text, unlike TGI's")
    truncate: Annotated[Int, Field(ge=1)] | None = Field(None, description="keep so many tokens of the prompt's end")
    return_full_text: bool = Field(False, description="begin the text with the prompt")
    details: bool = False
    top_n_tokens: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] = Field(0, description="alternatives, with details")
    grammar: TgiGrammar | None = None

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        grammar = values.get("grammar")  # a null inside a schema says something
        values = refuse_unserved(without_nulls(values), UNSERVED)
        return values if grammar is None else values | {"grammar": grammar}

    @property
    def draws(self) -> bool:
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return self.do_sample or any(getattr(self, name) not in (None, value) for name, value in neutral.items())

    def sampling(self) -> dict[str, Any]:
        """The same in the words of `Sampling`, of which `grammar` is not checked yet."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return {
            "temperature": temperature if self.draws else 0.0,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "stop": self.stop,
            "response_format": None if self.grammar is None else self.grammar.as_response_format(),
        }


class TgiRequest(Strict):
    """`POST /`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": "First Citizen:", "parameters": {"max_new_tokens": 64}}]}
    )

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Annotated[
        TgiParameters,
        BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=TgiParameters | None),
    ] = Field(default_factory=TgiParameters)
    stream: bool = False

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to ask the worker for; every streamed token tells its own log-probability."""
        return self.parameters.top_n_tokens if self.stream or self.parameters.details else None


class TgiAnswer(BaseModel):
    model_config = example(generated_text=" Speak, speak.")

    generated_text: str
    details: dict[str, Any] | None = Field(None, description="finish_reason, generated_tokens, seed, tokens, …")
