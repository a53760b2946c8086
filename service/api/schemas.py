"""What clients send and get, field by field. Names and defaults are the contract's; unknown fields are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.api.response_format import ResponseFormat
from service.api.strict import MAX_NAME, Float, Int, Name, Strict, example
from service.api.unserved import UNSERVED, refuse_unserved, without_nulls

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 200
MAX_STOP_IDS = 64
MAX_BIASES = 1_024
MAX_LOGPROBS = 20
MAX_CHOICES = 8
MAX_JOBS = 16
"""Prompts times choices of one request to /v1."""
MAX_MESSAGES = 256
MAX_TOKENS = 1_000_000
"""Bound on what is read; what is served is bounded by the model's context."""


def one_or_many(value: object) -> object:
    """Take one stop string for a list of one, and null for none."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[
    list[StopText],
    BeforeValidator(one_or_many, json_schema_input_type=StopText | list[StopText] | None),
    Field(max_length=MAX_STOPS),
]
Seed = Annotated[Int, Field(ge=0, lt=2**63)]
Length = Annotated[Int, Field(ge=1, le=MAX_TOKENS)]
ModelName = Name
TokenId = Annotated[Int, Field(ge=0, lt=2**31)]


def whole_number_name(value: object) -> object:
    """JSON writes a token id that is a name as text."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12 else value


Biases = Annotated[
    dict[
        Annotated[TokenId, BeforeValidator(whole_number_name, json_schema_input_type=str)],
        Annotated[Float, Field(ge=-100, le=100)],
    ],
    Field(max_length=MAX_BIASES),
]
NOT_FOR_SAMPLING = {"ignore_eos", "stop_token_ids", "response_format", "timeout_s", "priority"}


class Sampling(Strict):
    """How tokens are drawn; one meaning on every route."""

    temperature: Annotated[Float, Field(ge=0, le=10)] = Field(0.7, description="0 is greedy")
    top_k: Annotated[Int, Field(ge=0, le=1_000_000)] = Field(0, description="0 is off")
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(0.95, description="1 is off")
    min_p: Annotated[Float, Field(ge=0, le=1)] = Field(0.0, description="0 is off")
    repetition_penalty: Annotated[Float, Field(ge=0.01, le=10)] = Field(
        1.0, description="over prompt and completion; 1 is off"
    )
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] = Field(0.0, description="over the completion")
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] = Field(0.0, description="over the completion")
    logit_bias: Biases = Field(default_factory=dict, description="token id to what is added to its score")
    min_tokens: Annotated[Int, Field(ge=0, le=MAX_TOKENS)] = Field(0, description="nothing ends the text before these")
    ignore_eos: bool = Field(False, description="go on behind the model's own end tokens")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] = Field(
        default_factory=list, description="further end tokens, not part of the text"
    )
    seed: Seed | None = Field(None, description="null draws one, which the answer names")
    stop: Stops = Field(default_factory=list, description="strings that end the completion and are not part of it")
    response_format: ResponseFormat | None = Field(
        None, description="what the text must be: text, json_object, json_schema, or our regex"
    )
    timeout_s: Annotated[Float, Field(gt=0)] = Field(
        300.0, description="the job ends by then with what it has, queued or running; SMOLLM_MAX_TIMEOUT_S is the most"
    )
    priority: Literal["high", "normal", "batch"] = Field("normal", description="who is served first; none starves")

    def drawn_with(self, seed: int) -> dict[str, Any]:
        """The fields of `shared.sampling.SamplingParams`."""
        names = set(Sampling.model_fields) - {"seed", "stop", *NOT_FOR_SAMPLING}
        return {**self.model_dump(include=names), "seed": seed}


class GenerateRequest(Sampling):
    """`POST /generate`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "First Citizen:", "max_new_tokens": 64, "temperature": 0.7}]}
    )

    prompt: Annotated[str, Field(min_length=1)]
    model: ModelName | None = Field(None, description="null is the default model")
    max_new_tokens: Length = Field(128, description="lowered, with a warning, to what the model's context leaves")
    max_tokens: Length | None = Field(None, description="another name of max_new_tokens")
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="alternatives to report beside each token's own log-probability"
    )
    stream: bool = Field(False, description="answer as server-sent events")

    @model_validator(mode="after")
    def one_length(self) -> GenerateRequest:
        if self.max_tokens is not None and "max_new_tokens" in self.model_fields_set:
            raise ValueError("max_tokens is another name of max_new_tokens; send one of them.")
        return self

    @property
    def num_new_tokens(self) -> int:
        return self.max_new_tokens if self.max_tokens is None else self.max_tokens


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = Field(description="prompt tokens that were computed for another job already")


class Timings(BaseModel):
    """Milliseconds; null where it did not come to that."""

    queue_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    ttft_ms: float | None
    tokens_per_second: float | None


class GenerateAnswer(BaseModel):
    """A job as clients see it: the blocking answer, the event `done`, and `GET /jobs/ID`."""

    model_config = example(
        id="661104e38869d13d1402df6fc16d8ffa1",
        model="tiny",
        revision="8e5cd96575a4813be8aa88b796f1997deb2000752eb72806dd132ed76ec49e51",
        status="succeeded",
        text=" Speak, speak.",
        token_ids=[17, 301, 44],
        finish_reason="length",
        stop_sequence=None,
        warnings=[],
        seed=123,
        parameters={"max_new_tokens": 3, "temperature": 0.7},
        usage={"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7, "cached_tokens": 0},
        timings={"queue_ms": 1, "prefill_ms": 9.5, "decode_ms": 22, "ttft_ms": 12, "tokens_per_second": 90.9},
        attempts=1,
    )

    id: str
    model: str
    revision: str | None
    status: Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled", "deadline", "error"] | None
    stop_sequence: str | None
    warnings: list[str]
    seed: int
    parameters: dict[str, Any]
    usage: Usage
    timings: Timings
    logprobs: list[dict[str, Any]] | None = None
    prompt_logprobs: list[dict[str, Any]] | None = Field(None, description="where asked for, the first one's is null")
    attempts: int = Field(description="how many workers held the job; above 1 it outlived one")
    position: int | None = Field(None, description="place in the queue while queued; 1 is next")
    eta_s: float | None = None
    error: ErrorDetail | None = None


class TokenizeRequest(Strict):
    """`POST /tokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "First Citizen:"}]})

    text: str
    model: ModelName | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"token_ids": [1, 2, 3]}]})

    token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]
    model: ModelName | None = None
    skip_special_tokens: bool = True


class TokensAnswer(BaseModel):
    model_config = example(
        model="tiny", token_ids=[38, 412, 26], tokens=["First", " Citizen", ":"], count=3, context_length=2048
    )

    model: str
    token_ids: list[int]
    tokens: list[str] = Field(description="the text of each; bytes that are no character are U+FFFD")
    count: int
    context_length: int = Field(description="most tokens of prompt and completion together")


class TextAnswer(BaseModel):
    model_config = example(model="tiny", text="First Citizen:")

    model: str
    text: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Every error, everywhere."""

    model_config = example(
        error={
            "message": "temperature: Input should be greater than or equal to 0; got -1.",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    )

    error: ErrorDetail


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="accepted and ignored")


class OpenAISampling(Sampling):
    """OpenAI's words and defaults, and ours beside them; what cannot be served is refused, never passed over."""

    temperature: Annotated[Float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    model: ModelName | None = Field(None, description="left out: the default model")
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] = Field(1, description="choices, each a job of its own")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(None, description="accepted and ignored")
    metadata: dict[str, Any] | None = Field(None, description="accepted and ignored")
    store: bool | None = Field(None, description="accepted and ignored")

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        whole = {name: values.get(name) for name in ("response_format", "logit_bias")}  # a null inside says something
        values = refuse_unserved(without_nulls(values), UNSERVED)
        return values | {name: value for name, value in whole.items() if value is not None}

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own log-probabilities are asked for."""
        return False


def list_of_prompts(value: Any) -> Any:
    """OpenAI's four forms of a prompt as one: a list of texts or of lists of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_JOBS:
        raise ValueError(f"must be a text, a list of token ids, or a list of 1 to {MAX_JOBS} of either")
    for prompt in value:
        is_ids = isinstance(prompt, list) and all(type(one) is int and 0 <= one < 2**31 for one in prompt)
        if not (isinstance(prompt, str) or is_ids) or not prompt:
            raise ValueError("must be texts that are not empty, or lists of token ids that are not empty")
    return value


class CompletionRequest(OpenAISampling):
    """`POST /v1/completions`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "First Citizen:", "max_tokens": 64}]})

    prompt: Annotated[
        list[Any],
        BeforeValidator(list_of_prompts, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]),
    ]
    max_tokens: Annotated[Int, Field(ge=0, le=MAX_TOKENS)] = Field(16, description="0, with echo: the prompt alone")
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = Field(False, description="begin the text with the prompt, and logprobs with the prompt's")

    @model_validator(mode="after")
    def few_enough(self) -> CompletionRequest:
        if len(self.prompt) * self.n > MAX_JOBS:
            raise PydanticCustomError(
                "value_error", "n: prompts times n may be at most {most}; send several requests.", {"most": MAX_JOBS}
            )
        if not self.max_tokens and not self.echo:
            message = "max_tokens is 0, which leaves nothing to answer; send echo with it, or at least 1."
            raise PydanticCustomError("invalid_value", "{message}", {"message": message, "field": "max_tokens"})
        return self

    @property
    def num_new_tokens(self) -> int:
        return self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


class ContentPart(Strict):
    type: Literal["text"]
    text: str


def joined_parts(value: Any) -> Any:
    """A message's content as one text; other parts than text are refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text or len(part) > 2:
            raise ValueError('may hold parts of the form {"type": "text", "text": "..."} only')
        texts.append(part["text"])
    return "".join(texts)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined_parts, json_schema_input_type=str | list[ContentPart])]
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(None, description="accepted and ignored")

    def to_template(self) -> dict[str, str]:
        """As chat templates read it; a developer is the system by OpenAI's newer word."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(OpenAISampling):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}]
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Length = Field(512, description="lowered to what the model's context leaves")
    max_tokens: Length | None = Field(None, description="another name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def asks_for_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs needs logprobs: true."
            raise PydanticCustomError("unserved", "{message}", {"message": message, "field": "top_logprobs"})
        return self

    @property
    def num_new_tokens(self) -> int:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens
