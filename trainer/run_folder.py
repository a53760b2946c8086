"""Where everything of one run lies, and what is in its JSON-lines files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.files import only_one_process, reading_errors, storage_errors, write_atomically
from trainer.changes import changes_on_resume
from trainer.config import TrainConfig
from trainer.recipe import load_recipe, to_toml
from trainer.state import Checkpoints


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME/, its files by name."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def training_log(self) -> Path:
        return self.path / "training.log"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training the same run; the lock goes with the process, however it ends.

        Raises:
            ConfigError: another process is training it.
            StorageError: the disk refused.
        """

        def refuse() -> None:
            raise ConfigError(
                f"another process is training run {self.name!r}; wait for it, or train under another --run NAME"
            )

        with only_one_process(self.path / ".lock", when_taken=refuse):
            yield

    def open(self, config: TrainConfig, *, accept_changes: bool = False) -> list[str]:
        """Check that the run in the folder, if any, is the one `config` describes; keep the resolved recipe there.

        Args:
            accept_changes: let updates to come be other ones than the run was started for.

        Returns:
            `key (old -> new)` of what differs and may.

        Raises:
            ConfigError: the run there was trained under another recipe; the changed keys are named.
            StorageError: the disk refused.
        """
        allowed: list[str] = []
        steps = Checkpoints(self.checkpoints, keep=config.keep_checkpoints).steps()
        if self.recipe.is_file() and steps:
            changes = changes_on_resume(self.read_recipe(), config, step=max(steps))
            forbidden = changes.forbidden + ([] if accept_changes else changes.acceptable)
            if forbidden:
                way = "" if changes.forbidden else "go on with the change by --accept-changes, "
                raise ConfigError(
                    f"run {self.name!r} was started with another recipe: {', '.join(forbidden)}; change that back, "
                    f"{way}or train under another name with --run NAME"
                )
            allowed = changes.safe + changes.acceptable
        write_atomically(self.recipe, to_toml(config))
        return allowed

    def read_recipe(self) -> TrainConfig:
        """Return the recipe the run was last trained under.

        Raises:
            ConfigError: there is no such run, or its recipe cannot be read.
        """
        with reading_errors(self.recipe, ConfigError):
            is_there = self.recipe.is_file()
        if not is_there:
            known = ", ".join(sorted(path.parent.name for path in self.path.parent.glob("*/recipe.toml"))) or "none"
            raise ConfigError(f"there is no run {self.name!r} in {self.path.parent}; known runs: {known}")
        return load_recipe(str(self.recipe))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; what is no row, such as a last line that a crash cut short, is left out.

    Raises:
        StorageError: it may not be read.
    """
    if not path.is_file():
        return []
    with reading_errors(path):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line in one write, so that a reader never meets half a row of a living run.

    Raises:
        StorageError: the disk refused.
    """
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(as_line(row))


def keep_rows_through(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop rows of steps after `step`, which a resumed run will write again, and return those that stay.

    What is no row goes too: onto a last line that was cut short, the next row would be glued.
    """
    kept = [row for row in read_rows(path) if row.get("step", row.get("at_step", 0)) <= step]
    text = "".join(map(as_line, kept))
    if path.is_file() and path.read_bytes() != text.encode():
        write_atomically(path, text)
    return kept


def as_line(row: dict[str, Any]) -> str:
    """One row as one line for every reader: in plain ASCII, for Unicode has line breaks of its own."""
    return json.dumps(row) + "\n"
