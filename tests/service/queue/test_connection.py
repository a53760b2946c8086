"""Connections: what is refused at start, and that an absent Redis is said at once and in one way."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest
import redis

from service.errors import NotReady
from service.queue import connection
from service.queue.connection import (
    async_redis,
    blocking_redis,
    check_server,
    describe_server,
)
from service.queue.job_queue import JobQueue
from service.queue.local_server import start_redis
from service.queue.scripts import source
from service.queue.worker_queue import WorkerQueue
from shared.errors import ConfigError
from tests.service.queue.conftest import LIMITS, MODEL, REVISION, chunk, request, wait_until_async, worker_info


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


@pytest.mark.anyio
@pytest.mark.parametrize("code", ["NOREPLICAS", "NOPERM"])
async def test_a_redis_that_refuses_to_work_is_not_ready_on_both_sides(
    code: str, redis_url: str, client: redis.Redis
) -> None:
    """Whatever only its operator can mend: the API answers 503, and a worker waits for it."""
    user = redis_url
    if code == "NOPERM":
        client.acl_setuser(
            "guest", enabled=True, passwords=["+word"], categories=["+@read"], keys=["*"], channels=["*"]
        )
        user = redis_url.replace("://", "://guest:word@")
    else:
        client.config_set("min-replicas-to-write", "1")
    api, worker_client = async_redis(user), blocking_redis(user)
    worker = WorkerQueue(worker_client, worker_id="w", limits=LIMITS)
    try:
        for refusal in (
            await refusal_of(JobQueue(api, limits=LIMITS).admit(request(), timeout_s=30)),
            await refusal_of(asyncio.to_thread(worker.announce, worker_info("w"))),
            await refusal_of(asyncio.to_thread(worker.wait_for_work, 0.01)),
        ):
            assert refusal.code_name == "redis_refuses" and code in str(refusal) and refusal.retry_after_s
    finally:
        client.config_set("min-replicas-to-write", "0")
        client.acl_deluser("guest")
        worker_client.close()
        await api.aclose()


@pytest.mark.anyio
async def test_a_redis_that_cannot_save_is_not_ready(tmp_path: Path) -> None:
    """As with a full disk: it goes on reading and refuses to write."""
    with start_redis(directory=tmp_path) as server, blocking_redis(server.url) as client:
        (tmp_path / "dump.rdb").mkdir()  # no file can take its place
        client.config_set("save", "3600 1")
        client.set("{smollm}:anything", 1)
        client.bgsave()
        api = async_redis(server.url)
        await wait_until_async(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        refusal = await refusal_of(JobQueue(api, limits=LIMITS).admit(request(), timeout_s=30))
        client.config_set("save", "")  # else it does not end either
        assert refusal.code_name == "redis_refuses" and "MISCONF" in str(refusal)
        await api.aclose()


def test_a_wrong_password_and_missing_rights_are_told_at_the_start(redis_url: str, client: redis.Redis) -> None:
    """Waiting does not mend them."""
    client.acl_setuser("guest", enabled=True, passwords=["+w0rd"], commands=["+get"], keys=["*"])
    try:
        for password, words in (("s3cret", "another user"), ("w0rd", "may not")):
            guest = redis_url.replace("://", f"://guest:{password}@")
            with blocking_redis(guest) as stranger, pytest.raises(ConfigError, match=words) as error:
                check_server(stranger)
            assert password not in str(error.value)
    finally:
        client.acl_deluser("guest")


async def refusal_of(call: Awaitable[object]) -> NotReady:
    with pytest.raises(NotReady) as refusal:
        await call
    return refusal.value


def test_scripts_survive_a_forgotten_cache(client: redis.Redis) -> None:
    worker = WorkerQueue(client, worker_id="w", limits=LIMITS)
    assert worker.reap() == 0
    client.script_flush()
    assert worker.reap() == 0


def test_only_admission_is_refused_when_memory_is_full() -> None:
    assert source("admit").splitlines()[0] == "#!lua"
    assert source("append").splitlines()[0] == "#!lua flags=allow-oom"
