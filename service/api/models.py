"""The models clients can name: what stands in `models/`, with tokenizers, kept fresh. Loads no weights."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import NotFound, NotReady
from service.queue.job import WorkerInfo
from shared.catalog import ModelFolder, choose_default_model, list_model_folders, load_tokenizer
from shared.errors import GenerationError, SmolLMError, StorageError
from shared.tokenizer import Tokenizer

log = logging.getLogger("service.api")

LOOK_AGAIN_S = 0.5
"""A name that is not known is worth one more look at the folder, at most this often."""


Workers = Callable[[], Awaitable[Sequence[WorkerInfo]]]
"""Ask for the live workers; raises `NotReady` while nobody can tell."""


@dataclass(frozen=True)
class Model:
    """One model as the API needs it."""

    folder: ModelFolder
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def revision(self) -> str:
        return self.folder.revision

    @property
    def context_length(self) -> int:
        return self.folder.config.max_position_embeddings


class Models:
    """The models there are now."""

    def __init__(self, models_dir: Path, *, preferred: str | None, workers: Workers) -> None:
        self._models_dir = models_dir
        self._preferred = preferred
        self._workers = workers
        self._read: dict[str, Model] = {}
        """As they stand in the folder."""
        self._models: dict[str, Model] = {}
        """As they are served."""
        self._waiting: dict[str, Model] = {}
        """Read, and not yet served: some worker does not have them yet."""
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
                await asyncio.to_thread(self._read_folder)
                await self._serve()
                self._looked_at = time.monotonic()

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

    def _read_folder(self) -> None:
        read = {}
        for name, folder in list_model_folders(self._models_dir).items():
            known = self._read.get(name)
            if known is not None and known.folder is folder:  # the same object as long as its files stay the same
                read[name] = known
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
                if known is not None:  # workers go on with it too
                    read[name] = known
                continue
            self._refused.pop(name, None)
            read[name] = Model(folder, tokenizer)
        self._read = read

    async def _serve(self) -> None:
        """Serve what was read, but a replaced model as it was until its workers have the new one, if it has any."""
        models, waiting = {}, {}
        for name, model in self._read.items():
            served = self._models.get(name)
            if served is not None and identity(served.folder) != identity(model.folder) and await self._waits(model):
                models[name], waiting[name] = served, model
                if self._waiting.get(name) is not model:
                    log.info(
                        "model %s was replaced; revision %s goes on until its workers have it",
                        name,
                        served.revision[:12],
                    )
                continue
            models[name] = model
            if served is not model:
                log.info("model %s, revision %s", name, model.revision[:12])
        default, reason = choose_default_model({name: model.folder for name, model in models.items()}, self._preferred)
        if default != self._default:
            log.info("default model is %s: %s", default, reason)
        self._models, self._waiting, self._default = models, waiting, default

    async def _waits(self, model: Model) -> bool:
        """Whether a live worker still takes jobs for what stood there before; all wait while nobody can say."""
        try:
            workers = await self._workers()
        except NotReady:
            return True
        serving = [worker for worker in workers if model.name in worker.models and not worker.draining]
        return not all(has(worker, model.folder) for worker in serving)


def identity(folder: ModelFolder) -> tuple[str, str | None]:
    """What API and workers must agree on."""
    return folder.revision, folder.tokenizer_sha256


def has(worker: WorkerInfo, folder: ModelFolder) -> bool:
    """Whether a worker says that it takes jobs for just this."""
    tokenizer_sha256 = worker.tokenizers.get(folder.name, folder.tokenizer_sha256)
    return (worker.models.get(folder.name), tokenizer_sha256) == identity(folder)


def warm_up(tokenizer: Tokenizer) -> None:
    """Do here, in a thread, what the first request would otherwise wait for: tables, a compiled template."""
    _ = tokenizer.bytes_of_tokens, tokenizer.vocabulary
    if tokenizer.has_chat_template:
        with contextlib.suppress(GenerationError):
            tokenizer.render_chat([{"role": "user", "content": ""}])
