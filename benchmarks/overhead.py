"""What HTTP and the queue add to the engine: time to first token at rest, speed at 32 streams, and their own limit.

    python -m benchmarks.overhead [rest] [streams] [null] [--model models/smollm2-135m-instruct]

rest: one request at a time, the engine called in this process and the service over HTTP in turn. Limit: 5 ms more to
the first token. streams: 32 at a time, engine and service in turn, always full. Limit: 5 % of the engine's tokens
per second.
null: a worker that computes nothing behind a real API process; what is left is HTTP, the queue and Redis.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.queue import MODEL as NULL_MODEL
from benchmarks.queue import work
from service.engine.host import Host, load_host
from service.engine.sequence import Sequence
from service.queue.connection import blocking_redis
from shared.catalog import read_model_folder
from shared.device import choose_device, choose_dtype, choose_num_threads
from shared.sampling import SamplingParams
from tests.e2e.client import Connection
from tests.e2e.cluster import Cluster
from tests.tiny import write_tiny_export

NUM_STREAMS: Final = 32
NUM_CLIENTS: Final = 40
NUM_REQUESTS: Final = 8 * NUM_STREAMS
SAMPLING: Final[dict[str, Any]] = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0}
PROMPT: Final = "First Citizen: Before we proceed any further, hear me speak. All: Speak"


def load(path: Path) -> Host:
    device = choose_device("auto").value
    torch.set_num_threads(choose_num_threads(0).value)
    dtype = choose_dtype(device, "auto", purpose="serve").value
    folder = read_model_folder(path)
    return load_host(folder, device=device, dtype=dtype, num_slots=NUM_STREAMS, max_cached_tokens=16_384)


def first_token_of_engine(host: Host, prompt_ids: list[int]) -> float:
    """Return seconds from handing the request over to the first token."""
    params = SamplingParams(temperature=0.0)
    started_s = time.perf_counter()
    host.engine.add(Sequence(id="one", prompt_ids=prompt_ids, params=params, max_new_tokens=4))
    first_s = 0.0
    while host.engine.has_work:
        outputs = host.engine.step()
        if outputs and not first_s:
            first_s = time.perf_counter() - started_s
    return first_s


async def first_token_of_service(connection: Connection) -> float:
    """The same over HTTP, from the request's first byte to the first event with a token."""
    body = {"prompt": PROMPT, "temperature": 0.0, "max_new_tokens": 4, "stream": True}
    started_s = time.perf_counter()
    await connection.begin("POST", "/generate", body)
    first_s = 0.0
    async for event in connection.events():
        if event.name == "token" and not first_s:
            first_s = time.perf_counter() - started_s
    return first_s


async def rest(cluster: Cluster, host: Host, rounds: int) -> bool:
    prompt_ids = host.engine.tokenizer.encode(PROMPT)
    engine, service = [], []
    [url] = cluster.apis
    async with Connection(url) as connection:
        for _ in range(rounds):
            engine.append(first_token_of_engine(host, prompt_ids))
            await asyncio.sleep(0.02)
            service.append(await first_token_of_service(connection))
            await asyncio.sleep(0.02)
    middle = [1e3 * statistics.median(times_s) for times_s in (engine, service)]
    tail = [1e3 * statistics.quantiles(times_s, n=20)[-1] for times_s in (engine, service)]
    print(f"time to first token, prompt of {len(prompt_ids)} tokens, {rounds} in turn, ms, p50 / p95:")
    print(f"  engine {middle[0]:.1f} / {tail[0]:.1f}   service over HTTP {middle[1]:.1f} / {tail[1]:.1f}", end="")
    print(f"   added {middle[1] - middle[0]:.1f} (limit 5)", flush=True)
    return middle[1] - middle[0] <= 5


def requests(num_tokens: int) -> list[dict[str, Any]]:
    """Return what is asked in one run: sampled as the API does by default, each answer of the same length."""
    return [
        {
            "prompt": f"{number}: once upon a time there was a small village near the sea, and",
            **SAMPLING,
            "seed": number,
            "max_new_tokens": num_tokens,
            "ignore_eos": True,
        }
        for number in range(NUM_REQUESTS)
    ]


def speed_of_engine(host: Host, num_tokens: int) -> float:
    """Return tokens per second of `NUM_STREAMS` streams; where one ends, the next request begins."""
    engine, waiting = host.engine, requests(num_tokens)
    started_s, num_drawn = time.perf_counter(), 0
    while waiting or engine.has_work:
        while waiting and engine.free_slots:
            request = waiting.pop()
            engine.add(
                Sequence(
                    id=str(request["seed"]),
                    prompt_ids=engine.tokenizer.encode(request["prompt"]),
                    params=SamplingParams(**SAMPLING, seed=request["seed"]),
                    max_new_tokens=num_tokens,
                    ignore_eos=True,
                )
            )
        num_drawn += sum(len(output.token_ids) for output in engine.step())
    assert num_drawn == NUM_REQUESTS * num_tokens, num_drawn
    return num_drawn / (time.perf_counter() - started_s)


async def speed_of_service(url: str, num_tokens: int, *, stream: bool) -> float:
    """The same requests over HTTP, of more clients than slots, so that each slot is taken again at once."""
    waiting, num_received = requests(num_tokens), 0

    async def client() -> None:
        nonlocal num_received
        async with Connection(url) as connection:
            while waiting:
                body = waiting.pop()
                if not stream:
                    answer = await connection.ask("POST", "/generate", body)
                    assert answer.status == 200, answer.body
                    num_received += int(answer.json()["usage"]["completion_tokens"])
                    continue
                assert await connection.begin("POST", "/generate", body | {"stream": True}) == 200
                async for event in connection.events():
                    num_received += len(event.data["token_ids"]) if event.name == "token" else 0

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    assert num_received == NUM_REQUESTS * num_tokens, num_received
    return num_received / (time.perf_counter() - started_s)


async def streams(cluster: Cluster, host: Host, repeats: int, num_tokens: int) -> bool:
    [url] = cluster.apis
    speeds: dict[str, list[float]] = {"engine": [], "streaming": [], "blocking": []}
    cpu_us: dict[str, list[dict[str, float]]] = {"streaming": [], "blocking": []}
    for _ in range(repeats):
        speeds["engine"].append(speed_of_engine(host, num_tokens))
        for kind, used in cpu_us.items():
            before = cluster.cpu_s()
            is_stream = kind == "streaming"
            speeds[kind].append(await speed_of_service(url, num_tokens, stream=is_stream))
            total = NUM_REQUESTS * num_tokens
            used.append({name: 1e6 * (after - before[name]) / total for name, after in cluster.cpu_s().items()})
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"tokens/s, {NUM_STREAMS} slots, {NUM_REQUESTS} requests of {num_tokens} tokens ", end="")
    print(f"({NUM_CLIENTS} clients), {repeats} times in turn, median (range):")
    for name, values in speeds.items():
        print(f"  {name:10} {middle[name]:.0f} ({min(values):.0f} to {max(values):.0f})", end="")
        if name != "engine":
            costs = {part: statistics.median(used[part] for used in cpu_us[name]) for part in cpu_us[name][0]}
            around = sum(cost for part, cost in costs.items() if not part.startswith("worker"))
            print(f"  {middle[name] / middle['engine']:.1%} (limit 95 %); CPU us a token: ", end="")
            print(", ".join(f"{part} {cost:.0f}" for part, cost in costs.items()), end="")
            print(
                f"; all but the worker {around * middle['engine'] / 2e4:.1f} % of two cores at the engine's speed",
                end="",
            )
        print(flush=True)
    return min(middle["streaming"], middle["blocking"]) >= 0.95 * middle["engine"]


async def null(cluster: Cluster, seconds: float, num_clients: int, num_tokens: int, *, stream: bool) -> None:
    end_s = time.monotonic() + seconds
    body = {"prompt": PROMPT, "max_new_tokens": num_tokens, "stream": stream}
    jobs = tokens = 0

    async def client(url: str) -> None:
        nonlocal jobs, tokens
        async with Connection(url) as connection:
            while time.monotonic() < end_s:
                if stream:
                    status = await connection.begin("POST", "/generate", body)
                    async for event in connection.events():
                        tokens += len(event.data["token_ids"]) if event.name == "token" else 0
                else:
                    status = (await connection.ask("POST", "/generate", body)).status
                    tokens += num_tokens if status == 200 else 0
                jobs += status == 200

    urls = list(cluster.apis)
    before = cluster.cpu_s()
    await asyncio.gather(*(client(urls[number % len(urls)]) for number in range(num_clients)))
    spent = {name: after - before[name] for name, after in cluster.cpu_s().items()}
    kind = "streaming" if stream else "blocking"
    print(f"null engine, {len(urls)} api x {num_clients} clients, {num_tokens} tokens each, {kind}: ", end="")
    print(
        f"{jobs / seconds:,.0f} requests/s, {tokens / seconds:,.0f} tokens/s; CPU per request in microseconds: ", end=""
    )
    print(", ".join(f"{name} {1e6 * used / jobs:.0f}" for name, used in spent.items()), flush=True)


def run_null(seconds: float) -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="smollm-null-") as folder:
        write_tiny_export(Path(folder) / "models", NULL_MODEL)
        limits: dict[str, Any] = {"max_queued_jobs": 100_000, "max_queued_tokens": 10**9, "log_format": "json"}
        cluster = Cluster(Path(folder), model=NULL_MODEL, models_dir=Path(folder) / "models", **limits)
        stop, cpu = context.Event(), context.Value("d", 0.0)
        worker = context.Process(target=work, args=(cluster.redis.url, 16, stop, cpu))
        try:
            worker.start()
            cluster.start_api()
            cluster.wait_until_ready(0)
            for num_tokens, stream in ((1, False), (64, False), (64, True)):
                asyncio.run(null(cluster, seconds, 64, num_tokens, stream=stream))
            client = blocking_redis(cluster.redis.url)
            calls: Any = client.info("commandstats")
            slowest = sorted(calls.items(), key=lambda item: -float(item[1]["usec"]))[:4]
            print(
                "Redis' own time: " + ", ".join(f"{n[8:]} {c['usec_per_call']} us x {c['calls']}" for n, c in slowest)
            )
            client.close()
        finally:
            stop.set()
            worker.join(5)
            worker.kill()
            cluster.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["rest", "streams", "null", []])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    torch.set_grad_enabled(False)
    parts = options.parts or ("rest", "streams", "null")
    is_good = True
    if {"rest", "streams"} & set(parts):
        with tempfile.TemporaryDirectory(prefix="smollm-overhead-") as folder:
            path = options.model.resolve()
            cluster = Cluster(
                Path(folder), model=path.name, models_dir=path.parent, dtype="auto", device="auto", num_threads=0
            )
            try:
                cluster.start_worker()
                cluster.start_api()
                host = load(path)
                cluster.wait_until_ready()
                if "rest" in parts:
                    is_good &= asyncio.run(rest(cluster, host, options.rounds))
                if "streams" in parts:
                    is_good &= asyncio.run(streams(cluster, host, max(2, options.rounds // 12), options.tokens))
            finally:
                cluster.stop()
    if "null" in parts:
        run_null(options.seconds)
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
