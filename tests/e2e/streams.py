"""A client that follows one completion through whatever happens, and notes what it was told and when."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from tests.e2e.client import Connection, ConnectionLost, Event

RECONNECT_S = 0.05
PATIENCE_S = 120.0

Urls = Callable[[], Sequence[str]]
"""Which API processes may be asked now."""


@dataclass
class Told:
    """What one client was told of one completion."""

    job_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    """When each event with tokens came, after the request was sent; of a monotonic clock."""
    sent_s: float = 0.0
    done: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    num_connections: int = 0
    faults: list[str] = field(default_factory=list)
    """Tokens missing or repeated: an index that is not the one behind the last."""
    cursor: str = ""
    lost_s: float = 0.0
    """When the worker that held it was last harmed; the token with index `resumes_at` is the first of the next one."""
    resumes_at: int = 0
    pauses_s: list[float] = field(default_factory=list)
    """From such harm to the next worker's first token."""

    @property
    def longest_pause_s(self) -> float:
        return max((later - earlier for earlier, later in pairwise(self.times_s)), default=0.0)

    def hear(self, event: Event) -> None:
        """Note an event."""
        self.cursor = event.id or self.cursor
        if event.name == "queued":
            self.job_id = event.data["id"]
        elif event.name == "token":
            if event.data["index"] != len(self.token_ids):
                self.faults.append(f"index {event.data['index']} behind {len(self.token_ids)} tokens")
            self.token_ids += event.data["token_ids"]
            self.text += event.data["text"]
            self.times_s.append(time.monotonic())
            if self.lost_s and len(self.token_ids) > self.resumes_at:
                self.pauses_s.append(self.times_s[-1] - self.lost_s)
                self.lost_s = 0.0
        elif event.name == "done":
            self.done = event.data
        elif event.name == "error":
            self.error = event.data["error"]

    def differs_from(self, undisturbed: Told) -> str | None:
        """Say in one sentence how this is not the same completion; None if it is."""
        if self.faults:
            return self.faults[0]
        if self.error is not None or self.done is None:
            return f"it failed: {self.error}"
        assert undisturbed.done is not None
        if self.done["finish_reason"] != undisturbed.done["finish_reason"]:
            ids = undisturbed.done["token_ids"]
            so_far = "right" if self.done["token_ids"] == ids[: len(self.done["token_ids"])] else "wrong"
            return f"{self.done['finish_reason']} after {len(self.done['token_ids'])} {so_far} tokens"
        for what in ("token_ids", "text"):
            if self.done[what] != undisturbed.done[what]:
                return f"{what} of the answer differ"
        if self.token_ids != undisturbed.token_ids or self.text != undisturbed.text:
            return "what was streamed is not what was answered"
        return None


async def follow(
    urls: Urls, body: dict[str, Any], *, told: Told | None = None, headers: Mapping[str, str] = MappingProxyType({})
) -> Told:
    """Ask for a completion as a stream; when the connection breaks, go on at another API process."""
    told = told or Told()
    told.sent_s = time.monotonic()
    while told.done is None and told.error is None:
        assert time.monotonic() - told.sent_s < PATIENCE_S, f"{told.job_id} is not done after {PATIENCE_S:g} s"
        try:
            async with Connection(random.choice(urls())) as connection:
                told.num_connections += 1
                if not told.job_id:
                    status = await connection.begin("POST", "/generate", body | {"stream": True}, **headers)
                    told.job_id = connection.headers.get("x-job-id", "")
                else:
                    status = await connection.begin(
                        "GET", f"/jobs/{told.job_id}/events", last_event_id=told.cursor or "0", **headers
                    )
                if status != 200:
                    if status == 503:  # an API process that has just started, or Redis is away
                        await asyncio.sleep(RECONNECT_S)
                        continue
                    told.error = {"status": status, "headers": connection.headers}
                    break
                async for event in connection.events():
                    told.hear(event)
        except ConnectionLost:
            await asyncio.sleep(RECONNECT_S)
    return told


def bodies(count: int, *, num_tokens: int) -> list[dict[str, Any]]:
    """Different requests, half of them greedy, half sampled, each with the seed that makes it the same every time."""
    draw = random.Random(count)
    prompts = ("First Citizen:", "def add(", "日本", "Question: 12 + 30 = ?\nAnswer:", "She sells")
    return [
        {
            "prompt": draw.choice(prompts) + "!" * draw.randrange(4),
            "max_new_tokens": num_tokens,
            "temperature": 0.0 if number % 2 else draw.choice([0.7, 1.0, 1.3]),
            "top_p": draw.choice([0.9, 0.95, 1.0]),
            "repetition_penalty": draw.choice([1.0, 1.2]),
            "frequency_penalty": 0.2,
            "seed": draw.randrange(2**53),
        }
        for number in range(count)
    ]
