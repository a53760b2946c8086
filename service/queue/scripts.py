"""The Lua scripts, one per change of state: Redis runs each whole or not at all.

A script's first lines say what it is made of: `-- flags:` (of Redis 7's `#!lua` line) and `-- needs:` (other files,
in order). Key names come from `keys.py`, the clock from `clock.lua`. redis-py sends only a script's hash and loads
the text when a restarted server does not know it. Only `admit` is refused when Redis is out of memory; what ends
running work stays allowed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import redis
import redis.asyncio

from service.queue import keys
from service.queue.connection import answer_in_time, redis_errors_as_not_ready

DIRECTORY = Path(__file__).parent / "lua"
NAMES = (
    "admit",
    "announce",
    "append",
    "audit",
    "cancel",
    "finish",
    "heartbeat",
    "next",
    "peek",
    "read",
    "reap",
    "release",
    "touch",
)


@functools.cache
def source(name: str) -> str:
    """Return the whole text of a script as the server gets it."""
    body = (DIRECTORY / f"{name}.lua").read_text(encoding="utf-8")
    header = {"flags": "", "needs": ""}
    for line in body.splitlines():
        label, colon, value = line.removeprefix("-- ").partition(":")
        if not line.startswith("-- ") or not colon or label not in header:
            break
        header[label] = value
    parts = ["clock", *header["needs"].split()]
    texts = [(DIRECTORY / f"{part}.lua").read_text(encoding="utf-8") for part in parts]
    flags = f" flags={','.join(header['flags'].split())}" if header["flags"].split() else ""
    return "\n".join([f"#!lua{flags}", keys.lua_names(), *texts, body])


class AsyncScripts:
    """The scripts on an asyncio client: `await scripts.run("admit", ...)`."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._scripts = {name: client.register_script(source(name)) for name in NAMES}

    async def run(self, name: str, *arguments: str | int | float) -> Any:
        """Return the script's answer; `NotReady` when Redis has none in time."""
        async with answer_in_time():
            return await self._scripts[name](keys=[keys.ROUTE], args=arguments)


class BlockingScripts:
    """The scripts on a blocking client."""

    def __init__(self, client: redis.Redis) -> None:
        self._scripts = {name: client.register_script(source(name)) for name in NAMES}

    def run(self, name: str, *arguments: str | int | float) -> Any:
        """Return the script's answer; `NotReady` when Redis has none in time."""
        with redis_errors_as_not_ready():
            return self._scripts[name](keys=[keys.ROUTE], args=arguments)
