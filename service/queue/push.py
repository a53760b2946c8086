"""One pub/sub connection for all streams of an API process: it carries chunks at once, and may lose any of them.

Nothing here is the truth; `streams.py` reads the token streams and uses what arrives here to be quick. So the only
duties are: say when a subscription is in force, never block Redis or grow without bound for a slow reader, and come
back after an outage.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
import redis.exceptions

from service.queue.connection import CONNECT_TIMEOUT_S

logger = logging.getLogger(__name__)

LOOK = ""
"""Not published by anybody: something may have been, before this channel's subscription was in force."""
MAX_UNREAD = 64
"""A reader this many messages behind reads the stream instead."""
SILENCE_S = 5.0
"""After this long without a message the connection is asked for a sign of life."""
RECONNECT_S = (0.05, 1.0)

OUTAGES = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)


async def end_task(task: asyncio.Task[None] | None) -> None:
    """Cancel until it is over: in Python 3.11 `wait_for` (also inside libraries) can swallow one cancellation."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.2)


class Inbox:
    """Messages of one channel for one reader; the oldest give way, which the reader sees as a gap."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self._messages: deque[str] = deque(maxlen=MAX_UNREAD)
        self._arrived = asyncio.Event()

    def put(self, message: str) -> None:
        self._messages.append(message)
        self._arrived.set()

    async def get(self, timeout_s: float) -> str | None:
        """Return the next message; None after `timeout_s` without one."""
        if not self._messages:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        return self._messages.popleft()


class PushConnection:
    """Subscriptions of one event loop. Only its own two tasks touch the socket, so a cancelled reader harms nobody."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._pool = client.connection_pool
        self._inboxes: dict[str, list[Inbox]] = {}
        self._confirmed: dict[str, asyncio.Event] = {}
        self._sent: set[str] = set()
        self._missed: set[str] = set()  # channels whose readers go on without a subscription in force
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def listen(self, channel: str, *, timeout_s: float) -> AsyncIterator[Inbox]:
        """Yield an inbox once the subscription is in force, or after `timeout_s` without that certainty."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="push-connection")
        inbox = Inbox(channel)
        self._inboxes.setdefault(channel, []).append(inbox)
        confirmed = self._confirmed.setdefault(channel, asyncio.Event())
        self._changed.set()
        try:
            if not confirmed.is_set():
                try:
                    async with asyncio.timeout(timeout_s):
                        await confirmed.wait()
                except TimeoutError:
                    self._missed.add(channel)
            yield inbox
        finally:
            self._inboxes[channel].remove(inbox)
            if not self._inboxes[channel]:
                del self._inboxes[channel]
                self._changed.set()

    async def aclose(self) -> None:
        """Drop the connection; readers that are left go on by polling."""
        task, self._task = self._task, None
        await end_task(task)

    async def _run(self) -> None:
        pause_s = RECONNECT_S[0]
        while True:
            connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            writer: asyncio.Task[None] | None = None
            try:
                async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
                    await connection.connect()
                self._missed |= self._sent
                self._sent = set()
                self._changed.set()
                writer = asyncio.create_task(self._write(connection), name="push-subscriptions")
                pause_s = RECONNECT_S[0]
                await self._read(connection, writer)
            except (*OUTAGES, TimeoutError) as error:
                logger.warning("Lost the push connection to Redis (%s); streams poll until it is back.", error)
            finally:
                await connection.disconnect(nowait=True)
                await end_task(writer)
                for confirmed in self._confirmed.values():
                    confirmed.clear()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_S[1])

    async def _write(self, connection: Any) -> None:
        """Bring the server's subscriptions in line with the inboxes, all changes of one moment in one command."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = set(self._inboxes)
            self._missed &= wanted
            gone, new = self._sent - wanted, wanted - self._sent
            self._sent = wanted
            for channel in self._confirmed.keys() - wanted:
                del self._confirmed[channel]
            if gone:
                await connection.send_command("UNSUBSCRIBE", *gone, check_health=False)
            if new:
                await connection.send_command("SUBSCRIBE", *new, check_health=False)

    async def _read(self, connection: Any, writer: asyncio.Task[None]) -> None:
        silent = False
        while True:
            message = await connection.read_response(timeout=SILENCE_S, disconnect_on_error=False)
            if writer.done():
                writer.result()
            if message is None:
                if silent:
                    raise redis.exceptions.TimeoutError("no answer to PING")
                silent = True
                await connection.send_command("PING", check_health=False)
                continue
            silent = False
            kind, channel, content = message if len(message) == 3 else (message[0], "", "")
            if kind == "message":
                for inbox in self._inboxes.get(channel, ()):
                    inbox.put(content)
            elif kind == "subscribe" and channel in self._confirmed:
                self._confirmed[channel].set()
                for inbox in self._inboxes.get(channel, ()) if channel in self._missed else ():
                    inbox.put(LOOK)
                self._missed.discard(channel)
