"""What a person sees: training.log with everything, and a console that stays readable.

On a terminal progress is one line that renews itself; elsewhere it is a plain line every few seconds.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from shared.errors import SmolLMError
from shared.files import storage_errors
from shared.log import told_every

PLAIN_PROGRESS_EVERY_S = 10.0
LIFE_EVERY_S = 3.0


class RunLog:
    """Hear the loggers "trainer" and "shared", which brings public weights, as long as a run lasts."""

    def __init__(self, path: Path, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.spoke_at = time.monotonic()
        self.logger = logging.getLogger("trainer")
        with storage_errors(path):
            self.file_handler = logging.FileHandler(path, encoding="utf-8")
        self.file_handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        self.console_handler = ConsoleHandler(self.stream)
        self.heard = {logger: (logger.propagate, logger.level) for logger in (self.logger, logging.getLogger("shared"))}
        for logger in self.heard:
            logger.addHandler(self.file_handler)
            logger.addHandler(self.console_handler)
            logger.propagate = False
            logger.setLevel(logging.INFO)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, SmolLMError):  # the console gets it from `__main__`
            self.to_file(f"stopped: {error}")
        self.close()

    def say(self, text: str) -> None:
        """Write to both; several lines stay together."""
        self.logger.info(text)
        self.spoke_at = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since it said anything."""
        return time.monotonic() - self.spoke_at

    def progress(self, text: str, live: Callable[[int], str] | None = None) -> None:
        """Write a line of progress: to the file always, to the console as it can bear.

        Args:
            live: the text for a terminal of so many columns, where it is another than the log's.
        """
        self.to_file(text)
        self.console_handler.progress(text, live)
        self.spoke_at = time.monotonic()

    def alive(self, what: str, *, every_s: float = LIFE_EVERY_S) -> AbstractContextManager[None]:
        """While a block runs, tell the console every few seconds what takes so long; nothing where it is quick."""

        def tell(seconds: float) -> None:
            self.console_handler.alive(f"{what}: {seconds:.0f} s so far")
            self.spoke_at = time.monotonic()

        return told_every(every_s, tell)

    def to_file(self, text: str) -> None:
        self.file_handler.handle(self.logger.makeRecord("trainer", logging.INFO, "", 0, text, (), None))

    def close(self) -> None:
        self.console_handler.end_progress()
        for logger, (propagated, level) in self.heard.items():
            logger.removeHandler(self.file_handler)
            logger.removeHandler(self.console_handler)
            logger.propagate = propagated
            logger.setLevel(level)
        self.file_handler.close()


class ConsoleHandler(logging.Handler):
    """Messages on lines of their own, with one line of progress below them on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self.live = stream.isatty()
        self.shows_progress = False
        self.last_plain = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        self.end_progress()
        prefix = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        self.stream.write(prefix + record.getMessage() + "\n")
        self.stream.flush()

    def alive(self, text: str) -> None:
        """A line of life, from another thread than the one that works."""
        self.acquire()
        try:
            self.last_plain = float("-inf")  # who tells it has waited long enough
            self.progress(text)
        finally:
            self.release()

    def progress(self, text: str, live: Callable[[int], str] | None = None) -> None:
        if self.live:
            shown = live(shutil.get_terminal_size().columns) if live else text
            self.stream.write(f"\r\x1b[2K{shown}")  # back to the first column, wipe the line
            self.shows_progress = True
        elif time.monotonic() - self.last_plain >= PLAIN_PROGRESS_EVERY_S:
            self.last_plain = time.monotonic()
            self.stream.write(text + "\n")
        self.stream.flush()

    def end_progress(self) -> None:
        """Leave the last progress line standing and go on below it."""
        if self.shows_progress:
            self.stream.write("\n")
            self.shows_progress = False
            self.stream.flush()
