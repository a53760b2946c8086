"""Waiting for a job's end or following its tokens, for as long as its client is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from service.api.admission import Accepted
from service.api.answer import cut_short
from service.api.event_stream import ClientGone, end_tasks, unless_gone
from service.api.state import ApiState
from service.errors import NotReady, RequestError
from service.queue.job import Chunk, Ended, JobRecord, QueuedEvent

Event = QueuedEvent | Chunk | Ended

NOBODY = 499
"""Status of answers that nobody is there to read; it only stands in metrics and logs."""


async def wait_for(
    request: Request,
    state: ApiState,
    jobs: Sequence[Accepted],
    *,
    failure_of: Callable[[JobRecord], RequestError | None],
    refuse: Callable[[RequestError], Response],
) -> list[JobRecord] | Response:
    """Return the jobs once all ended, or what to answer instead; the rest of them is cancelled then.

    Instead means: `refuse` of the first that `failure_of` says failed, or a response for nobody when the client left
    before. Raises as `TokenStreams.wait`, and cancels the rest then too.
    """
    waiting = {job.id: job for job in jobs}

    async def wait_for_one(job: Accepted) -> JobRecord:
        record = await state.streams.wait(job.id)
        del waiting[job.id]
        job.watch.note_whole(record)
        state.note_end(record, job.watch)
        return record

    async def wait_for_all() -> list[JobRecord] | Response:
        tasks = [asyncio.create_task(wait_for_one(job)) for job in jobs]
        try:
            for ended in asyncio.as_completed(tasks):
                failure = failure_of(await ended)
                if failure is not None:
                    return refuse(failure)
            return [task.result() for task in tasks]
        finally:
            await end_tasks(*tasks)

    try:
        answer = await unless_gone(request.receive, wait_for_all())
    except ClientGone:
        state.metrics.disconnects.inc()
        answer = Response(status_code=NOBODY)
    except Exception:
        await cancel(state, waiting.values())
        raise
    if waiting:
        await cancel(state, waiting.values())
    return answer


async def cancel(state: ApiState, jobs: Iterable[Accepted]) -> None:
    """Cancel jobs that their client does not wait for any more, as far as they were only for it."""
    with contextlib.suppress(NotReady):  # nobody says "still listening" any more, so the queue will
        for job in jobs:
            if not job.outlives_its_client:
                await state.queue.cancel(job.id)


async def follow_all(state: ApiState, jobs: Sequence[Accepted]) -> AsyncGenerator[tuple[int, Event]]:
    """Yield (place of the job, event) of several jobs as they come, each until its end.

    Raises what a job was cut short by, and as `TokenStreams.follow`; the rest of the jobs is cancelled then.
    """
    arrived: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue(maxsize=len(jobs))

    async def pump(place: int, job: Accepted) -> None:
        try:
            async with contextlib.aclosing(state.streams.follow(job.id)) as events:
                async for event in events:
                    await arrived.put((place, event))
        except Exception as error:
            await arrived.put((place, error))

    tasks = [asyncio.create_task(pump(place, job)) for place, job in enumerate(jobs)]
    running = dict(enumerate(jobs))
    try:
        while running:
            place, event = await arrived.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Chunk):
                jobs[place].watch.note(event)
            elif isinstance(event, Ended):
                del running[place]
                state.note_end(event.record, jobs[place].watch)
                failure = cut_short(event.record)
                if failure is not None:
                    raise failure
            yield place, event
    except Exception:
        await cancel(state, running.values())
        raise
    finally:
        await end_tasks(*tasks)
