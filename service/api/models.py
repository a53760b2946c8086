"""The models clients can name: what stands in `models/`, with tokenizers, kept fresh. Loads no weights."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from service.errors import NotFound, NotReady
from shared.catalog import ModelFolder, choose_default_model, list_model_folders, load_tokenizer
from shared.errors import GenerationError, SmolLMError, StorageError
from shared.tokenizer import Tokenizer

log = logging.getLogger("service.api")

LOOK_AGAIN_S = 0.5
"""A name that is not known is worth one more look at the folder, at most this often."""


@dataclass(frozen=True)
class Model:
    """One model as the API needs it."""

    folder: ModelFolder
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def context_length(self) -> int:
        return self.folder.config.max_position_embeddings


class Models:
    """The models there are now."""

    def __init__(self, models_dir: Path, *, preferred: str | None) -> None:
        self._models_dir = models_dir
        self._preferred = preferred
        self._models: dict[str, Model] = {}
        self._default: str | None = None
        self._refused: dict[str, str] = {}
        """By name: why a model was left out when it was last looked at."""
        self._looked_at = 0.0
        self._lock = asyncio.Lock()

    @property
    def all(self) -> list[Model]:
        return list(self._models.values())

    @property
    def default(self) -> str | None:
        return self._default

    def find(self, name: str) -> Model | None:
        """Return a model if it is known now."""
        return self._models.get(name)

    async def refresh(self, *, older_than_s: float = 0.0) -> None:
        """Look at the folder again, unless somebody did within `older_than_s`."""
        async with self._lock:
            if time.monotonic() - self._looked_at >= older_than_s:
                await asyncio.to_thread(self._refresh)

    async def get(self, name: str | None) -> Model:
        """Return a model by name, the default one for None.

        Raises:
            NotFound: nothing of that name stands in the models folder.
            NotReady: there is no model at all yet, or the models folder cannot be read.
        """
        if (name or self._default) not in self._models:
            try:
                await self.refresh(older_than_s=LOOK_AGAIN_S)
            except StorageError as error:  # no fault of who asks, and no path of ours for them to read
                raise NotReady("The models folder cannot be read; the log says why.", retry_after_s=5) from error
        if name is None:
            if self._default is None:
                raise NotReady(
                    f"There is no model in {self._models_dir} yet: train one or run `python -m shared.pretrained`.",
                    code="no_model",
                    retry_after_s=5,
                )
            return self._models[self._default]
        if name not in self._models:
            known = ", ".join(sorted(self._models)) or "none yet"
            raise NotFound(
                f"There is no model {name[:100]!r}; there are: {known}.", param="model", code="model_not_found"
            )
        return self._models[name]

    def _refresh(self) -> None:
        folders = list_model_folders(self._models_dir)
        models = {}
        for name, folder in folders.items():
            known = self._models.get(name)
            if known is not None and known.folder is folder:  # the same object as long as its files stay the same
                models[name] = known
                continue
            try:
                tokenizer = load_tokenizer(folder)
                warm_up(tokenizer)
            except Exception as error:  # whatever is wrong with one model, the others are served
                is_ours = not isinstance(error, (SmolLMError, OSError))
                reason = f"{type(error).__name__}: {error}" if is_ours else str(error)
                if self._refused.get(name) != reason:
                    log.warning("model %s is left out: %s", name, reason, exc_info=is_ours)
                self._refused[name] = reason
                continue
            self._refused.pop(name, None)
            models[name] = Model(folder, tokenizer)
            log.info("model %s, revision %s", name, folder.revision[:12])
        default, reason = choose_default_model({n: m.folder for n, m in models.items()}, self._preferred)
        if default != self._default:
            log.info("default model is %s: %s", default, reason)
        self._models, self._default, self._looked_at = models, default, time.monotonic()


def warm_up(tokenizer: Tokenizer) -> None:
    """Do here, in a thread, what the first request would otherwise wait for: tables, a compiled template."""
    _ = tokenizer.bytes_of_tokens, tokenizer.vocabulary
    if tokenizer.has_chat_template:
        with contextlib.suppress(GenerationError):
            tokenizer.render_chat([{"role": "user", "content": ""}])
