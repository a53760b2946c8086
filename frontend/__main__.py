"""`python -m frontend`: serve the page."""

from __future__ import annotations

import argparse
import errno
import signal
import socket
import sys

import uvicorn
from pydantic import ValidationError

from frontend.settings import Settings, get_settings

SHUTDOWN_GRACE_S = 2


DESCRIPTION = """\
The web page over the REST API of `python -m service api`. It runs until Ctrl-C or SIGTERM.

  UI_PORT=7870 SMOLLM_API_URL=http://127.0.0.1:8010 python -m frontend

All its settings are environment variables; they stand with their defaults in .env.example."""


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m frontend", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    # uvicorn handles both while it serves, and raises them again when it is done: that must be a clean end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        settings = get_settings()
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        print(f"The setting {fault['loc'][-1]} is {fault['input']!r}: {fault['msg']}.", file=sys.stderr)
        return 2
    try:
        listener = listen(settings)
    except OSError as error:
        print(explain(error, settings), file=sys.stderr)
        return 2
    from frontend.app import create_app  # seconds of imports that a taken port does not wait for

    config = uvicorn.Config(
        create_app(settings),
        log_level="warning",
        # Pages that are open hold streams that never end by themselves.
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
    )
    print(f"the page: http://{settings.host}:{settings.port}, over the API at {settings.api_url}", flush=True)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def listen(settings: Settings) -> socket.socket:
    """Return a socket that has the port."""
    address = (settings.host, settings.port)
    family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    return socket.create_server(address, family=family)


def explain(error: OSError, settings: Settings) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {settings.port} on {settings.host} is taken: set UI_PORT to a free one."
    return f"The page cannot listen on {settings.host}:{settings.port} ({error.strerror}): set UI_HOST and UI_PORT."


if __name__ == "__main__":
    sys.exit(main())
