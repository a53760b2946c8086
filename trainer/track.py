"""Live curves outside the run's folder, where a recipe asks for them: trackio (local) or Weights & Biases.

Both speak the same three words: init, log, finish. metrics.jsonl stays the truth; what is sent repeats it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from shared.errors import ConfigError, first_line

logger = logging.getLogger("trainer")

PROJECT = "smollm2-curriculum"
INSTALLS = {"trackio": "pip install 'smollm2-curriculum[track]'", "wandb": "pip install wandb"}


class Tracker:
    """One run at one of them; with "off" nothing is imported and nothing is sent."""

    def __init__(self, which: str, *, run: str, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with, the tracked run of this name.

        Raises:
            ConfigError: the package is not installed, or cannot begin.
        """
        self.run: Any = None
        if which == "off":
            return
        try:
            package = importlib.import_module(which)
        except ImportError:
            raise ConfigError(
                f"track is {which!r} and the package {which} is not installed: {INSTALLS[which]}, or set track to 'off'"
            ) from None
        try:
            self.run = package.init(project=PROJECT, name=run, config=dict(settings), resume="allow")
        except Exception as error:  # no login, no network, no disk: each package has errors of its own
            raise ConfigError(
                f"track is {which!r} and it cannot begin ({first_line(error)}): mend that, or set track to 'off'"
            ) from error

    def log(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Send numbers of one step; a failure is told and the training goes on."""
        if self.run is None:
            return
        try:
            self.run.log(dict(numbers), step=step)
        except Exception as error:
            logger.warning("tracking stopped at step %d: %s", step, error)
            self.run = None

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
            self.run = None
