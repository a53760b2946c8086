"""Follow a job's tokens from any index, in any API process, through restarts of everything behind it.

The token stream in Redis is the truth; pushed chunks only make it quick. A reader holds one number, its cursor:
what is behind it is skipped, what lies ahead of it is read from the stream. So no token is lost, repeated or changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, Final

import redis.asyncio

from service.errors import NotFound, NotReady
from service.queue import keys
from service.queue.job import Chunk, Ended, JobRecord, JobState, QueuedEvent
from service.queue.job_queue import JobQueue
from service.queue.push import LOOK, Inbox, PushConnection, end_task
from service.queue.records import read_chunks, read_place, read_push, read_record
from service.queue.scripts import AsyncScripts

POLL_QUEUED_S: Final = 1.0
"""Queue positions are as old as this at most."""
POLL_S: Final = 5.0
"""A reader that was told nothing for this long looks for itself; that of a lost connection is told when it is back."""
SUBSCRIBE_S: Final = 0.5
OUTAGE_PATIENCE_S: Final = 30.0
"""A stream outlives Redis being away for this long."""
OUTAGE_POLL_S: Final = 0.1
END_MESSAGE: Final = "end"
BEHIND_ALL: Final = 2**40
"""A cursor behind any token."""


class TokenStreams:
    """All streams of one API process: one push connection, one task that says "still listening"."""

    def __init__(self, client: redis.asyncio.Redis, *, queue: JobQueue | None = None) -> None:
        """`queue` admits again what Redis lost of the jobs it admitted."""
        self._queue = queue
        self._scripts = AsyncScripts(client)
        self._push = PushConnection(client)
        self._watched: Counter[str] = Counter()
        self._watcher: asyncio.Task[None] | None = None

    async def follow(
        self, job_id: str, *, after: int = 0, watch: bool = True
    ) -> AsyncGenerator[QueuedEvent | Chunk | Ended]:
        """Yield queue positions as they change, chunks behind cursor `after`, and last the ended job.

        `after` is the cursor of the last chunk a client has (`Chunk.cursor`, the SSE id). An index inside a chunk
        gets that whole chunk. While `watch` is set and this iterator is open, a job that is cancelled on disconnect
        stays alive. Raises `NotFound` for an unknown job, `NotReady` when Redis stays away for 30 s.
        """
        cursor: int = after
        num_characters: int | None = None
        place: QueuedEvent | None = None
        async with self._listening(job_id, keys.PUSH, watch) as inbox:
            while True:
                state, standing, entries = await self._peek(job_id, cursor)
                for offset, chunk in read_chunks(entries):
                    if chunk.cursor > cursor:
                        yield _behind(cursor, num_characters, chunk, offset)
                        cursor, num_characters = chunk.cursor, offset + len(chunk.text)
                if JobState(state).is_final:
                    yield Ended(record=self._ended(job_id, standing, entries))
                    return
                if state == JobState.QUEUED:
                    position, eta_s = read_place(standing)
                    if place is None or place.position != position:
                        place = QueuedEvent(position=position, eta_s=eta_s)
                        yield place
                patience_s = POLL_QUEUED_S if state == JobState.QUEUED else POLL_S
                while (message := await inbox.get(patience_s)) not in (None, LOOK, END_MESSAGE):
                    assert message is not None
                    offset, chunk = read_push(message)
                    if chunk.cursor <= cursor:
                        continue
                    if chunk.first_index > cursor:
                        break  # something in between was not pushed to us: read it
                    yield _behind(cursor, num_characters, chunk, offset)
                    cursor, num_characters = chunk.cursor, offset + len(chunk.text)

    async def wait(self, job_id: str, *, watch: bool = True) -> JobRecord:
        """Return the job once it ended; raises as `follow`.

        Whoever wants the whole answer hears of its end alone, so waiting costs the same however long the answer is.
        """
        async with self._listening(job_id, keys.END, watch) as inbox:
            while True:
                state, fields, entries = await self._peek(job_id, BEHIND_ALL)
                if JobState(state).is_final:
                    return self._ended(job_id, fields, entries)
                await inbox.get(POLL_S)

    async def aclose(self) -> None:
        """Stop the background tasks."""
        watcher, self._watcher = self._watcher, None
        await end_task(watcher)
        await self._push.aclose()

    async def _peek(self, job_id: str, cursor: int) -> tuple[str, Any, Any]:
        give_up_at = time.monotonic() + OUTAGE_PATIENCE_S
        while True:
            try:
                reply = await self._scripts.run("peek", job_id, cursor)
                if not reply and self._queue is not None and await self._queue.restore(job_id):
                    continue
            except NotReady:
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(OUTAGE_POLL_S)
                continue
            if not reply:
                raise NotFound(f"There is no job {job_id!r}, or its result was kept long enough and is gone.")
            state, standing, entries = reply
            return state, standing, entries

    def _ended(self, job_id: str, fields: Any, entries: Any) -> JobRecord:
        record = read_record(job_id, (fields, (), entries))
        assert record is not None
        if self._queue is not None:
            self._queue.forget(job_id)
        return record

    @contextlib.asynccontextmanager
    async def _listening(self, job_id: str, channel: str, watch: bool) -> AsyncIterator[Inbox]:
        """Yield what is pushed about a job; as one of its listeners, while `watch` is set."""
        with self._watching(job_id, watch):
            if watch and not (self._queue is not None and self._queue.admitted(job_id)):
                # Its first listener may be gone with its process: time until the job counts as nobody's runs on.
                with contextlib.suppress(NotReady):
                    await self._scripts.run("touch", keys.WATCH_MS, job_id)
            async with self._push.listen(channel + job_id, timeout_s=SUBSCRIBE_S) as inbox:
                yield inbox

    @contextlib.contextmanager
    def _watching(self, job_id: str, watch: bool) -> Iterator[None]:
        if not watch:
            yield
            return
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._keep_watching(), name="stream-watcher")
        self._watched[job_id] += 1
        try:
            yield
        finally:
            self._watched[job_id] -= 1
            if not self._watched[job_id]:
                del self._watched[job_id]

    async def _keep_watching(self) -> None:
        """Tell Redis, for all streams at once, that their listeners are there."""
        while True:
            await asyncio.sleep(keys.WATCH_MS / 1000 / 4)
            if self._watched:
                with contextlib.suppress(NotReady):
                    await self._scripts.run("touch", keys.WATCH_MS, *self._watched)


def _behind(cursor: int, num_characters: int | None, chunk: Chunk, offset: int) -> Chunk:
    """Return the part of a chunk that a reader at `cursor` has not seen.

    Chunks overlap a cursor only after Redis lost its last second and a worker cut the same tokens differently: the
    text of a token is a pure function of the tokens before it, so counting characters finds the place.
    """
    seen = cursor - chunk.first_index
    if seen <= 0 or num_characters is None or not chunk.token_ids:
        return chunk
    return replace(
        chunk,
        first_index=cursor,
        token_ids=chunk.token_ids[seen:],
        text=chunk.text[max(0, num_characters - offset) :],
        logprobs=chunk.logprobs[seen:] if chunk.logprobs is not None else None,
        prompt_scores=None,
    )
