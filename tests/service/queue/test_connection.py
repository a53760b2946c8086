"""Connections: what is refused at start, and that an absent Redis is said at once and in one way."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import redis

from service.errors import NotReady
from service.queue import connection
from service.queue.connection import (
    async_redis,
    blocking_redis,
    check_server,
    check_server_async,
    describe_server,
)
from service.queue.job_queue import JobQueue
from service.queue.scripts import source
from service.queue.worker_queue import WorkerQueue
from shared.errors import ConfigError
from tests.service.queue.conftest import LIMITS, request


@pytest.fixture
def dead_url() -> str:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://127.0.0.1:{probe.getsockname()[1]}/0"


def test_server_names_itself(client: redis.Redis) -> None:
    assert check_server(client).split()[0] in ("Redis", "Valkey")


def test_old_server_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Redis 6\.2\.14 is too old"):
        describe_server({"redis_version": "6.2.14"}, {"maxmemory_policy": "noeviction"})


def test_server_that_may_evict_jobs_is_refused(client: redis.Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigError, match="allkeys-lru"):
            check_server(client)
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_unusable_url_is_one_sentence_without_its_password() -> None:
    with pytest.raises(ConfigError, match="redis://") as error:
        blocking_redis("redis://:secret@host:port/0")
    assert "secret" not in str(error.value)


def test_unix_socket_is_a_url_too(client: redis.Redis, tmp_path: Path) -> None:
    with blocking_redis(f"unix://{tmp_path}/nobody.sock") as nobody, pytest.raises(NotReady):
        check_server(nobody)


@pytest.mark.anyio
async def test_absent_redis_is_not_ready_within_a_tenth_of_a_second(dead_url: str) -> None:
    api = async_redis(dead_url)
    start = time.monotonic()
    with pytest.raises(NotReady) as refusal:
        await JobQueue(api, limits=LIMITS).admit(request(), timeout_s=1)
    assert time.monotonic() - start < 0.1
    assert refusal.value.code_name == "redis_unavailable"
    assert refusal.value.retry_after_s
    with pytest.raises(NotReady):
        await check_server_async(api)
    await api.aclose()
    with blocking_redis(dead_url) as client, pytest.raises(NotReady):
        WorkerQueue(client, worker_id="w", limits=LIMITS).wait_for_work(0.1)


@pytest.mark.anyio
async def test_silent_redis_is_not_ready_within_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "API_TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        api = async_redis(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        with pytest.raises(NotReady):
            await JobQueue(api, limits=LIMITS).ping()
        await api.aclose()


@pytest.mark.anyio
async def test_full_memory_refuses_new_jobs_and_serves_accepted_ones(redis_url: str, client: redis.Redis) -> None:
    from tests.service.queue.conftest import MODEL, REVISION, chunk, worker_info

    api = async_redis(redis_url)
    queue = JobQueue(api, limits=LIMITS)
    worker = WorkerQueue(client, worker_id="w", limits=LIMITS)
    worker.announce(worker_info("w"))
    await queue.admit(request(), timeout_s=30)
    client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(NotReady) as refusal:
            await queue.admit(request(), timeout_s=30)
        assert refusal.value.code_name == "redis_out_of_memory"
        [job] = worker.next(MODEL, REVISION, num_slots=1, num_tokens=100)
        assert worker.append([(job, chunk(0, 5))]) == [("ok", 1)]
    finally:
        client.config_set("maxmemory", "0")
    await api.aclose()


def test_scripts_survive_a_forgotten_cache(client: redis.Redis) -> None:
    worker = WorkerQueue(client, worker_id="w", limits=LIMITS)
    assert worker.reap() == 0
    client.script_flush()
    assert worker.reap() == 0


def test_only_admission_is_refused_when_memory_is_full() -> None:
    assert source("admit").splitlines()[0] == "#!lua"
    assert source("append").splitlines()[0] == "#!lua flags=allow-oom"
