"""Follow one completion from the request to its end, as something to show.

Views come at least twice a second, also while the job waits: whoever shows them can be stopped, and Gradio notices a
browser that went away. They come at most twenty times a second: a page that draws every token of a fast model by
itself takes the processor the model wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import gradio as gr

from frontend.client import ApiClient, ApiError, Done, Event, Piece, Queued, Started
from frontend.markup import NOT_KNOWN, facts, milliseconds, notice, short_revision

T = TypeVar("T")

IDLE_S = 0.5
GATHER_S = 0.05
STOP_PATIENCE_S = 5.0
MEASURED_S = 0.2
"""No speed is told from less: the first tokens come in one piece."""
SILENT_S = 2.0
"""After so long without a token somebody wonders what happens."""

ENDED = {
    "stop": "end of text",
    "length": "token limit",
    "cancelled": "stopped",
    "deadline": "out of time",
    "error": "error",
}


@dataclass(frozen=True)
class View:
    """What stands on the page at one moment."""

    text: str
    status: str
    """HTML: how it goes or how it ended, never more than a line or two, so that what stands below keeps its place."""
    details: str = ""
    """HTML: what else there is to know of it, and its warnings; known at the end."""
    seed: str | None = None
    """The seed that repeats this answer; known at the end."""


@dataclass
class Progress:
    """What is known of a completion so far."""

    limit: int | None
    """How many tokens were asked for."""
    sent_at: float = field(default_factory=time.monotonic)
    job_id: str | None = None
    position: int | None = None
    eta_s: float | None = None
    is_told_place: bool = False
    """The stream itself tells the place in the queue."""
    first_at: float | None = None
    newest_at: float | None = None
    num_tokens: int | None = 0
    text: str = ""
    answer: dict[str, Any] | None = None

    def take(self, event: Event) -> None:
        match event:
            case Started(job_id):
                self.job_id = job_id
            case Queued(position, eta_s):
                self.position, self.eta_s, self.is_told_place = position, eta_s, True
            case Piece(text, num_tokens):
                self.newest_at = time.monotonic()
                self.first_at = self.first_at or self.newest_at
                self.text += text
                known = self.num_tokens is not None and num_tokens is not None
                self.num_tokens = (self.num_tokens or 0) + (num_tokens or 0) if known else None
            case Done(answer):
                self.answer = answer
                self.text = answer["text"]

    def view(self) -> View:
        if self.answer is not None:
            return View(self.text, ending(self.answer), details(self.answer), str(self.answer["seed"]))
        if self.first_at is None or self.newest_at is None:
            return View(self.text, notice(self._waiting(), "busy"))
        silent_s = time.monotonic() - self.newest_at
        if silent_s > SILENT_S:
            sentence = f"No token for {silent_s:.0f} s: if its worker is gone, another one goes on from here."
            return View(self.text, notice(sentence, "busy"))
        numbers: list[tuple[str, ...]] = [("First token", milliseconds(1000 * (self.first_at - self.sent_at)))]
        if self.num_tokens is not None:
            seconds = time.monotonic() - self.first_at
            speed = (self.num_tokens - 1) / seconds if seconds > MEASURED_S else None
            most = f" of {self.limit:,}" if self.limit else ""
            numbers += [
                ("Speed", f"{speed:,.0f} tokens/s" if speed else NOT_KNOWN),
                ("Tokens", f"{self.num_tokens:,}{most}", "so far, of at most so many"),
            ]
        return View(self.text, facts(numbers))

    def _waiting(self) -> str:
        waited = f"{time.monotonic() - self.sent_at:.0f} s so far"
        if not self.position:
            return f"Waiting for the first token, {waited}."
        eta = f", about {self.eta_s:,.0f} s to go" if self.eta_s else ""
        return f"Place {self.position} in the queue{eta}, {waited}."


def ending(answer: Mapping[str, Any]) -> str:
    """Why it ended, how fast it came and how long it is: as many facts as while it was being written."""
    reason, usage, speed = answer["finish_reason"], answer["usage"], answer["timings"]["tokens_per_second"]
    ended = ENDED.get(reason, str(reason))
    if reason == "stop" and answer.get("stop_sequence"):
        ended = f"stop text {answer['stop_sequence']!r}"
    return facts(
        [
            ("Ended by", ended, f"job {answer['id']}"),
            ("Speed", f"{speed:,.1f} tokens/s" if speed else NOT_KNOWN),
            ("Tokens", f"{usage['prompt_tokens']:,} + {usage['completion_tokens']:,}", "prompt + completion"),
        ]
    )


def details(answer: Mapping[str, Any]) -> str:
    """What else is worth knowing, above all what repeats the answer; warnings below."""
    timings, attempts, revision = answer["timings"], answer["attempts"], short_revision(answer["revision"])
    first_token = f"{milliseconds(timings['queue_ms'])} in the queue, {milliseconds(timings['prefill_ms'])} prefill"
    numbers = facts(
        [
            ("First token", milliseconds(timings["ttft_ms"]), first_token),
            ("Queue", milliseconds(timings["queue_ms"])),
            ("Seed", str(answer["seed"])),
            ("Model", f"{answer['model']} @ {revision}" if revision else answer["model"], str(answer["revision"])),
        ]
    )
    lines = [*answer["warnings"]]
    if attempts > 1:
        lines.append(f"It outlived {attempts - 1} of its workers; another one went on where it stood.")
    return numbers + "".join(notice(line) for line in lines)


class Stops:
    """Which answers were asked to stop, by browser session and place on the page."""

    def __init__(self) -> None:
        self._events: dict[tuple[str | None, str], asyncio.Event] = {}

    def open(self, request: gr.Request, place: str) -> asyncio.Event:
        return self._events.setdefault((request.session_hash, place), asyncio.Event())

    def close(self, request: gr.Request, place: str) -> None:
        self._events.pop((request.session_hash, place), None)

    def stop(self, request: gr.Request, place: str) -> None:
        if event := self._events.get((request.session_hash, place)):
            event.set()


async def follow(
    client: ApiClient, events: AsyncGenerator[Event, None], stop: asyncio.Event, *, limit: Any = None
) -> AsyncGenerator[View, None]:
    """Stream views of one completion; `stop` cancels it in the service and still shows how it ended."""
    progress = Progress(limit if isinstance(limit, int) else None)
    stopped_at: float | None = None
    try:
        async with aclosing(in_batches(events)) as batches:
            yield progress.view()
            async for batch in batches:
                for event in batch:
                    progress.take(event)
                if not batch and progress.job_id and progress.first_at is None and not progress.is_told_place:
                    with contextlib.suppress(ApiError):  # the stream itself outlives a queue that is away for a moment
                        job = await client.job(progress.job_id)
                        progress.position, progress.eta_s = job.get("position"), job.get("eta_s")
                yield progress.view()
                if stop.is_set() and stopped_at is None:
                    stopped_at = time.monotonic()
                    if progress.job_id is None:
                        break  # leaving closes the connection, which cancels the job
                    await client.cancel(progress.job_id)
                if stopped_at is not None and time.monotonic() - stopped_at > STOP_PATIENCE_S:
                    break
    except ApiError as error:
        yield View(progress.text, notice(str(error), "bad"))
        return
    if progress.answer is None:
        yield View(progress.text, notice("Stopped."))


async def in_batches(events: AsyncGenerator[T, None]) -> AsyncGenerator[list[T], None]:
    """Pass events on together where they come fast, and an empty list now and then where none comes."""
    pending: list[T] = []
    news = asyncio.Event()

    async def read() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    pending.append(event)
                    news.set()
        finally:
            news.set()

    reader = asyncio.create_task(read())
    try:
        while True:
            if not reader.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), IDLE_S)
            news.clear()
            batch, pending[:] = pending[:], []
            if not batch and reader.done():
                await reader  # raises what ended it
                return
            yield batch
            if batch:
                await asyncio.sleep(GATHER_S)
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, ApiError):
            await reader
