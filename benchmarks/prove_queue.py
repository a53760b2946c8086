"""The long proof: streams under load lose, repeat and change no token, whatever is killed. `make prove-queue`.

    python -m benchmarks.prove_queue [workers apis zombies redis rolling] [--count N] [--results FILE]

    workers   SIGKILL of a random worker that holds streams, while others serve                        200 times
    apis      SIGKILL of a random API process; its clients go on at another with Last-Event-ID         100
    zombies   SIGSTOP of a worker for longer than its lease, then SIGCONT                               20
    redis     SIGKILL of Redis, and a start on the same append-only file                                20
    rolling   SIGTERM of every worker in turn, each after its successor serves                            5 rounds

Half of the requests are greedy, half sampled. Each is first answered undisturbed; then clients ask for them over and
over while the harm is done, and every answer, streamed and whole, must be the undisturbed one. `--results` keeps the
counts in a file, so that a proof can be made in pieces: it goes on until the file has the number wanted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from service.queue import keys
from tests.e2e.cluster import AnyProcess, Cluster
from tests.e2e.nursery import Nursery
from tests.e2e.streams import Told, bodies, follow
from tests.processes import PATIENCE_S

WANTED: Final = {"workers": 200, "apis": 100, "zombies": 20, "redis": 20, "rolling": 5}
NUM_WORKERS: Final = 5
NUM_APIS: Final = 3
NUM_STREAMS: Final = 12
NUM_TOKENS: Final = 200
PAUSE_LIMIT_S: Final = 6.0


@dataclass
class Part:
    """What one kind of harm did."""

    harms: int = 0
    streams: int = 0
    """That ended while the harm was being done."""
    hit: int = 0
    """Of them, those that lost a worker or a connection."""
    tokens: int = 0
    differing: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stops_all: bool = False
    """Every stream pauses, not only those that lost something of their own."""

    def hear(self, told: Told, expected: Told) -> None:
        self.streams += 1
        self.tokens += len(told.token_ids)
        attempts = int(told.done["attempts"]) if told.done else 1
        self.hit += attempts > 1 or told.num_connections > 1
        difference = told.differs_from(expected)
        if difference is not None:
            self.differing.append(f"{told.job_id}: {difference}")
            print(f"  DIFFERS {self.differing[-1]}", flush=True)
        self.pauses_s += told.pauses_s
        if not told.pauses_s and (told.num_connections > 1 or self.stops_all):
            self.pauses_s.append(told.longest_pause_s)

    def pause_s(self, share: float) -> float:
        return sorted(self.pauses_s)[min(len(self.pauses_s) - 1, int(share * len(self.pauses_s)))]


class Proof:
    """A cluster under a steady load of streams, and somebody who does harm."""

    def __init__(self, cluster: Cluster, part: Part) -> None:
        self.cluster = cluster
        self.part = part
        self.bodies = bodies(NUM_STREAMS, num_tokens=NUM_TOKENS)
        self.open: list[Told] = []
        self.is_over = False

    def urls(self) -> list[str]:
        return list(self.cluster.apis)

    async def run(self, harm: Callable[[Proof], Awaitable[None]], count: int, *, limit_s: float) -> None:
        """Do harm `count` times or for `limit_s`, under load."""
        for _ in range(NUM_WORKERS):
            self.cluster.start_worker()
        for _ in range(NUM_APIS):
            self.cluster.start_api()
        await asyncio.to_thread(self.cluster.wait_until_ready)
        self.expected = await asyncio.gather(*(follow(self.urls, body) for body in self.bodies))
        assert all(told.done and len(told.token_ids) == NUM_TOKENS for told in self.expected)
        started_s = time.monotonic()
        clients = [asyncio.create_task(self.ask_for_ever(place)) for place in range(NUM_STREAMS)]
        for number in range(count):
            if time.monotonic() - started_s > limit_s:
                break
            await harm(self)
            self.part.harms += 1
            if number % 10 == 9:
                print(f"  {self.part.harms:4} times, {self.part.streams:6} streams ended", flush=True)
        self.is_over = True
        await asyncio.gather(*clients)
        self.part.seconds += time.monotonic() - started_s

    async def ask_for_ever(self, place: int) -> None:
        while not self.is_over:
            told = Told()
            self.open.append(told)
            try:
                await follow(self.urls, self.bodies[place], told=told)
            finally:
                self.open.remove(told)
            self.part.hear(told, self.expected[place])

    async def until(self, holds: Callable[[], Any], what: str) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < give_up_at, f"waited {PATIENCE_S:g} s for {what}"
            await asyncio.sleep(0.05)

    async def victim(self, *, beside: int = 2) -> tuple[AnyProcess, list[Told]]:
        """A random worker whose streams all flow, and those, while at least `beside` others serve."""
        while True:
            serving = self.cluster.serving_workers()
            holders = {told.job_id: self.cluster.find_holder(told.job_id) for told in self.open if told.token_ids}
            waiting = [holders.get(told.job_id) for told in self.open if told.lost_s]
            found = [holder for holder in holders.values() if holder in serving and holder not in waiting]
            if len(serving) > beside and found:
                holder = random.choice(found)
                assert holder is not None
                return holder, [told for told in self.open if holders.get(told.job_id) is holder]
            await asyncio.sleep(0.1)

    def note_loss(self, held: list[Told]) -> None:
        """Their next token that is not in Redis yet is another worker's."""
        for told in held:
            told.lost_s = time.monotonic()
            told.resumes_at = int(self.cluster.client.hget(keys.JOB + told.job_id, "n") or 0)


async def kill_worker(proof: Proof) -> None:
    victim, held = await proof.victim()
    proof.cluster.kill_worker(victim)
    proof.note_loss(held)
    proof.cluster.start_worker()
    await asyncio.sleep(random.uniform(0.5, 2.5))


async def kill_api(proof: Proof) -> None:
    cluster = proof.cluster
    await proof.until(lambda: len(ready(cluster)) >= NUM_APIS - 1, "API processes")
    cluster.kill_api(random.choice(ready(cluster)))
    cluster.start_api()
    await asyncio.sleep(random.uniform(0.0, 1.0))


def ready(cluster: Cluster) -> list[str]:
    """API processes that said they listen."""
    return [url for url, process in cluster.apis.items() if "startup complete" in process.log.lower()]


async def freeze_worker(proof: Proof) -> None:
    """Until another has taken what it held; then it comes back and writes."""
    zombie, held = await proof.victim()
    zombie.pause()
    proof.note_loss(held)
    client = proof.cluster.client
    before = {one.job_id: client.hget(keys.JOB + one.job_id, "attempt") for one in held}
    await proof.until(
        lambda: all(client.hget(keys.JOB + job, "attempt") != attempt for job, attempt in before.items()), "its heirs"
    )
    zombie.go_on()
    await asyncio.sleep(1.0)


async def kill_redis(proof: Proof) -> None:
    proof.cluster.redis.stop(kill=True)
    await asyncio.sleep(random.uniform(0.0, 1.0))
    await asyncio.to_thread(proof.cluster.start_redis)
    await asyncio.sleep(random.uniform(2.0, 4.0))


async def roll(proof: Proof) -> None:
    cluster = proof.cluster
    for old in list(cluster.workers):
        new = cluster.start_worker()
        await proof.until(lambda new=new: new in cluster.serving_workers(), "the successor")  # type: ignore[misc]
        old.send(signal.SIGTERM)
        code = await asyncio.to_thread(old.wait, PATIENCE_S)
        assert code == 0, old.log
        cluster.workers.remove(old)


HARMS: Final[dict[str, Callable[[Proof], Awaitable[None]]]] = {
    "workers": kill_worker,
    "apis": kill_api,
    "zombies": freeze_worker,
    "redis": kill_redis,
    "rolling": roll,
}


def table(parts: dict[str, Part]) -> str:
    lines = [
        "| harm | times | streams | of them hit | tokens | differing | their pause p50 / p95 / max, s | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        pauses = " / ".join(f"{part.pause_s(share):.1f}" for share in (0.5, 0.95, 1.0)) if part.pauses_s else ""
        lines.append(
            f"| {name} | {part.harms} | {part.streams} | {part.hit} | {part.tokens:,} | {len(part.differing)} "
            f"| {pauses} | {part.seconds / 60:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*WANTED, []], help="all of them by default")
    parser.add_argument("--count", type=int, help="how often, instead of the number above")
    parser.add_argument("--results", type=Path, help="a JSON file of what was proved so far")
    parser.add_argument("--limit-s", type=float, default=1e9, help="end a part after so long, for a proof in pieces")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    parts: dict[str, Part] = {}
    if options.results and options.results.exists():
        parts = {name: Part(**values) for name, values in json.loads(options.results.read_text()).items()}
    nursery = Nursery()
    for name in options.parts or WANTED:
        part = parts.setdefault(name, Part(stops_all=name == "redis"))
        count = (options.count or WANTED[name]) - part.harms
        if count <= 0:
            continue
        print(f"{name}: {count} times", flush=True)
        with tempfile.TemporaryDirectory(prefix="smollm-proof-") as folder:
            # No attempt is the last one: here workers die more often than any prompt could be blamed for.
            cluster = Cluster(Path(folder), nursery=nursery, num_slots=NUM_STREAMS, max_attempts=1_000, result_ttl_s=60)
            try:
                asyncio.run(Proof(cluster, part).run(HARMS[name], count, limit_s=options.limit_s))
            finally:
                cluster.stop()
        if options.results:
            options.results.write_text(json.dumps({name: asdict(part) for name, part in parts.items()}))
    nursery.stop()
    print(table(parts))
    slow = [name for name in ("workers", "zombies") if name in parts and parts[name].pause_s(0.95) > PAUSE_LIMIT_S]
    return int(bool(slow or any(part.differing for part in parts.values())))


if __name__ == "__main__":
    sys.exit(main())
