"""/jobs: look at a job, follow it from any index, cancel it. Any API process can, whoever admitted it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response, StreamingResponse

from service.api.answer import describe
from service.api.caller import CallerDep, identify, read_cursor
from service.api.documentation import errors, events
from service.api.errors import JsonResponse
from service.api.event_stream import EventStream
from service.api.generate import STREAM, stream_job
from service.api.schemas import GenerateAnswer
from service.api.state import state_of
from service.errors import NotFound
from service.queue.job import JobRecord

router = APIRouter(prefix="/jobs", tags=["jobs"], dependencies=[Depends(identify)])

JOB_ID = re.compile(r"[0-9a-f]{16,64}")
CURSOR_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "after",
        "in": "query",
        "required": False,
        "schema": {"type": "integer", "minimum": 0},
        "description": "the id of the last event seen; the header wins",
    },
    {"name": "Last-Event-ID", "in": "header", "required": False, "schema": {"type": "integer", "minimum": 0}},
]


async def find_job(request: Request, job_id: str, caller: CallerDep) -> JobRecord:
    """Return the job an address names.

    Raises:
        NotFound: there is none, its result was kept long enough, or it is another key's.
    """
    state = state_of(request)
    record = None
    if JOB_ID.fullmatch(job_id):
        state.redis.require()
        record = await state.queue.get(job_id)
    if record is None or (caller.key and record.key != caller.key):
        raise NotFound(
            f"There is no such job; results are kept for {state.settings.result_ttl_s} s.", code="job_not_found"
        )
    return record


JobDep = Annotated[JobRecord, Depends(find_job)]


@router.get(
    "/{job_id}",
    summary="Look at a job",
    responses={200: {"model": GenerateAnswer}, **errors(401, 404, 422, 503)},
)
async def read_job(request: Request, record: JobDep) -> Response:
    """What it is and what it has generated so far; while it is queued, its place."""
    return JsonResponse(describe(record, state_of(request).models.find(record.request.model)))


@router.delete(
    "/{job_id}",
    summary="Cancel a job",
    responses={200: {"model": GenerateAnswer}, **errors(401, 404, 422, 503)},
)
async def cancel_job(request: Request, record: JobDep) -> Response:
    """Ends a queued or running job and answers with what it has; a job that ended stays as it is."""
    state = state_of(request)
    ended = await state.queue.cancel(record.id)
    return JsonResponse(describe(ended or record, state.models.find(record.request.model)))


@router.get(
    "/{job_id}/events",
    summary="Follow a job",
    response_class=StreamingResponse,
    responses={200: events(STREAM), **errors(401, 404, 422, 503)},
    openapi_extra={"parameters": CURSOR_PARAMETERS},
)
async def follow_job(request: Request, record: JobDep) -> Response:
    """Its events from the beginning, or behind `Last-Event-ID` or `?after=`. Leaving does not cancel it; a job whose
    own client has gone too is cancelled after 15 s."""
    state = state_of(request)
    return EventStream(
        stream_job(state, record.id, state.models.find(record.request.model), after=read_cursor(request)),
        metrics=state.metrics,
        headers={"x-job-id": record.id},
    )
