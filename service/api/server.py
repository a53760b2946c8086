"""The API as a process: check what it needs, take the port, serve until told to stop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from service.api.app import create_app
from service.api.wire import BoundedHttp
from service.api_keys import KeyRing
from service.errors import NotReady
from service.queue.connection import blocking_redis, check_server
from service.settings import Settings
from service.tracing import open_tracer
from shared.errors import ConfigError

log = logging.getLogger("service.api")

BACKLOG = 2048
"""Connections the system keeps while the process is busy; the queue is the place that refuses."""


def run_api(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM.

    Streams get `shutdown_grace_s` to end by themselves. Jobs of those that do not are not cancelled: their clients
    go on at another API process with `Last-Event-ID`.

    Raises:
        ConfigError: the port cannot be taken, or Redis may lose jobs as it is configured.
    """
    _check_redis(settings)
    keys = KeyRing(
        settings.api_keys, settings.api_keys_file
    ).keys  # a file at fault is a sentence here, not a traceback
    listener = take_port(settings.api_host, settings.api_port)
    log.info("%d API keys are known; %s", len(keys), "one is asked for" if keys else "none is asked for")
    if not keys and not is_loopback(settings.api_host):
        log.warning(
            "NO API KEY IS ASKED FOR and the API listens on %s: whoever reaches port %d may use it. Set "
            "SMOLLM_API_KEYS or SMOLLM_API_KEYS_FILE (see `python -m service key`), or SMOLLM_API_HOST=127.0.0.1.",
            settings.api_host,
            settings.api_port,
        )
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, tracer=open_tracer("api", settings.otlp_endpoint)),
            http=BoundedHttp,
            access_log=False,
            log_config=None,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=round(settings.shutdown_grace_s),
        )
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    # uvicorn handles both while it serves, and raises them again when it is done: that must be a clean end.
    signal.signal(signal.SIGTERM, _exit_cleanly)
    signal.signal(signal.SIGINT, _exit_cleanly)
    log.info("listening on http://%s:%d, documentation at /docs", settings.api_host, settings.api_port)
    with listener:
        server.run(sockets=[listener])
    if not server.started:
        raise ConfigError("The API did not start; the lines above say why.")


def take_port(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the port is taken or not allowed, or the host is no address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        what = f"Port {port} on {host} cannot be used: {error.strerror}; set API_PORT or SMOLLM_API_HOST."
        if error.errno == errno.EADDRINUSE:
            example = f"API_PORT={port + 10}"
            what = f"Port {port} on {host} is taken; stop what runs there or set API_PORT, for example {example}."
        elif error.errno == errno.EACCES:
            what = f"Port {port} needs more rights than this process has; set API_PORT to a number above 1023."
        raise ConfigError(what) from None
    except OverflowError:
        raise ConfigError(f"Port {port} is no port; set API_PORT to a number from 1 to 65535.") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_redis(settings: Settings) -> None:
    client = blocking_redis(settings.redis_url.get_secret_value())
    try:
        log.info("queue in %s", check_server(client))
    except NotReady as error:
        log.warning("%s Requests are answered 503 until then.", error)
    finally:
        client.close()


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Streams that outlast the grace are cancelled; uvicorn says how many, and would add a traceback for each."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)


def _exit_cleanly(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    sys.exit(0)
