"""How much the queue itself costs: jobs and tokens per second through Redis with an engine that computes nothing.

    python -m benchmarks.queue [--seconds 5] [--clients 64] [--apis 1] [--tokens 64] [--chunk 16]

One process plays the worker (32 slots; every running job gets one chunk per step), the others play API processes
with clients that admit a job, follow its stream to the end and start the next. Redis is whatever `start_redis` finds.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Any

from service.queue.connection import async_redis, blocking_redis
from service.queue.job import Chunk, Finish, JobRequest, LeasedJob, QueueLimits, WorkerInfo
from service.queue.job_queue import JobQueue
from service.queue.local_server import start_redis
from service.queue.streams import TokenStreams
from service.queue.worker_queue import WorkerQueue

MODEL = "null"
LIMITS = QueueLimits(max_queued_jobs=100_000, max_queued_tokens=10**9, lease_ms=4_000)
NUM_SLOTS = 32


def work(url: str, chunk_size: int, stop: Event, cpu_seconds: Synchronized[float]) -> None:
    """Serve jobs with made-up tokens until told to stop."""
    queue = WorkerQueue(blocking_redis(url), worker_id="null", limits=LIMITS)
    info = WorkerInfo(id="null", models={MODEL: "r"}, slots=NUM_SLOTS, free=NUM_SLOTS, device="cpu", dtype="none")
    queue.announce(info)
    running: dict[str, tuple[LeasedJob, int]] = {}
    announce_at = time.monotonic() + 2
    while not stop.is_set():
        if time.monotonic() > announce_at:
            queue.announce(info)
            announce_at += 2
        if len(running) < NUM_SLOTS:
            for job in queue.next(MODEL, "r", num_slots=NUM_SLOTS - len(running), num_tokens=10**9):
                running[job.id] = (job, 0)
        if not running:
            queue.wait_for_work(0.5)
            continue
        writes, endings = [], []
        for job, start in list(running.values()):
            tokens = tuple(range(start, min(start + chunk_size, job.request.max_new_tokens)))
            chunk = Chunk(first_index=start, token_ids=tokens, text=" word" * len(tokens))
            if chunk.end_index == job.request.max_new_tokens:
                endings.append((job, Finish(reason="length"), chunk, None))
                del running[job.id]
            else:
                writes.append((job, chunk))
                running[job.id] = (job, chunk.end_index)
        queue.append(writes)
        queue.finish_many(endings)
        cpu_seconds.value = time.process_time()


async def serve(url: str, num_clients: int, num_tokens: int, seconds: float) -> tuple[int, int, list[float]]:
    """Return jobs finished, tokens received and the time of each job in seconds."""
    client = async_redis(url)
    queue, streams = JobQueue(client, limits=LIMITS), TokenStreams(client)
    request = JobRequest(
        model=MODEL, prompt_ids=tuple(range(32)), max_new_tokens=num_tokens, sampling={"temperature": 1.0, "seed": 1}
    )
    while not (await queue.statistics(MODEL))[MODEL].workers:
        await asyncio.sleep(0.01)
    times: list[float] = []
    tokens = 0
    end_at = time.monotonic() + seconds

    async def one_client() -> None:
        nonlocal tokens
        while time.monotonic() < end_at:
            start = time.perf_counter()
            admission = await queue.admit(request, timeout_s=60, cancel_on_disconnect=True)
            async for event in streams.follow(admission.id):
                if isinstance(event, Chunk):
                    tokens += len(event.token_ids)
            times.append(time.perf_counter() - start)

    await asyncio.gather(*(one_client() for _ in range(num_clients)))
    await streams.aclose()
    await client.aclose()
    return len(times), tokens, times


def serve_process(url: str, num_clients: int, num_tokens: int, seconds: float) -> tuple[int, int, list[float], float]:
    """As `serve`, with the CPU seconds it took."""
    import uvloop

    before = time.process_time()
    jobs, tokens, times = uvloop.run(serve(url, num_clients, num_tokens, seconds))
    return jobs, tokens, times, time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64, help="in each API process")
    parser.add_argument("--apis", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="of each job")
    parser.add_argument("--chunk", type=int, default=16, help="tokens of each write")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with start_redis() as server:
        stop = context.Event()
        worker_cpu = context.Value("d", 0.0)
        worker = context.Process(target=work, args=(server.url, arguments.chunk, stop, worker_cpu))
        worker.start()
        call = (server.url, arguments.clients, arguments.tokens, arguments.seconds)
        with context.Pool(arguments.apis) as pool:
            results = pool.starmap(serve_process, [call] * arguments.apis)
        used: Any = blocking_redis(server.url).info("cpu")
        stop.set()
        worker.join()
    jobs, tokens = sum(result[0] for result in results), sum(result[1] for result in results)
    times = sorted(duration for result in results for duration in result[2])
    api_cpu = sum(result[3] for result in results)
    print(f"{server.description}; {arguments.apis} api x {arguments.clients} clients, chunks of {arguments.chunk}")
    parts = {"api": api_cpu, "worker": worker_cpu.value, "redis": used["used_cpu_user"] + used["used_cpu_sys"]}
    print(f"{jobs / arguments.seconds:,.0f} jobs/s   {tokens / arguments.seconds:,.0f} tokens/s   ", end="")
    print(f"median {statistics.median(times) * 1e3:.1f} ms   p99 {times[int(0.99 * len(times))] * 1e3:.1f} ms")
    print("CPU per job in microseconds: ", end="")
    print(", ".join(f"{name} {cpu / jobs * 1e6:.0f}" for name, cpu in parts.items()))


if __name__ == "__main__":
    main()
