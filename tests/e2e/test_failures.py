"""Every row of ARCHITECTURE.md's failure table, over HTTP, with real processes that are really killed."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from service.queue import keys
from tests.e2e.client import Answer, Connection, ask
from tests.e2e.cluster import MODEL, Cluster
from tests.e2e.streams import Told, bodies, follow
from tests.processes import PATIENCE_S
from tests.tiny import other_tokenizer, tiny_tokenizer

pytestmark = pytest.mark.anyio

SAMPLED, GREEDY = bodies(2, num_tokens=300)

T = TypeVar("T")


async def until(look: Callable[[], T | None], what: str) -> T:
    """As `wait_until`, while streams go on."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not (answer := look()):
        assert time.monotonic() < give_up_at, f"waited {PATIENCE_S:g} s for {what}"
        await asyncio.sleep(0.01)
    return answer


async def undisturbed(cluster: Cluster) -> list[Told]:
    """What both requests are answered when nothing happens."""
    return await asyncio.gather(*(follow(lambda: list(cluster.apis), body) for body in (SAMPLED, GREEDY)))


async def disturbed(cluster: Cluster, disturb: Callable[[list[Told]], Awaitable[Any]]) -> list[Told]:
    """The same two requests, with something that happens once both have tokens; both must end as if nothing had."""
    expected = await undisturbed(cluster)
    told = [Told(), Told()]
    following = [
        asyncio.create_task(follow(lambda: list(cluster.apis), body, told=one))
        for body, one in zip((SAMPLED, GREEDY), told, strict=True)
    ]
    for one in told:
        await until(lambda one=one: len(one.token_ids) > 5, "tokens")  # type: ignore[misc]
    await disturb(told)
    await asyncio.gather(*following)
    for one, other in zip(told, expected, strict=True):
        assert one.differs_from(other) is None
    return told


async def test_worker_killed(cluster: Cluster) -> None:
    async def kill(told: list[Told]) -> None:
        cluster.kill_worker(cluster.holder_of(told[0].job_id))
        cluster.start_worker()

    told = await disturbed(cluster, kill)
    assert told[0].done is not None and told[0].done["attempts"] == 2


async def test_worker_told_to_stop(cluster: Cluster) -> None:
    """What cannot end within the grace is handed over; nobody waits for a lease."""

    async def stop(told: list[Told]) -> None:
        worker = cluster.holder_of(told[0].job_id)
        worker.send(signal.SIGTERM)
        worker.send(signal.SIGTERM)  # twice: no grace
        assert await asyncio.to_thread(worker.wait, PATIENCE_S) == 0, worker.log
        cluster.workers.remove(worker)
        cluster.start_worker()

    await disturbed(cluster, stop)


async def test_worker_frozen_and_back(cluster: Cluster) -> None:
    """The zombie's writes are refused, and it serves again."""
    frozen = None

    async def freeze(told: list[Told]) -> None:
        nonlocal frozen
        frozen = cluster.holder_of(told[0].job_id)
        frozen.pause()
        await until(lambda: cluster.client.hget(keys.JOB + told[0].job_id, "attempt") == "2", "another worker")
        frozen.go_on()

    await disturbed(cluster, freeze)
    others = [worker for worker in cluster.workers if worker is not frozen]
    for worker in others:
        worker.pause()
    try:
        told = await follow(lambda: list(cluster.apis), SAMPLED | {"max_new_tokens": 5})
        assert told.done is not None and cluster.holder_of(told.job_id) is frozen
    finally:
        for worker in others:
            worker.go_on()


async def test_api_process_killed(cluster: Cluster) -> None:
    async def kill(told: list[Told]) -> None:
        for url in list(cluster.apis)[:1]:
            cluster.start_api()
            cluster.kill_api(url)

    await disturbed(cluster, kill)


async def test_redis_restarted(cluster: Cluster) -> None:
    """Killed, and back with its file."""

    async def restart(told: list[Told]) -> None:
        cluster.redis.stop(kill=True)
        cluster.start_redis()

    await disturbed(cluster, restart)


async def test_redis_lost_its_last_second(cluster: Cluster) -> None:
    """A power cut: the file ends some tokens earlier. The worker sends them again, readers see nothing twice."""

    async def lose(told: list[Told]) -> None:
        [file] = (cluster.root / "redis").glob("appendonlydir/*.incr.aof")
        size = file.stat().st_size
        await until(lambda: len(told[0].token_ids) > 30 and file.stat().st_size > size + 1_000, "more tokens")
        cluster.redis.stop(kill=True)
        with file.open("rb+") as tail:
            tail.truncate(size)
        cluster.start_redis()

    await disturbed(cluster, lose)


async def test_redis_lost_everything(cluster: Cluster) -> None:
    """Even then: the API processes whose clients listen admit their jobs again, and their tokens are the same."""

    async def lose(told: list[Told]) -> None:
        cluster.redis.stop(kill=True)
        shutil.rmtree(cluster.root / "redis" / "appendonlydir")
        cluster.start_redis()

    await disturbed(cluster, lose)


async def test_redis_down(cluster: Cluster) -> None:
    """New requests are refused at once; the streams that run wait and go on."""

    async def take_away(told: list[Told]) -> None:
        cluster.redis.stop()
        for url in cluster.apis:
            answer = await ask(url, "POST", "/generate", SAMPLED)
            assert answer.status == 503 and answer.json()["error"]["code"] == "redis_unavailable"
            assert answer.retry_after_s
            assert (await ask(url, "GET", "/live")).status == 200
            assert (await ask(url, "GET", "/ready")).status == 503
            assert (await ask(url, "GET", "/health")).json()["status"] == "down"
        cluster.start_redis()

    await disturbed(cluster, take_away)


async def test_redis_refuses_to_write(cluster: Cluster) -> None:
    """As with a full disk or too few replicas: 503, no process ends, and all goes on when it takes writes again."""
    processes = [*cluster.apis.values(), *cluster.workers]

    async def refuse(told: list[Told]) -> None:
        cluster.client.config_set("min-replicas-to-write", "1")
        try:
            for worker in cluster.workers:
                await until(lambda worker=worker: "(NOREPLICAS)" in worker.log, "the worker to notice")  # type: ignore[misc]
            for url in cluster.apis:
                answer = await ask(url, "POST", "/generate", SAMPLED)
                assert answer.status == 503 and answer.json()["error"]["code"] == "redis_refuses"
                assert answer.retry_after_s
        finally:
            cluster.client.config_set("min-replicas-to-write", "0")

    await disturbed(cluster, refuse)
    cluster.wait_until_ready()
    assert processes == [*cluster.apis.values(), *cluster.workers]
    assert not [process for process in processes if "Traceback" in process.log]


async def test_prompt_that_kills_workers(cluster: Cluster) -> None:
    """It is failed when it has lost its third worker, and its neighbours go on."""
    spare = [cluster.start_worker() for _ in range(2)]
    await until(lambda: all(worker in cluster.serving_workers() for worker in spare), "more workers")
    neighbour = asyncio.create_task(follow(lambda: list(cluster.apis), GREEDY | {"max_new_tokens": 1_500}))
    told = Told()
    poison = asyncio.create_task(follow(lambda: list(cluster.apis), SAMPLED | {"max_new_tokens": 1_900}, told=told))
    await until(lambda: told.job_id, "admission")
    for attempt in ("1", "2", "3"):
        await until(
            lambda attempt=attempt: cluster.client.hget(keys.JOB + told.job_id, "attempt") == attempt,  # type: ignore[misc]
            f"attempt {attempt}",
        )
        cluster.kill_worker(cluster.holder_of(told.job_id))
    cluster.start_worker()
    await poison
    assert told.error is not None and told.error["code"] == "worker_lost"
    assert cluster.client.xlen(keys.DEAD) >= 1
    end = await neighbour
    assert end.done is not None or (end.error or {}).get("code") == "worker_lost"  # it may have shared every worker
    assert (await follow(lambda: list(cluster.apis), SAMPLED | {"max_new_tokens": 5})).done is not None


async def test_slow_reader(cluster: Cluster) -> None:
    """A client that reads nothing holds up nobody, and finds everything when it does."""
    [expected, _] = await undisturbed(cluster)
    [url, *_] = cluster.apis
    async with Connection(url) as connection:
        assert await connection.begin("POST", "/generate", SAMPLED | {"stream": True}) == 200
        connection.pause()
        job = connection.headers["x-job-id"]
        assert (await follow(lambda: [url], GREEDY | {"max_new_tokens": 5})).done is not None
        await until(lambda: cluster.client.hget(keys.JOB + job, "state") == "succeeded", "the end of its job")
        connection.go_on()
        told = Told()
        async for event in connection.events():
            told.hear(event)
    assert told.differs_from(expected) is None


async def test_rolling_restart(cluster: Cluster) -> None:
    """Every worker is told to stop, one after the other; no request fails."""

    async def roll(told: list[Told]) -> None:
        for old in list(cluster.workers):
            new = cluster.start_worker()
            await until(lambda new=new: new in cluster.serving_workers(), "the new worker")  # type: ignore[misc]
            old.send(signal.SIGTERM)
            assert await asyncio.to_thread(old.wait, PATIENCE_S) == 0, old.log
            cluster.workers.remove(old)

    await disturbed(cluster, roll)


async def test_model_replaced_by_one_with_another_tokenizer(cluster: Cluster) -> None:
    """Every API process goes on with the old one until every worker has the new one; no request fails."""
    body = {"prompt": "First Citizen:", "max_new_tokens": 8}
    answers: list[Answer] = []
    is_over = False

    async def ids(url: str) -> list[int]:
        async with Connection(url) as connection:
            token_ids: list[int] = (await connection.ask("POST", "/tokenize", {"text": body["prompt"]})).json()[
                "token_ids"
            ]
            return token_ids

    async def go_on(url: str) -> None:
        async with Connection(url) as connection:
            while not is_over:
                answers.append(await connection.ask("POST", "/generate", body))

    clients = [asyncio.create_task(go_on(url)) for url in cluster.apis for _ in range(2)]
    other_tokenizer().save(cluster.root / "models" / MODEL)
    give_up_at = time.monotonic() + PATIENCE_S
    while [await ids(url) for url in cluster.apis] != 2 * [other_tokenizer().encode(str(body["prompt"]))]:
        assert time.monotonic() < give_up_at, "the API processes never took the new tokenizer"
        await asyncio.sleep(0.05)
    before = len(answers)
    await until(lambda: len(answers) > before + 20, "answers of the new one")
    is_over = True
    await asyncio.gather(*clients)
    assert [answer.json() for answer in answers if answer.status != 200] == []
    tiny_tokenizer().save(cluster.root / "models" / MODEL)


async def test_nothing_is_left_behind(cluster: Cluster) -> None:
    """After all of that: no job counted, no lease, no watch, and every key has a time to live."""
    await until(lambda: set(cluster.counts().values()) == {0}, "the last jobs to end")
    assert not cluster.client.zcard(keys.LEASES + MODEL)
    assert not cluster.client.zcard(keys.WATCHES)
    assert [key for key in cluster.client.scan_iter() if cluster.client.pttl(key) == -1] == []
