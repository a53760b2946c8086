"""One real Redis for all tests of the service; each test gets it empty and must leave no key that lives for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.queue.connection import blocking_redis
from service.queue.local_server import LocalRedis, start_redis


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[LocalRedis]:
    """One server for the whole run."""
    with start_redis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: LocalRedis) -> Iterator[str]:
    """URL of an empty Redis; afterwards every key must be ours and have a time to live."""
    client = blocking_redis(redis_server.url)
    client.flushdb()
    yield redis_server.url
    keys = list(client.scan_iter(count=1000))
    eternal = [key for key in keys if client.pttl(key) == -1]
    foreign = [key for key in keys if not key.startswith("{smollm}:")]
    client.flushdb()
    client.close()
    assert not eternal, f"keys without a time to live: {eternal}"
    assert not foreign, f"keys outside our prefix: {foreign}"
