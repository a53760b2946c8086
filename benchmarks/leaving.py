"""How soon what nobody wants any more is gone: cancelled, expired and abandoned jobs, and requests while Redis is away.

    python -m benchmarks.leaving [slots] [disconnects] [outage] [--disconnects 10000]

slots: with one slot taken and a job waiting for it, the time from the client's act until the waiting job has the slot.
Limit: 99 % within two steps of the engine + 50 ms. disconnects: clients that hang up in every part of a job's life,
from the way there to the last byte; afterwards no job is counted, no slot is taken, and Redis has the keys and the
memory it had before. outage: how long a 503 takes while Redis is stopped, and while it hangs. Limit: 100 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.disconnects import disconnects
from benchmarks.overload import share
from service.queue import keys
from tests.e2e.client import Connection, ask
from tests.e2e.cluster import Cluster

GRACE_MS: Final = 50
RESULT_TTL_S: Final = 5
LONG: Final = {"prompt": "First Citizen:", "max_new_tokens": 1_900, "temperature": 0.0}

Leave = Callable[[str, Connection, str], Awaitable[float]]
"""Makes a running job unwanted; returns when, in seconds since 1970."""


async def by_delete(url: str, _connection: Connection, job_id: str) -> float:
    moment = time.time()
    await ask(url, "DELETE", f"/jobs/{job_id}")
    return moment


async def by_hanging_up(_url: str, connection: Connection, _job_id: str) -> float:
    connection.hang_up()
    return time.time()


async def slots(cluster: Cluster, count: int) -> bool:
    """One way of leaving after the other; the waiting job of one round is the running one of the next."""
    [url] = cluster.apis
    client: Any = cluster.client
    is_good = True
    for name, stream, timeout_s, leave in (
        ("stream, cancelled", True, 300, by_delete),
        ("blocking, cancelled", False, 300, by_delete),
        ("stream, client gone", True, 300, by_hanging_up),
        ("blocking, client gone", False, 300, by_hanging_up),
        ("deadline", True, 0.3, None),
    ):
        waits_ms = []
        for _ in range(count):
            async with Connection(url) as running, Connection(url) as waiting:
                job = await begin(cluster, running, stream=stream, timeout_s=timeout_s)
                await until(lambda job=job: client.hget(keys.JOB + job, "n") not in (None, "0"))  # type: ignore[misc]
                other = await begin(cluster, waiting, stream=True, timeout_s=300)
                moment = await leave(url, running, job) if leave else int(client.hget(keys.JOB + job, "deadline")) / 1e3
                await until(lambda other=other: client.hget(keys.JOB + other, "started"))  # type: ignore[misc]
                waits_ms.append(int(client.hget(keys.JOB + other, "started")) - 1e3 * moment)
                waiting.hang_up()
            await until(lambda: not any(cluster.counts().values()))
        step_ms = 1e3 * step_s(cluster)
        limit_ms = GRACE_MS + 2 * step_ms
        p99 = share(waits_ms, 0.99)
        is_good &= p99 <= limit_ms
        print(f"  {name:22} p50 {share(waits_ms, 0.5):5.1f}  p99 {p99:5.1f}  max {max(waits_ms):5.1f} ms", end="")
        print(f"   limit {limit_ms:.0f} (steps of {step_ms:.1f})", flush=True)
    return is_good


async def begin(cluster: Cluster, connection: Connection, **values: Any) -> str:
    """Ask for a completion and return its job's id, which a blocking request is not told before its end."""
    seen = set(cluster.client.zrange(keys.DEADLINES, 0, -1))
    connection.send("POST", "/generate", LONG | values)
    found: list[Any] = []

    def look() -> bool:
        found[:] = [job for job in cluster.client.zrange(keys.DEADLINES, 0, -1) if job not in seen]
        return bool(found)

    await until(look)
    return str(found[0])


async def until(holds: Callable[[], Any]) -> None:
    give_up_at = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < give_up_at, "waited a minute in vain"
        await asyncio.sleep(0.002)


def step_s(cluster: Cluster) -> float:
    """Mean length of one step, as the worker measured it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.settings['worker_metrics_port']}/metrics") as page:
        text = page.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("worker_step_seconds_")]
    numbers = {line.split("{")[0]: float(line.split()[-1]) for line in lines}
    return numbers["worker_step_seconds_sum"] / numbers["worker_step_seconds_count"]


async def outage(cluster: Cluster, count: int) -> bool:
    [url] = cluster.apis
    is_good = True

    async def refuse() -> list[float]:
        times_ms = []
        for _ in range(count):
            started_s = time.monotonic()
            async with Connection(url) as connection:
                answer = await connection.ask("POST", "/generate", LONG)
            assert answer.status == 503, answer.body
            assert answer.retry_after_s is not None
            times_ms.append(1e3 * (time.monotonic() - started_s))
        return times_ms

    process = cluster.redis.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    hanging = await refuse()
    process.send_signal(signal.SIGCONT)
    await asyncio.to_thread(cluster.wait_until_ready)
    cluster.redis.stop()
    stopped = await refuse()
    cluster.start_redis()
    for name, times_ms in (("stopped", stopped), ("hangs", hanging)):
        is_good &= share(times_ms, 0.99) < 100
        first = "" if name == "stopped" else f"; the first, which finds out, {times_ms[0]:.0f}"
        print(f"  Redis {name:8} 503 after p50 {share(times_ms, 0.5):.1f}, p99 {share(times_ms, 0.99):.1f} ms{first}")
    return is_good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["slots", "disconnects", "outage", []])
    parser.add_argument("--rounds", type=int, default=100, help="of each way to leave, and of the outages")
    parser.add_argument("--disconnects", type=int, default=10_000)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    is_good = True
    for part in options.parts or ("slots", "disconnects", "outage"):
        print(f"{part}:", flush=True)
        settings: dict[str, Any] = {"num_slots": 1 if part == "slots" else 32, "worker_metrics_port": 19_474}
        with tempfile.TemporaryDirectory(prefix="smollm-leaving-") as folder:
            cluster = Cluster(Path(folder), result_ttl_s=RESULT_TTL_S, **settings)
            try:
                cluster.start_worker()
                cluster.start_api()
                cluster.wait_until_ready()
                if part == "slots":
                    is_good &= asyncio.run(slots(cluster, options.rounds))
                elif part == "disconnects":
                    is_good &= asyncio.run(disconnects(cluster, options.disconnects))
                else:
                    is_good &= asyncio.run(outage(cluster, 5 * options.rounds))
            finally:
                cluster.stop()
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
