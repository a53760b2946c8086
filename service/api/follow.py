"""Waiting for a job's end or following its tokens, for as long as its client is there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from service.api.admission import Accepted
from service.api.event_stream import ClientGone, unless_gone
from service.api.state import ApiState
from service.errors import NotReady
from service.queue.job import Chunk, Ended, JobRecord, QueuedEvent

log = logging.getLogger("service.api")

Event = QueuedEvent | Chunk | Ended

NOBODY = 499
"""Status of answers that nobody is there to read; it only stands in metrics and logs."""


async def wait_for(request: Request, state: ApiState, jobs: Sequence[Accepted]) -> list[JobRecord] | Response:
    """Return the jobs once all ended; a response for nobody when the client left before, its jobs cancelled."""

    async def wait_for_all() -> list[JobRecord]:
        return list(await asyncio.gather(*(wait_for_one(state, job) for job in jobs)))

    try:
        records = await unless_gone(request.receive, wait_for_all())
    except ClientGone:
        state.metrics.disconnects.inc()
        await cancel(state, jobs)
        return Response(status_code=NOBODY)
    for job, record in zip(jobs, records, strict=True):
        state.note_end(record, job.watch)
    return records


async def wait_for_one(state: ApiState, job: Accepted) -> JobRecord:
    record = await state.streams.wait(job.id)
    job.watch.note_whole(record)
    return record


async def cancel(state: ApiState, jobs: Sequence[Accepted]) -> None:
    """Cancel the jobs of a client that went away, as far as they were only for it."""
    for job in jobs:
        if not job.outlives_its_client:
            with contextlib.suppress(NotReady):  # nobody says "still listening" any more, so the queue will
                await state.queue.cancel(job.id)


async def follow_all(state: ApiState, jobs: Sequence[Accepted]) -> AsyncGenerator[tuple[int, Event]]:
    """Yield (place of the job, event) of several jobs as they come, each until its end."""
    arrived: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue(maxsize=len(jobs))

    async def pump(place: int, job: Accepted) -> None:
        try:
            async with contextlib.aclosing(state.streams.follow(job.id)) as events:
                async for event in events:
                    await arrived.put((place, event))
        except Exception as error:
            await arrived.put((place, error))

    tasks = [asyncio.create_task(pump(place, job)) for place, job in enumerate(jobs)]
    open_jobs = len(jobs)
    try:
        while open_jobs:
            place, event = await arrived.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Chunk):
                jobs[place].watch.note(event)
            elif isinstance(event, Ended):
                open_jobs -= 1
                state.note_end(event.record, jobs[place].watch)
            yield place, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
