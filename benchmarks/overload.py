"""What the service does when more is asked of it than it can do, over HTTP, with a real worker.

    python -m benchmarks.overload [overload] [fairness] [--model models/smollm2-135m-instruct]

overload: twenty times as many clients as the service holds (slots and queue) arrive at twenty times the rate it
serves at. Those refused obey `Retry-After` and send the same request again until they are served. Limits: nothing but
200 and 429 with `Retry-After`; 90 % are served at their first retry; 95 % of the throughput of a service that is just
saturated.

fairness: one client asks once a second, alone, beside another key that keeps all slots busy, and beside that key
flooding 500 jobs. Limit: flooding at most doubles its p95 time to first token against a busy service.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from service.api_keys import hash_of
from service.queue import keys
from tests.e2e.client import Answer, Connection
from tests.e2e.cluster import MODEL, Cluster
from tests.e2e.streams import follow

NUM_SLOTS: Final = 32
MAX_QUEUED: Final = 32
TIMES: Final = 20
FLOOD_JOBS: Final = 500
NUM_TOKENS: Final = 64


def body(number: int, **values: Any) -> dict[str, Any]:
    """Different prompts, so that no request is another one."""
    return {"prompt": f"Request number {number}:", "max_new_tokens": NUM_TOKENS, "temperature": 1.0, **values}


def share(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


async def generate(url: str, request: dict[str, Any], **headers: str) -> Answer:
    async with Connection(url) as connection:
        return await connection.ask("POST", "/generate", request, **headers)


def speed_when_full(ends_s: list[float], until_s: float) -> float:
    """Return tokens per second from the first slots' full round to the last end before `until_s`.

    Jobs that began together end together, so both ends of the interval must be ends of jobs.
    """
    ends_s = sorted(end_s for end_s in ends_s if end_s <= until_s)
    return (len(ends_s) - NUM_SLOTS) * NUM_TOKENS / (ends_s[-1] - ends_s[NUM_SLOTS - 1])


async def saturate(cluster: Cluster, seconds: float) -> float:
    """Return tokens per second of a service with all slots taken and somebody waiting."""
    [url] = cluster.apis
    ends_s: list[float] = []
    started_s, before = time.monotonic(), cluster.cpu_s()

    async def client(number: int) -> None:
        while time.monotonic() < started_s + seconds:
            answer = await generate(url, body(number, seed=1))
            if answer.status == 429:  # all of them came at once, before the worker took the first
                await asyncio.sleep(0.05)
                continue
            assert answer.status == 200, answer.body
            ends_s.append(time.monotonic() - started_s)

    await asyncio.gather(*(client(number) for number in range(NUM_SLOTS + MAX_QUEUED // 2)))
    speed = speed_when_full(ends_s, seconds)
    print(f"saturated {speed:,.0f} tokens/s, {estimate(cluster):,.0f} by the queue's estimate; ", end="")
    print(f"CPU {describe_cpu(cluster, before, max(ends_s))}", flush=True)
    return speed


def estimate(cluster: Cluster) -> float:
    """Return the speed that turns are given by, in tokens per second; it counts prompts as well."""
    speed = float(cluster.client.hget(keys.COUNTS + cluster.model, "speed") or 0)
    job = next(iter(cluster.client.scan_iter(match=keys.JOB + "*", count=1000)))
    return speed * NUM_TOKENS / float(cluster.client.hget(job, "cost") or 1)


def describe_cpu(cluster: Cluster, before: dict[str, float], seconds: float) -> str:
    """Say how much of a core each process took, this one (the clients) among them."""
    return ", ".join(f"{name} {(used - before[name]) / seconds:.0%}" for name, used in cluster.cpu_s().items())


async def overload(cluster: Cluster, seconds: float) -> bool:
    [url] = cluster.apis
    saturated = await saturate(cluster, seconds)
    num_clients = TIMES * (NUM_SLOTS + MAX_QUEUED)
    per_second = TIMES * saturated / NUM_TOKENS
    statuses: Counter[int] = Counter()
    tries: Counter[int] = Counter()
    without_retry_after, waits_s, ends_s = 0, [], []
    started_s, before = time.monotonic(), cluster.cpu_s()

    async def client(number: int) -> None:
        nonlocal without_retry_after
        await asyncio.sleep(number / per_second)
        for attempt in range(1, 20):
            answer = await generate(url, body(number))
            statuses[answer.status] += 1
            if answer.status == 200:
                tries[attempt] += 1
                assert answer.json()["usage"]["completion_tokens"] == NUM_TOKENS
                ends_s.append(time.monotonic() - started_s)
                return
            if answer.retry_after_s is None:
                without_retry_after += 1
                return
            waits_s.append(answer.retry_after_s)
            await asyncio.sleep(answer.retry_after_s)

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    # Until the last tenth of the clients: what is left then is no overload any more.
    full_s = share(ends_s, 0.9)
    goodput = speed_when_full(ends_s, full_s)
    refused = sum(count for attempt, count in tries.items() if attempt > 1)
    at_first = tries[2] / max(1, refused)
    print(
        f"{num_clients} clients at {per_second:,.0f}/s, {TIMES} times that; estimate {estimate(cluster):,.0f}; ", end=""
    )
    print(f"CPU {describe_cpu(cluster, before, max(ends_s))}")
    print(f"statuses {dict(statuses)}; 429 without Retry-After: {without_retry_after}")
    print(f"served at the first try {tries[1]}, first retry {tries[2]}, later {refused - tries[2]}", end="")
    print(f": of those refused {at_first:.1%} at their first retry (limit 90 %)")
    print(
        f"Retry-After p50 {share(waits_s, 0.5):.0f} s, max {max(waits_s):.0f} s; all served after {max(ends_s):.0f} s"
    )
    print(f"goodput {goodput:,.0f} tokens/s, {goodput / saturated:.1%} of saturated (limit 95 %)", flush=True)
    is_clean = set(statuses) <= {200, 429} and not without_retry_after
    return is_clean and at_first >= 0.9 and goodput >= 0.95 * saturated


async def fairness(cluster: Cluster, seconds: float, api_keys: tuple[str, str]) -> bool:
    [url] = cluster.apis
    flooding, modest = ({"authorization": f"Bearer {key}"} for key in api_keys)

    async def ask_each_second(first: int) -> list[float]:
        times_s: list[float] = []

        async def one(number: int) -> None:
            told = await follow(lambda: [url], body(number, max_new_tokens=8), headers=modest)
            assert told.done is not None, told.error
            times_s.append(told.times_s[0] - told.sent_s)

        waiting = []
        for number in range(int(seconds)):
            waiting.append(asyncio.create_task(one(first + number)))
            await asyncio.sleep(1.0)
        await asyncio.gather(*waiting)
        return times_s

    async def keep_busy(number: int) -> None:
        while True:
            await generate(url, body(number, max_new_tokens=64), **flooding)

    async def flood_once(number: int) -> None:
        answer = await generate(url, body(number, max_new_tokens=64), prefer="respond-async", **flooding)
        assert answer.status == 202, answer.body

    alone = await ask_each_second(0)
    busy = [asyncio.create_task(keep_busy(number)) for number in range(NUM_SLOTS)]
    beside_busy = await ask_each_second(1_000)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    while any(cluster.counts().values()):
        await asyncio.sleep(0.1)
    await asyncio.gather(*(flood_once(number) for number in range(FLOOD_JOBS)))
    beside_flood = await ask_each_second(2_000)
    left = cluster.counts()["queued"]
    print(f"time to first token of a key that asks once a second, ms, p50 / p95 of {int(seconds)}:")
    for name, times_s in (
        ("alone", alone),
        ("beside a key with all slots busy", beside_busy),
        (f"beside that key's {FLOOD_JOBS} jobs", beside_flood),
    ):
        print(f"  {name:36} {share(times_s, 0.5) * 1e3:7.0f} / {share(times_s, 0.95) * 1e3:.0f}")
    ratio = share(beside_flood, 0.95) / share(beside_busy, 0.95)
    print(f"  flooding multiplies the p95 by {ratio:.2f} (limit 2); {left} jobs of the flood still waited", flush=True)
    return ratio <= 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["overload", "fairness", []])
    parser.add_argument("--model", type=Path, help="an export; a tiny one of random weights by default")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    settings: dict[str, Any] = {"num_slots": NUM_SLOTS, "num_threads": 1}
    if options.model:
        settings = {"num_slots": NUM_SLOTS, "models_dir": options.model.parent, "model": options.model.name}
        settings |= {"dtype": "auto", "num_threads": 0}
    api_keys = ("sk-flooding", "sk-modest")
    hashes = ",".join(f"sha256:{hash_of(key)}" for key in api_keys)
    is_good = True
    for part in options.parts or ("overload", "fairness"):
        limits: dict[str, Any] = {"max_queued_jobs": MAX_QUEUED}
        if part == "fairness":
            limits = {"max_queued_jobs": 2 * FLOOD_JOBS, "api_keys": hashes}
        with tempfile.TemporaryDirectory(prefix="smollm-overload-") as folder:
            cluster = Cluster(Path(folder), **{"model": MODEL, **settings, **limits})
            try:
                cluster.start_worker()
                cluster.start_api()
                cluster.wait_until_ready()
                if part == "overload":
                    is_good &= asyncio.run(overload(cluster, options.seconds))
                else:
                    is_good &= asyncio.run(fairness(cluster, options.seconds, api_keys))
            finally:
                cluster.stop()
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
