"""/v1: OpenAI's shapes over the same jobs, tried with the unmodified `openai` package."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.api.admission import Accepted, admit, find_model
from service.api.answer import cut_short, prompt_entries
from service.api.answers import ChatAnswer, CompletionAnswer, ModelAnswer, ModelsAnswer
from service.api.body import describe_body, read_body
from service.api.caller import Caller, CallerDep, identify
from service.api.documentation import ADMISSION, errors, events
from service.api.errors import JsonResponse, body_of, response_of
from service.api.event_stream import EventStream, event
from service.api.follow import cancel, follow_all, wait_for
from service.api.models import Model
from service.api.openai_shapes import CHAT, COMPLETION, Shape, Text, joined, usage_of
from service.api.schemas import ChatRequest, CompletionRequest, OpenAISampling
from service.api.state import ApiState, state_of
from service.errors import InvalidValue, RequestError
from service.queue.job import Chunk, Completion, Ended, JobRecord
from shared.errors import GenerationError

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(identify)])

DONE = event("[DONE]")
NAMELESS = frozenset(("dummy", "tgi"))
"""What Hugging Face's clients call a model when all they were given is an address: the default one."""
STREAM = "OpenAI's chunks as `data:`, then `data: [DONE]`"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request to /v1 whose jobs were admitted: `n` jobs per prompt, in order."""

    body: CompletionRequest | ChatRequest
    shape: Shape
    model: Model
    jobs: list[Accepted]

    def envelope(self, *, chunk: bool, created: int) -> dict[str, Any]:
        """What every answer and every chunk begins with."""
        return {
            "id": self.shape.id_prefix + self.jobs[0].id,
            "object": self.shape.chunk_object if chunk else self.shape.object,
            "created": created,
            "model": self.model.name,
            "system_fingerprint": self.model.folder.revision[:16],
        }

    def echoed(self, place: int) -> str:
        """The text a choice begins with."""
        if not isinstance(self.body, CompletionRequest) or not self.body.echo:
            return ""
        prompt = self.jobs[place].prompt
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt, skip_special_tokens=False)

    def prompt_logprobs(self, place: int, scored: Chunk | Completion) -> dict[str, Any] | None:
        """Those of a choice's prompt, if they stand in this."""
        text = Text(self.model.tokenizer.stream_decoder(skip_special_tokens=False))
        entries = prompt_entries(scored, self.jobs[place].prompt_ids)
        return self.shape.logprobs(entries, self.model, text) if entries else None


async def find_named(state: ApiState, name: str | None) -> Model:
    return await find_model(state, None if name in NAMELESS and state.models.find(name) is None else name)


async def admit_completion(
    request: Request, caller: CallerDep, body: Annotated[CompletionRequest, Depends(read_body(CompletionRequest))]
) -> Asked:
    state = state_of(request)
    model = await find_named(state, body.model)
    jobs = await admit_choices(
        state, caller, model, body.prompt, body, route="/v1/completions", logprobs=body.logprobs, field="prompt"
    )
    return Asked(body=body, shape=COMPLETION, model=model, jobs=jobs)


async def admit_chat(
    request: Request, caller: CallerDep, body: Annotated[ChatRequest, Depends(read_body(ChatRequest))]
) -> Asked:
    state = state_of(request)
    model = await find_named(state, body.model)
    if not model.tokenizer.has_chat_template:
        raise InvalidValue(
            f"The model {model.name} has no chat template, so it knows no turns; send a plain prompt to "
            "/v1/completions, or name another model.",
            param="model",
            code="no_chat_template",
        )
    try:
        prompt = model.tokenizer.render_chat([message.to_template() for message in body.messages])
    except GenerationError as error:
        raise InvalidValue(str(error), param="messages") from error
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    jobs = await admit_choices(
        state, caller, model, [prompt], body, route="/v1/chat/completions", logprobs=logprobs, field="messages"
    )
    return Asked(body=body, shape=CHAT, model=model, jobs=jobs)


async def admit_choices(
    state: ApiState,
    caller: Caller,
    model: Model,
    prompts: Sequence[str | list[int]],
    body: OpenAISampling,
    *,
    route: str,
    logprobs: int | None,
    field: str,
) -> list[Accepted]:
    assert isinstance(body, CompletionRequest | ChatRequest)
    return await admit(
        state,
        replace(caller, wants_async=False),
        model,
        prompts,
        body,
        route=route,
        num_new_tokens=body.num_new_tokens,
        logprobs=logprobs,
        scores_prompt=body.scores_prompt,
        num_choices=body.n,
        prompt_field=field,
    )


@router.post(
    "/completions",
    summary="Complete prompts (OpenAI)",
    responses={200: {"model": CompletionAnswer, **events(STREAM)}, **errors(*ADMISSION)},
    openapi_extra=describe_body(CompletionRequest),
)
async def completions(request: Request, asked: Annotated[Asked, Depends(admit_completion)]) -> Response:
    """OpenAI's parameters and answers, with `top_k`, `min_p`, `repetition_penalty`, `timeout_s` and `priority` beside
    them. `echo` with `logprobs` scores the prompt too, with `max_tokens` 0 it alone. `suffix` and `best_of` are
    refused."""
    return await answer(request, asked)


@router.post(
    "/chat/completions",
    summary="Answer a conversation (OpenAI)",
    responses={200: {"model": ChatAnswer, **events(STREAM)}, **errors(*ADMISSION)},
    openapi_extra=describe_body(ChatRequest),
)
async def chat_completions(request: Request, asked: Annotated[Asked, Depends(admit_chat)]) -> Response:
    """Writes the messages out by the model's own chat template; a model without one is refused. `tools` are
    refused."""
    return await answer(request, asked)


async def answer(request: Request, asked: Asked) -> Response:
    state = state_of(request)
    headers = {"x-job-id": asked.jobs[0].id}
    if asked.body.stream:
        return EventStream(
            stream(state, asked),
            metrics=state.metrics,
            on_gone=lambda: cancel(state, asked.jobs),
            describe_error=describe_error,
            headers=headers,
        )
    refuse = partial(response_of, headers=headers)
    records = await wait_for(request, state, asked.jobs, failure_of=cut_short, refuse=refuse)
    if isinstance(records, Response):
        return records
    if asked.body.scores_prompt:  # 13 to 63 ms for a prompt of 2,048 tokens, in which others' streams are to go on
        return await asyncio.to_thread(lambda: JsonResponse(whole(asked, records), headers=headers))
    return JsonResponse(whole(asked, records), headers=headers)


def whole(asked: Asked, records: list[JobRecord]) -> dict[str, Any]:
    choices = []
    for place, record in enumerate(records):
        assert record.finish is not None
        echoed = asked.echoed(place)
        text = Text(asked.model.tokenizer.stream_decoder(), len(echoed))
        drawn = asked.shape.logprobs(record.completion.logprobs, asked.model, text)
        logprobs = joined(asked.prompt_logprobs(place, record.completion), drawn)
        choices.append(
            {
                "index": place,
                **asked.shape.content(echoed + record.completion.text),
                "logprobs": logprobs,
                "finish_reason": record.finish.reason,
            }
        )
    created = records[0].created_ms // 1000
    usage = usage_of(records, asked.body.n)
    return {**asked.envelope(chunk=False, created=created), "choices": choices, "usage": usage}


async def stream(state: ApiState, asked: Asked) -> AsyncGenerator[bytes]:
    """Yield OpenAI's chunks of all choices as they come; usage where asked for; the end."""
    shape = asked.shape
    with_usage = asked.body.stream_options is not None and asked.body.stream_options.include_usage
    envelope = asked.envelope(chunk=True, created=int(time.time()))
    if with_usage:
        envelope["usage"] = None

    def chunk(place: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> bytes:
        choice = {"index": place, **delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return event({**envelope, "choices": [choice]})

    texts = []
    for place in range(len(asked.jobs)):
        echoed = asked.echoed(place)
        texts.append(Text(asked.model.tokenizer.stream_decoder(), len(echoed)))
        if shape is CHAT or (echoed and not asked.body.scores_prompt):
            yield chunk(place, shape.first_delta(echoed))
    records: dict[int, JobRecord] = {}
    async with aclosing(follow_all(state, asked.jobs)) as followed:
        async for place, one in followed:
            if isinstance(one, Chunk) and one.prompt_scores is not None:
                logprobs = await asyncio.to_thread(asked.prompt_logprobs, place, one)
                yield chunk(place, shape.first_delta(asked.echoed(place)), logprobs)
            if isinstance(one, Chunk) and (one.text or one.logprobs):
                logprobs = shape.logprobs(one.logprobs, asked.model, texts[place])
                yield chunk(place, shape.delta(one.text), logprobs)
            elif isinstance(one, Ended):
                assert one.record.finish is not None
                records[place] = one.record
                yield chunk(place, shape.delta(""), None, one.record.finish.reason)
    if with_usage:
        usage = usage_of([records[place] for place in range(len(asked.jobs))], asked.body.n)
        yield event({**envelope, "choices": [], "usage": usage})
    yield DONE


def describe_error(error: RequestError) -> bytes:
    return event(body_of(error)) + DONE


@router.get("/models", summary="The models there are", responses={200: {"model": ModelsAnswer}, **errors(401)})
async def list_models(request: Request) -> Response:
    """Every export that stands whole in the models folder, now."""
    models = state_of(request).models
    return JsonResponse({"object": "list", "data": [describe_model(model, models.default) for model in models.all]})


@router.get(
    "/models/{model:path}", summary="One model", responses={200: {"model": ModelAnswer}, **errors(401, 404, 422, 503)}
)
async def read_model(request: Request, model: str) -> Response:
    models = state_of(request).models
    return JsonResponse(describe_model(await models.get(model), models.default))


def describe_model(model: Model, default: str | None) -> dict[str, Any]:
    folder = model.folder
    created = datetime.fromisoformat(folder.created_at).timestamp() if folder.created_at else _changed_at(model)
    return {
        "id": model.name,
        "object": "model",
        "created": int(created),
        "owned_by": "trained here" if folder.trained_here else "imported",
        "revision": folder.revision,
        "is_default": model.name == default,
        "context_length": model.context_length,
        "trained_length": folder.trained_length,
        "num_parameters": folder.config.num_parameters,
        "has_chat_template": model.tokenizer.has_chat_template,
    }


def _changed_at(model: Model) -> float:
    try:
        return model.folder.weights.stat().st_mtime
    except OSError:  # taken away since the last look
        return 0.0
