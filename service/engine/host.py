"""Model folders as running engines: loaded beside the running ones, swapped in between two steps, dropped when done.

A new revision takes all new jobs at once. The old one keeps its sequences until the last has ended, so no stream
changes its model in mid-answer and none is cut.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from service.engine.engine import Engine
from service.engine.packing import can_pack, pack_linears
from service.engine.sequence import Sequence
from shared.catalog import ModelFolder, list_model_folders
from shared.checkpoint import load_model
from shared.errors import SmolLMError
from shared.sampling import SamplingParams
from shared.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RETRY_S = 30.0
"""A folder that could not be loaded is tried again after this long, or as soon as it changes."""
WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """One revision of one model, running."""

    folder: ModelFolder
    engine: Engine

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def revision(self) -> str:
        return self.folder.revision


Load = Callable[[ModelFolder], Host]


def load_host(
    folder: ModelFolder, *, device: torch.device, dtype: torch.dtype, num_slots: int, max_cached_tokens: int
) -> Host:
    """Load a folder's weights and tokenizer, and run a few tokens so that the first request finds everything warm.

    Raises:
        WeightsError, TokenizerError: what is wrong with the folder.
    """
    started_s = time.monotonic()
    tokenizer = Tokenizer.from_folder(folder.path)
    tokenizer.check_fits(folder.config)
    _ = tokenizer.bytes_of_tokens, tokenizer.vocabulary  # tables that the first request would wait for
    model = load_model(folder, device=device, dtype=dtype)
    if can_pack(device, dtype):
        pack_linears(model)
    engine = Engine(model, tokenizer, num_slots=num_slots, max_cached_tokens=max_cached_tokens)
    prompt_ids = [tokenizer.end_of_text_id] * min(WARM_UP_TOKENS, folder.config.max_position_embeddings)
    engine.add(Sequence(id="warm-up", prompt_ids=prompt_ids, params=SamplingParams(temperature=0.0), max_new_tokens=2))
    while engine.has_work:
        engine.step()
    log.info(
        "loaded %s (%.1f million numbers, %s on %s, revision %s) in %.1f s",
        folder.name,
        folder.config.num_parameters / 1e6,
        str(dtype).removeprefix("torch."),
        device,
        folder.revision[:12],
        time.monotonic() - started_s,
    )
    return Host(folder=folder, engine=engine)


class Hosts:
    """Every usable model of a folder. A thread looks for changes and loads; `adopt` makes them visible."""

    def __init__(self, models_dir: Path, load: Load, *, poll_s: float) -> None:
        self.models_dir = models_dir
        self.load = load
        self.poll_s = poll_s
        self.current: dict[str, Host] = {}
        """By name: the revision that takes new jobs."""
        self.retired: list[Host] = []
        """Older revisions that still have sequences."""
        self._changes: queue.SimpleQueue[Host | str] = queue.SimpleQueue()
        self._loaded: dict[str, ModelFolder] = {}
        self._failed: dict[str, tuple[ModelFolder, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="model-watch", daemon=True)

    def start(self) -> None:
        """Begin to look and load."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    @property
    def all(self) -> list[Host]:
        """Every engine that may have work."""
        return [*self.current.values(), *self.retired]

    def adopt(self) -> bool:
        """Let loaded models take new jobs and drop engines that are done; True when what is offered changed."""
        self.retired = [host for host in self.retired if host.engine.has_work]
        changed = False
        while True:
            try:
                change = self._changes.get_nowait()
            except queue.Empty:
                return changed
            changed = True
            name = change if isinstance(change, str) else change.name
            if name in self.current:
                self.retired.append(self.current.pop(name))
            if isinstance(change, Host):
                self.current[name] = change

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                self.refresh()
            except Exception:  # this thread must outlive whatever one bad folder does
                log.exception("could not look through %s", self.models_dir)
            self._stop.wait(self.poll_s)

    def refresh(self) -> None:
        """Look once through the folder; load what is new or changed, note what is gone."""
        folders = list_model_folders(self.models_dir)
        for name in [name for name in self._loaded if name not in folders]:
            log.info("%s is gone from %s; it takes no more jobs", name, self.models_dir)
            del self._loaded[name]
            self._changes.put(name)
        for name, folder in folders.items():
            if self._loaded.get(name) == folder or self._stop.is_set():
                continue
            failed, retry_at_s = self._failed.get(name, (None, 0.0))
            if failed == folder and time.monotonic() < retry_at_s:
                continue
            try:
                host = self.load(folder)
            except (SmolLMError, OSError) as error:
                log.warning("cannot serve %s: %s", name, error)
                self._failed[name] = (folder, time.monotonic() + RETRY_S)
                continue
            self._failed.pop(name, None)
            self._loaded[name] = folder
            self._changes.put(host)
