"""POST /: text generation in the shapes of Hugging Face's TGI, which `huggingface_hub.InferenceClient` speaks.

The same jobs as everywhere. Two things differ from TGI on purpose: a stop sequence is not part of the text, and what is
refused is refused with a status before a stream begins. Errors have the one shape, with TGI's `error_type` beside it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import RedirectResponse, Response

from service.api.admission import Accepted, admit, encode, find_model
from service.api.answer import bytes_of, cut_short, finite
from service.api.body import check, describe_body, read_body
from service.api.caller import CallerDep
from service.api.documentation import ADMISSION, errors, events
from service.api.errors import TGI_ROUTE, JsonResponse, body_with_type, response_of
from service.api.event_stream import EventStream, event
from service.api.follow import cancel, follow_all, wait_for
from service.api.models import Model
from service.api.schemas import Sampling
from service.api.state import ApiState, state_of
from service.api.tgi_schemas import TgiAnswer, TgiRequest
from service.queue.job import Chunk, Ended, JobRecord
from shared.stream_decoder import StreamDecoder

router = APIRouter(tags=["tgi"])

STREAM = (
    "`data:` {index, token: {id, text, logprob, special}, top_tokens, generated_text, details} for each token; "
    "generated_text and details in the last one"
)
FINISH_REASONS = {"length": "length", "stop": "eos_token"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request whose job was admitted."""

    body: TgiRequest
    model: Model
    job: Accepted

    @property
    def prefix(self) -> str:
        """What the generated text begins with."""
        return self.body.inputs if self.body.parameters.return_full_text else ""


async def admit_tgi(
    request: Request, caller: CallerDep, body: Annotated[TgiRequest, Depends(read_body(TgiRequest))]
) -> Asked:
    state = state_of(request)
    model = await find_model(state, None)
    prompt: str | list[int] = body.inputs
    if body.parameters.truncate is not None:
        prompt = (await encode(model, body.inputs, "inputs"))[-body.parameters.truncate :]
    (job,) = await admit(
        state,
        replace(caller, wants_async=False),
        model,
        [prompt],
        check(Sampling, body.parameters.sampling()),
        route=TGI_ROUTE,
        num_new_tokens=body.parameters.max_new_tokens,
        logprobs=body.num_logprobs,
        prompt_field="inputs",
    )
    return Asked(body=body, model=model, job=job)


@router.get(TGI_ROUTE, summary="The documentation", status_code=307, response_class=RedirectResponse, tags=["status"])
async def to_documentation() -> Response:
    """People who open the address in a browser."""
    return RedirectResponse("/docs")


@router.post(
    TGI_ROUTE,
    summary="Complete a prompt (TGI)",
    responses={200: {"model": list[TgiAnswer], **events(STREAM)}, **errors(*ADMISSION)},
    openapi_extra=describe_body(TgiRequest),
)
async def generate(request: Request, asked: Annotated[Asked, Depends(admit_tgi)]) -> Response:
    """What `huggingface_hub.InferenceClient(URL).text_generation` asks. Answered by the default model."""
    state = state_of(request)
    headers = {"x-job-id": asked.job.id}
    if asked.body.stream or asked.job.caller.wants_stream:
        return EventStream(
            stream(state, asked),
            metrics=state.metrics,
            on_gone=lambda: cancel(state, [asked.job]),
            describe_error=lambda error: event(body_with_type(error)),
            headers=headers,
        )
    refuse = partial(response_of, headers=headers, body=body_with_type)
    records = await wait_for(request, state, [asked.job], failure_of=cut_short, refuse=refuse)
    if isinstance(records, Response):
        return records
    answer: dict[str, Any] = {"generated_text": asked.prefix + records[0].completion.text}
    if asked.body.parameters.details:
        answer["details"] = details_of(asked, records[0])
    return JsonResponse([answer], headers=headers)


@dataclass
class Pieces:
    """A completion's text cut into its tokens' pieces, which joined are the text that the worker released."""

    decoder: StreamDecoder
    held: str = ""
    """Decoded and not yet released: it may be the beginning of a stop sequence."""
    released: str = ""
    """Released and not yet given to a token."""
    given: list[str] = field(default_factory=list)

    def push(self, token_ids: tuple[int, ...], text: str) -> list[str]:
        self.released += text
        pieces = []
        for token_id in token_ids:
            self.held += self.decoder.push(token_id)
            size = min(len(self.held), len(self.released))
            pieces.append(self.released[:size])
            self.held, self.released = self.held[size:], self.released[size:]
        self.given += pieces
        return pieces


def describe_token(entry: dict[str, Any], text: str, model: Model) -> dict[str, Any]:
    token_id = entry["token_id"]
    is_special = token_id in model.tokenizer.special_ids
    return {"id": token_id, "text": text, "logprob": finite(entry["logprob"]), "special": is_special}


def top_tokens(entry: dict[str, Any], model: Model) -> list[dict[str, Any]]:
    return [
        describe_token({"token_id": token_id, "logprob": logprob}, text_of(token_id, model), model)
        for token_id, logprob in entry["top"]
    ]


def text_of(token_id: int, model: Model) -> str:
    return bytes_of(token_id, model).decode("utf-8", "replace")


def ending_of(record: JobRecord) -> dict[str, Any]:
    assert record.finish is not None
    reason = "stop_sequence" if record.finish.stop_sequence else FINISH_REASONS[record.finish.reason]
    return {
        "finish_reason": reason,
        "generated_tokens": len(record.completion.token_ids),
        "seed": record.request.sampling["seed"],
        "input_length": len(record.request.prompt_ids),
    }


def details_of(asked: Asked, record: JobRecord) -> dict[str, Any]:
    entries = record.completion.logprobs or ()
    pieces = Pieces(asked.model.tokenizer.stream_decoder())
    texts = pieces.push(record.completion.token_ids, record.completion.text)
    tokens = [describe_token(entry, text, asked.model) for entry, text in zip(entries, texts, strict=True)]
    details = {**ending_of(record), "prefill": [], "tokens": tokens}
    if asked.body.parameters.top_n_tokens:
        details["top_tokens"] = [top_tokens(entry, asked.model) for entry in entries]
    return details


async def stream(state: ApiState, asked: Asked) -> AsyncGenerator[bytes]:
    """Yield an event per token. The end carries the whole text: on the last token where that is known to be it."""
    pieces = Pieces(asked.model.tokenizer.stream_decoder())
    index = 0
    last: dict[str, Any] | None = None
    async with aclosing(follow_all(state, [asked.job])) as followed:
        async for _, one in followed:
            if isinstance(one, Chunk):
                texts = pieces.push(one.token_ids, one.text)
                for entry, text in zip(one.logprobs or (), texts, strict=True):
                    index += 1
                    said = say(index, describe_token(entry, text, asked.model), top_tokens(entry, asked.model))
                    if index == asked.job.num_new_tokens:
                        last = said
                    else:
                        yield event(said)
            elif isinstance(one, Ended):
                end_id = asked.model.folder.end_token_ids[0]
                last = last or say(index + 1, {"id": end_id, "text": "", "logprob": 0.0, "special": True}, [])
                last["token"]["text"] += pieces.released
                whole = asked.prefix + one.record.completion.text
                yield event({**last, "generated_text": whole, "details": ending_of(one.record)})


def say(index: int, token: dict[str, Any], top: list[dict[str, Any]]) -> dict[str, Any]:
    return {"index": index, "token": token, "top_tokens": top, "generated_text": None, "details": None}
