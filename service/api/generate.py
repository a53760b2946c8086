"""POST /generate: one job, answered whole, as a stream, or later."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.api.admission import Accepted, admit_generate
from service.api.answer import describe, describe_chunk, failure_of
from service.api.body import describe_body
from service.api.documentation import ADMISSION, errors, events
from service.api.errors import JsonResponse, response_of
from service.api.event_stream import EventStream, error_event, event
from service.api.follow import cancel, wait_for
from service.api.models import Model
from service.api.schemas import GenerateAnswer, GenerateRequest
from service.api.state import ApiState, state_of
from service.errors import NotFound
from service.metrics import StopWatch
from service.queue.job import Admission, Chunk, QueuedEvent

router = APIRouter(tags=["generate"])

STREAM = (
    "`event: queued` {position, eta_s}, `event: token` (`id:` = index after its last token) {index, text, token_ids}, "
    "one `event: done` (the blocking answer) or `event: error`"
)


@router.post(
    "/generate",
    summary="Complete a prompt",
    responses={200: {"model": GenerateAnswer, **events(STREAM)}, 202: {"model": GenerateAnswer}, **errors(*ADMISSION)},
    openapi_extra=describe_body(GenerateRequest),
)
async def generate(
    request: Request, admitted: Annotated[tuple[GenerateRequest, Accepted], Depends(admit_generate)]
) -> Response:
    """Answers when the job ended; as server-sent events with `"stream": true` or `Accept: text/event-stream`; at once,
    with the address of the job, with `Prefer: respond-async`. A client that goes away cancels its job unless the job
    is async. With an `Idempotency-Key`, the same request meets the same job again."""
    state = state_of(request)
    body, job = admitted
    headers = {"x-job-id": job.id}
    if job.caller.wants_async:
        record = await state.queue.get(job.id)
        if record is None:
            raise NotFound(f"The job {job.id} is gone.", code="job_not_found")
        headers |= {"location": f"/jobs/{job.id}", "preference-applied": "respond-async"}
        return JsonResponse(describe(record, job.model), 202, headers)
    if body.stream or job.caller.wants_stream:
        return EventStream(
            stream_job(state, job.id, job.model, admission=job.admission, watch=job.watch),
            metrics=state.metrics,
            on_gone=lambda: cancel(state, [job]),
            headers=headers | {"location": f"/jobs/{job.id}"},
        )
    refuse = partial(response_of, headers=headers)
    records = await wait_for(request, state, [job], failure_of=failure_of, refuse=refuse)
    if isinstance(records, Response):
        return records
    return JsonResponse(describe(records[0], job.model), headers=headers)


async def stream_job(
    state: ApiState,
    job_id: str,
    model: Model | None,
    *,
    after: int = 0,
    admission: Admission | None = None,
    watch: StopWatch | None = None,
) -> AsyncGenerator[bytes]:
    """Yield a job's events behind index `after`; of a job just admitted, its place in the queue first.

    With a watch the job's end is counted: once, by the process that admitted it.
    """
    place = None
    if admission is not None:
        place = QueuedEvent(position=admission.position, eta_s=admission.eta_s)
        yield queued_event(job_id, place)
    async with contextlib.aclosing(state.streams.follow(job_id, after=after)) as followed:
        async for one in followed:
            if isinstance(one, Chunk):
                if watch is not None:
                    watch.note(one)
                yield event(describe_chunk(one, model), name="token", id=one.cursor)
            elif isinstance(one, QueuedEvent):
                if place is None or one.position != place.position:
                    place = one
                    yield queued_event(job_id, one)
            else:
                if watch is not None:
                    state.note_end(one.record, watch)
                failure = failure_of(one.record)
                yield event(describe(one.record, model), name="done") if failure is None else error_event(failure)


def queued_event(job_id: str, place: QueuedEvent) -> bytes:
    return event({"id": job_id, "position": place.position, "eta_s": place.eta_s}, name="queued")
