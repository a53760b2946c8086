"""Clients that hang up in every part of a job's life, and what they leave behind. Part of `benchmarks.leaving`.

A client means to leave in one part of the life, drawn at random: it watches its job in Redis, as no client can, until
the job is there, waits a moment and hangs up. Where the job then really was its own record says: each is found by the
trace id that its request carried.
"""

from __future__ import annotations

import asyncio
import random
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import psutil
import redis.asyncio

from service.queue import keys
from service.queue.connection import async_redis
from tests.e2e.client import Connection, ConnectionLost
from tests.e2e.cluster import Cluster, get

CLIENTS: Final = 96
"""Three times the slots, so that most of them queue."""
LOOK_EVERY_S: Final = 0.015
SWEEP_EVERY_S: Final = 1.5
"""How often job hashes are looked through for those that ended between two looks; they are kept for 5 s."""
MOMENT_S: Final = 0.02
"""A client leaves within so much of the moment it waited for."""
PHASES: Final = {"on the way": 2, "queued": 4, "prefill": 4, "first token": 2, "in the middle": 6, "the end": 3}
"""Where clients mean to leave, and how often."""
PLACES: Final = (
    *("before admission", "queued", "prefill", "after 1 to 9 tokens", "after 10 to 99 tokens", "after 100 or more"),
    *("ended, not all read", "ended, all read"),
)
WORDS: Final = ("First", "Citizen", "Before", "we", "proceed", "any", "further", "hear", "me", "speak")
FIELDS: Final = ("state", "n", "started", "trace")


@dataclass
class Job:
    """What Redis said of a job when last looked at."""

    state: str
    num_tokens: int
    has_started: bool

    def place(self, all_read: bool) -> str:
        """Where in its life the client left it."""
        if self.state == "succeeded":
            return "ended, all read" if all_read else "ended, not all read"
        assert self.state == "cancelled", self
        if not self.has_started:
            return "queued"
        if not self.num_tokens:
            return "prefill"
        return next(
            name
            for name, most in (("after 1 to 9 tokens", 9), ("after 10 to 99 tokens", 99), ("after 100 or more", 2**31))
            if self.num_tokens <= most
        )


@dataclass
class Lookout:
    """All jobs that live, by trace id, some times a second; and how those that ended ended."""

    client: redis.asyncio.Redis
    jobs: dict[str, Job] = field(default_factory=dict)
    looked: asyncio.Event = field(default_factory=asyncio.Event)
    live: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    """Ids of jobs whose end was noted."""

    async def run(self) -> None:
        swept_at = time.monotonic()
        while True:
            ids: Any = await self.client.zrange(keys.DEADLINES, 0, -1)
            await self.read(self.live | set(ids))
            self.live = set(ids)
            if time.monotonic() - swept_at > SWEEP_EVERY_S:
                swept_at = time.monotonic()
                await self.sweep()
            self.looked.set()
            self.looked = asyncio.Event()
            await asyncio.sleep(LOOK_EVERY_S)

    async def sweep(self) -> None:
        """Read the jobs that came and went between two looks."""
        found = {name.removeprefix(keys.JOB) async for name in self.client.scan_iter(f"{keys.JOB}*", count=1_000)}
        self.ended &= found
        await self.read(found - self.ended)

    async def read(self, ids: set[str]) -> None:
        pipeline = self.client.pipeline(transaction=False)
        ordered = sorted(ids)
        for job_id in ordered:
            pipeline.hmget(keys.JOB + job_id, list(FIELDS))
        for job_id, (state, num_tokens, started, trace) in zip(ordered, await pipeline.execute(), strict=True):
            if state is not None:
                self.jobs[trace.split("-")[1]] = Job(state, int(num_tokens), started is not None)
                if state not in ("queued", "running"):
                    self.ended.add(job_id)


@dataclass(frozen=True)
class Left:
    """One client's leave."""

    trace: str
    is_stream: bool
    all_read: bool


async def leave(url: str, lookout: Lookout, phase: str, draw: random.Random) -> Left:
    """Ask, wait until the job is in that part of its life, hang up."""
    trace, is_stream = f"{draw.getrandbits(128) | 1:032x}", draw.random() < 0.5
    max_new_tokens = draw.choice((1, 2, 20)) if phase == "the end" else draw.choice((50, 150, 400))
    least = {"first token": 1, "the end": max_new_tokens - 1}.get(
        phase, draw.choice((2, 5, 20, 49, max_new_tokens // 2))
    )
    num_words = 400 if phase == "prefill" else draw.randint(1, 30)
    body = {
        "prompt": " ".join([trace[:8], *draw.choices(WORDS, k=num_words)]),  # no two begin alike: nothing is copied
        "max_new_tokens": max_new_tokens,
        "stream": is_stream,
        "temperature": 1,
    }

    def is_time() -> bool:
        job = lookout.jobs.get(trace)
        if phase == "on the way" or connection.complete:
            return True
        if job is None:
            return False
        if phase == "queued" or job.state not in ("queued", "running"):
            return True
        return job.has_started if phase == "prefill" else job.num_tokens >= least

    async with Connection(url) as connection:
        connection.send("POST", "/generate", body, traceparent=f"00-{trace}-{1:016x}-01")
        while not is_time():
            await lookout.looked.wait()
        await asyncio.sleep(draw.uniform(0, MOMENT_S / 4 if phase == "on the way" else MOMENT_S))
        return Left(trace, is_stream, connection.complete)


async def hang_up(url: str, lookout: Lookout, count: int, seed: int) -> list[Left]:
    """Let `count` clients leave, `CLIENTS` at a time."""
    left: list[Left] = []
    pending = iter(range(count))

    async def client() -> None:
        for number in pending:
            draw = random.Random(f"{seed} {number}")
            [phase] = draw.choices(list(PHASES), list(PHASES.values()))
            try:
                left.append(await leave(url, lookout, phase, draw))
            except ConnectionLost:  # a listener's queue that was full for a moment
                await asyncio.sleep(0.05)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return left


def count_places(left: list[Left], jobs: dict[str, Job]) -> dict[str, Counter[str]]:
    """Clients by where they left their job, blocking ones and streams."""
    places: dict[str, Counter[str]] = {"blocking": Counter(), "stream": Counter()}
    for one in left:
        job = jobs.get(one.trace)
        place = "before admission" if job is None else job.place(one.all_read)
        places["stream" if one.is_stream else "blocking"][place] += 1
    return places


async def settle(cluster: Cluster, lookout: Lookout, num_keys: int | None) -> tuple[int, float]:
    """Return Redis' keys and memory in MiB once all is over and forgotten, what cancelled workers' jobs too (60 s)."""
    give_up_at = time.monotonic() + 90
    while any(cluster.counts().values()) or size_of(cluster) > (num_keys or 2**31) or has_jobs(cluster):
        assert time.monotonic() < give_up_at, (cluster.counts(), size_of(cluster), num_keys)
        await asyncio.sleep(0.1)
    await lookout.sweep()
    info: Any = cluster.client.info("memory")
    return size_of(cluster), int(info["used_memory"]) / 2**20


def size_of(cluster: Cluster) -> int:
    size: Any = cluster.client.dbsize()
    return int(size)


def has_jobs(cluster: Cluster) -> bool:
    """Whether any job, or the list of those cancelled, is still remembered."""
    return any(True for _ in cluster.client.scan_iter(f"{keys.JOB}*")) or bool(cluster.client.exists(keys.CANCELLED))


def gauges(cluster: Cluster, *names: str) -> dict[str, float]:
    """Sums of a worker's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.settings['worker_metrics_port']}/metrics") as page:
        lines = page.read().decode().splitlines()
    return {name: sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")) for name in names}


async def disconnects(cluster: Cluster, count: int) -> bool:
    """Let `count` clients leave; whether nothing of them is left behind."""
    [url] = cluster.apis
    processes = {"api": cluster.apis[url], "worker": cluster.workers[0]}

    def memory() -> dict[str, float]:
        return {name: psutil.Process(one.pid).memory_info().rss / 2**20 for name, one in processes.items()}

    client = async_redis(cluster.redis.url)
    lookout = Lookout(client)
    looking = asyncio.create_task(lookout.run())
    try:
        await hang_up(url, lookout, max(CLIENTS, count // 10), seed=0)  # what a process needs once does not count
        num_keys, redis_mib = await settle(cluster, lookout, None)
        rss = memory()
        started_s = time.monotonic()
        left = await hang_up(url, lookout, count, seed=1)
        took_s = time.monotonic() - started_s
        await lookout.sweep()
        num_keys_after, redis_mib_after = await settle(cluster, lookout, num_keys)
        rss_after = memory()
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await client.aclose()
    places = count_places(left, lookout.jobs)
    free = get(url, "/health")[1]["workers"][0]["free"]
    busy = gauges(cluster, "worker_running_sequences", "worker_waiting_sequences", "worker_cached_tokens")
    print(f"  {len(left)} clients left in {took_s:.0f} s\n  {'':24}{'blocking':>9}{'stream':>8}")
    for place in PLACES:
        print(f"  {place:24}{places['blocking'][place]:>9,}{places['stream'][place]:>8,}")
    print(f"  jobs counted {cluster.counts()}; slots free {free} of {cluster.settings['num_slots']}; worker {busy}")
    print(f"  Redis: keys {num_keys} -> {num_keys_after}, memory {redis_mib:.2f} -> {redis_mib_after:.2f} MiB")
    print(
        "  resident: " + ", ".join(f"{name} {rss[name]:.0f} -> {rss_after[name]:.0f} MiB" for name in rss), flush=True
    )
    return bool(
        len(left) == count
        and not any(busy.values())
        and free == cluster.settings["num_slots"]
        and num_keys_after <= num_keys
        and redis_mib_after < redis_mib + 0.5
    )
