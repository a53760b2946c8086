"""The only place that opens connections to Redis: every time-out, retry and protocol choice is written out here.

redis-py 8 changed three defaults that bite a queue: sockets time out after 5 s (which cuts any longer blocking
read), commands are sent again up to 10 times, and RESP3 changes the shape of replies. Nothing here relies on a
default. Each command may be sent twice (see `NUM_RETRIES`), so every script of this package is idempotent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import redis
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.errors import NotReady
from shared.errors import ConfigError

Pool = TypeVar("Pool", redis.ConnectionPool, redis.asyncio.BlockingConnectionPool)

CONNECT_TIMEOUT_S = 3.0
API_TIMEOUT_S = 5.0
"""An API process answers 503 rather than wait longer than this for Redis: a connection, sending and the reply.
Where nobody listens it answers at once; this is for a Redis that hangs, and long enough for a starved machine."""
WORKER_TIMEOUT_S = 10.0
MAX_BLOCK_S = 1.0
"""Longest time any command of ours blocks inside Redis; every socket time-out is larger than this."""
MAX_API_CONNECTIONS = 16
"""Redis answers one call at a time, in tens of microseconds; more connections only queue there instead of here."""
HEALTH_CHECK_INTERVAL_S = 15
RETRY_AFTER_OUTAGE_S = 2.0
MINIMUM_MAJOR_VERSION = 7

assert MAX_BLOCK_S < API_TIMEOUT_S < WORKER_TIMEOUT_S

# One more try, at once and only for a broken connection: a pooled socket from before a restart of Redis must not
# fail a request. A time-out is not tried again; the caller has waited long enough.
NUM_RETRIES = 1
RETRIED_ERRORS = (redis.exceptions.ConnectionError,)

COMMON: dict[str, Any] = {
    "protocol": 2,
    "decode_responses": True,
    "encoding": "utf-8",
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "health_check_interval": HEALTH_CHECK_INTERVAL_S,
}


def _pool_of(kind: type[Pool], url: str, **options: Any) -> Pool:
    if not url.startswith("unix://"):
        options["socket_keepalive"] = True
    try:
        pool: Pool = kind.from_url(url, **COMMON, **options)
    except ValueError as error:  # the URL itself may hold a password: not shown
        raise ConfigError(
            f"The Redis URL cannot be used: {error}; write redis://[user:password@]host:port/0, rediss:// or unix://."
        ) from None
    return pool


def async_redis(url: str) -> redis.asyncio.Redis:
    """Return a client for one event loop; callers beyond its connections wait for a free one instead of failing."""
    pool = _pool_of(
        redis.asyncio.BlockingConnectionPool,
        url,
        max_connections=MAX_API_CONNECTIONS,
        timeout=API_TIMEOUT_S,
        # The time-out is `answer_in_time`, around the whole call: redis-py's own starts a task for each command
        # and can swallow a cancellation in Python 3.11.
        socket_timeout=None,
        retry=AsyncRetry(NoBackoff(), NUM_RETRIES, RETRIED_ERRORS),
    )
    return redis.asyncio.Redis.from_pool(pool)


def blocking_redis(url: str) -> redis.Redis:
    """Return a client that threads may share: each call takes its own connection from the pool."""
    pool = _pool_of(
        redis.ConnectionPool,
        url,
        socket_timeout=WORKER_TIMEOUT_S,
        retry=Retry(NoBackoff(), NUM_RETRIES, RETRIED_ERRORS),
    )
    return redis.Redis.from_pool(pool)


REFUSALS = {
    "MISCONF": "cannot save what it is told, as with a full disk",
    "NOREPLICAS": "has fewer replicas than it must have to take writes",
    "BUSY": "runs a script that does not end",
    "MASTERDOWN": "is a replica without its master",
    "CLUSTERDOWN": "belongs to a cluster that is down",
    "NOAUTH": "asks for a password",
    "WRONGPASS": "does not know this user and password any more",
    "NOPERM": "does not allow its user what the queue does",
}
"""What a server that answers, but does not work, says first. Like an absence it ends by itself or by an operator."""


@contextmanager
def redis_errors_as_not_ready() -> Iterator[None]:
    """Turn what only an operator can mend (Redis away, loading, read-only, full, refusing) into `NotReady`."""
    try:
        yield
    except redis.exceptions.RedisError as error:
        code = code_of(error)
        if code == "OOM":
            raise NotReady(
                "The queue's Redis is out of memory and takes no new jobs; try again later.",
                code="redis_out_of_memory",
                retry_after_s=10.0,
            ) from error
        if code == "READONLY":
            raise NotReady(
                "The queue's Redis is a read-only replica at the moment; try again in a few seconds.",
                code="redis_read_only",
                retry_after_s=RETRY_AFTER_OUTAGE_S,
            ) from error
        if code in REFUSALS:
            raise NotReady(
                f"The queue's Redis {REFUSALS[code]} ({code}); try again in {RETRY_AFTER_OUTAGE_S:g} s.",
                code="redis_refuses",
                retry_after_s=RETRY_AFTER_OUTAGE_S,
            ) from error
        if isinstance(error, redis.exceptions.ConnectionError | redis.exceptions.TimeoutError):
            raise NotReady(
                f"The queue's Redis does not answer ({type(error).__name__}); try again in {RETRY_AFTER_OUTAGE_S:g} s.",
                code="redis_unavailable",
                retry_after_s=RETRY_AFTER_OUTAGE_S,
            ) from error
        raise


def code_of(error: redis.exceptions.RedisError) -> str:
    """Return the first word of the server's own answer; redis-py takes it off where it knows it."""
    return error.status_code or str(error).split(" ", maxsplit=1)[0]


@contextmanager
def no_access_is_config_error() -> Iterator[None]:
    """At the start, before `redis_errors_as_not_ready`: waiting mends neither a wrong password nor missing rights."""
    try:
        yield
    except (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        what = "asks for another user and password"
        if isinstance(error, redis.exceptions.NoPermissionError):
            what = f"says that this user may not do what the queue does ({error})"
        raise ConfigError(
            f"The queue's Redis {what}; set SMOLLM_REDIS_URL to redis://user:password@host:port/0."
        ) from None


@asynccontextmanager
async def answer_in_time() -> AsyncIterator[None]:
    """For every call of `async_redis`: at most `API_TIMEOUT_S`, and errors as `redis_errors_as_not_ready` has them."""
    with redis_errors_as_not_ready():
        try:
            async with asyncio.timeout(API_TIMEOUT_S):
                yield
        except TimeoutError as error:
            raise redis.exceptions.TimeoutError(f"no answer within {API_TIMEOUT_S:g} s") from error


def check_server(client: redis.Redis) -> str:
    """Return the server's name and version.

    Raises:
        ConfigError: it cannot hold the queue, or lets nobody in with this URL.
        NotReady: it is away.
    """
    with redis_errors_as_not_ready(), no_access_is_config_error():
        return describe_server(dict(client.info("server")), dict(client.info("memory")))


def describe_server(server: dict[str, Any], memory: dict[str, Any]) -> str:
    """Judge two sections of INFO; a server that may evict keys would drop accepted jobs silently."""
    version = str(server.get("redis_version", "0"))
    name = f"Redis {version}"
    if "valkey_version" in server:
        name = f"Valkey {server['valkey_version']}"
    if int(version.split(".", maxsplit=1)[0]) < MINIMUM_MAJOR_VERSION:
        raise ConfigError(f"{name} is too old for the queue; use Redis >= 7.0 or Valkey >= 7.2.")
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigError(
            f"{name} may evict jobs (maxmemory-policy {policy}); set it to noeviction: "
            f"`CONFIG SET maxmemory-policy noeviction`."
        )
    return name
