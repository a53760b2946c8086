"""What `prepare` asks of a source's text, wherever it lies: files here, a dataset on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol


class Documents(Iterator[str], Protocol):
    """A text's documents one by one, and where the ones not given yet begin."""

    def position(self) -> Any:
        """A JSON value that `Text.open` goes on from."""


class Text(Protocol):
    """A source's text, not read yet."""

    @property
    def source(self) -> str: ...

    @property
    def origin(self) -> str:
        """What it is and where it came from, for people and manifests."""

    @property
    def max_tokens(self) -> int | None:
        """Where to stop a text without an end; None: all of it is read."""

    def identity(self) -> dict[str, Any]:
        """What two texts share exactly when they are the same text, as JSON values."""

    def open(self, position: Any = None) -> Documents:
        """Read from the beginning, or from what `position` of an earlier reader said."""
