"""Logging set-up: a line of text each where a person reads, a JSON object each where a container collects; patience."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from shared.errors import SmolLMError

LogStyle = Literal["auto", "text", "json"]

CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))


def configure_logging(process: str, *, style: LogStyle = "auto", level: int = logging.INFO) -> None:
    """Send every logger of this process to standard error, uvicorn's and redis's included.

    Args:
        process: what this process is, "api" or "worker"; stands in every line.
        style: "auto" is JSON inside a container without a terminal, text elsewhere.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(json_formatter(process) if wants_json(style) else text_formatter(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("httpx", "httpx2", "httpcore"):  # they report every request as news
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def told_every(every_s: float, tell: Callable[[float], None]) -> Iterator[None]:
    """While the block runs, call `tell` from a thread now and then with the seconds so far; never where it is quick."""
    ended, started = threading.Event(), time.monotonic()

    def go_on() -> None:
        while not ended.wait(every_s):
            tell(time.monotonic() - started)

    teller = threading.Thread(target=go_on, name="told-every", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


class GoesOn:
    """Around each turn of a loop that must outlive what its turns raise.

    What a user can mend is one warning per sentence, until a turn succeeds; the rest comes with its place, each time.
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._told: str | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, SmolLMError):
            if str(error) != self._told:
                self._log.warning("%s goes on: %s", self._what, error)
            self._told = str(error)
        elif isinstance(error, Exception):
            self._log.error("%s goes on", self._what, exc_info=error)
        elif error is None:
            self._told = None
        return isinstance(error, Exception)


def wants_json(style: LogStyle) -> bool:
    if style != "auto":
        return style == "json"
    in_container = any(mark.exists() for mark in CONTAINER_MARKS)
    return in_container and not sys.stderr.isatty() and importlib.util.find_spec("pythonjsonlogger") is not None


def text_formatter(process: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s %(levelname)-7s {process}: %(message)s", datefmt="%H:%M:%S")


def json_formatter(process: str) -> logging.Formatter:
    from pythonjsonlogger.core import RESERVED_ATTRS  # only the service installs it
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger"},
        static_fields={"process": process},
        timestamp="time",
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals: the message once more
    )
