"""What clients get beyond a job's own object, for /openapi.json: OpenAI's answers, models, runs, status."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.api.strict import example

TokenLogprobs = list[dict[str, Any]]


MODEL: dict[str, Any] = {
    "id": "tiny",
    "object": "model",
    "created": 1795573164,
    "owned_by": "trained here",
    "revision": "8e5cd96575a4813be8aa88b796f1997deb2000752eb72806dd132ed76ec49e51",
    "is_default": True,
    "context_length": 2048,
    "trained_length": 128,
    "num_parameters": 134515008,
    "has_chat_template": False,
}
USAGE = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0}}
SAID = {"id": "cmpl-661104e38869d13d1402df6f", "created": 1795573164, "model": "tiny", "system_fingerprint": "8e5cd965"}


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="prompt tokens that were computed for another job already")


class OpenAIUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(BaseModel):
    """`POST /v1/completions`."""

    model_config = example(
        **SAID,
        object="text_completion",
        choices=[{"index": 0, "text": " Speak, speak.", "logprobs": None, "finish_reason": "length"}],
        usage=USAGE,
    )

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: OpenAIUsage


class ChatLogprobs(BaseModel):
    content: TokenLogprobs
    refusal: None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """`POST /v1/chat/completions`."""

    model_config = example(
        **SAID,
        object="chat.completion",
        choices=[
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Paris.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        usage=USAGE,
    )

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: OpenAIUsage


class ModelAnswer(BaseModel):
    """One model."""

    model_config = example(**MODEL)

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    revision: str = Field(description="sha256 of the served weights")
    is_default: bool
    context_length: int
    trained_length: int | None
    num_parameters: int
    has_chat_template: bool


class ModelsAnswer(BaseModel):
    model_config = example(object="list", data=[MODEL])

    object: Literal["list"]
    data: list[ModelAnswer]


class RunsAnswer(BaseModel):
    model_config = example(runs=[{"name": "first", "state": "running", "step": 500, "num_steps": 5050, "loss": 3.1}])

    runs: list[dict[str, Any]] = Field(description="name, state, step, num_steps, stage, loss, … of each")


class RowsAnswer(BaseModel):
    model_config = example(name="first", num_rows=1, rows=[{"kind": "train", "step": 1, "loss": 10.8}])

    name: str
    num_rows: int = Field(description="before thinning out")
    rows: list[dict[str, Any]]


class LiveAnswer(BaseModel):
    model_config = example(status="live")

    status: Literal["live"]


class ReadyAnswer(BaseModel):
    model_config = example(status="ready", model="tiny", workers=1)

    status: Literal["ready"]
    model: str
    workers: int


class HealthAnswer(BaseModel):
    model_config = example(
        status="ok",
        default_model="tiny",
        uptime_s=61.5,
        versions={"python": "3.11.7"},
        limits={"max_queued_jobs": 256},
        models=[{"name": "tiny", "is_default": True, "queued": 0, "running": 0, "workers": 1}],
        workers=[{"id": "host-17-a1b2", "models": {"tiny": "8e5cd965"}, "slots": 32, "free": 32, "device": "cpu"}],
    )

    status: Literal["ok", "degraded", "down"]
    reason: str | None = None
    default_model: str | None
    uptime_s: float
    versions: dict[str, str]
    limits: dict[str, Any]
    models: list[dict[str, Any]]
    workers: list[dict[str, Any]]
