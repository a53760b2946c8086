"""Model folders as running engines: loaded beside the running ones, swapped in between two steps, dropped when done.

A new revision takes all new jobs at once. The old one keeps its sequences until the last has ended, so no stream
changes its model in mid-answer and none is cut. Jobs whose ids only the old one can read are still its own.
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

from service.engine.drafting import MOST
from service.engine.engine import Engine
from service.engine.networks import Weights, load_network
from service.engine.pace import STALL
from service.engine.sequence import Sequence
from shared.catalog import ModelFolder, list_model_folders, load_tokenizer
from shared.device import is_out_of_memory
from shared.errors import SmolLMError, first_line
from shared.log import GoesOn
from shared.sampling import SamplingParams

log = logging.getLogger(__name__)

RETRY_S = 30.0
"""A folder that could not be loaded is tried again after this long, or as soon as it changes."""
KEEP_S = 30.0
"""A replaced revision with another tokenizer goes on taking jobs of its own ids until none came for this long: API
processes write them until every worker has the new one."""
WARM_UP_PROMPTS, WARM_UP_TOKENS = (16, 64, 64), 12


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


Loader = Callable[[ModelFolder], Host]


def load_host(
    folder: ModelFolder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_slots: int,
    max_cached_tokens: int,
    speculate: bool = True,
    share_prefixes: bool = True,
    weights: Weights = "dtype",
    kernels: str = "auto",
) -> Host:
    """Load a folder's weights and tokenizer, and run a few tokens so that the first request finds everything warm.

    The other settings are `Engine`'s.

    Raises:
        WeightsError, TokenizerError: what is wrong with the folder.
    """
    started_s = time.monotonic()
    tokenizer = load_tokenizer(folder)
    _ = tokenizer.bytes_of_tokens, tokenizer.vocabulary  # what the first request would wait for
    model, network = load_network(folder, device=device, dtype=dtype, weights=weights, kernels=kernels)
    engine = Engine(
        model,
        tokenizer,
        num_slots=num_slots,
        max_cached_tokens=max_cached_tokens,
        speculate=speculate,
        share_prefixes=share_prefixes,
        network=network.value,
    )
    warm_up(engine)
    log.info(
        "loaded %s (%.1f million numbers, revision %s) in %.1f s; it is computed by %s on %s",
        folder.name,
        folder.config.num_parameters / 1e6,
        folder.revision[:12],
        time.monotonic() - started_s,
        network.reason,
        device,
    )
    log.info("%s", describe_choices(engine))
    return Host(folder=folder, engine=engine)


def warm_up(engine: Engine) -> None:
    """Run a stream and two prompts beside it: everything is touched once, and the engine learns its pace."""
    engine.network.prepare(engine.cache)
    end, room = engine.tokenizer.end_of_text_id, engine.cache.slot_length
    for number, length in enumerate(WARM_UP_PROMPTS):
        prompt_ids = [end] * min(length, max(1, room - WARM_UP_TOKENS))
        prompt_ids[0] = number % engine.tokenizer.vocab_size  # nothing to share
        engine.add(
            Sequence(
                id=f"warm-up {number}",
                prompt_ids=prompt_ids,
                params=SamplingParams(temperature=0.0),
                max_new_tokens=WARM_UP_TOKENS,
            )
        )
        for _ in range(3):
            engine.step()
    while engine.has_work:
        engine.step()
    engine.forget_statistics()


def describe_choices(engine: Engine) -> str:
    """What the engine measured at the start and does about it; it goes on learning."""
    pace = engine.pace
    guesses = "off by SMOLLM_SPECULATION"
    if engine.speculate:
        alone, among = (pace.num_drafts_worth(streams, 0.8, MOST) for streams in (1, 32))
        guesses = f"up to {alone} beside one stream and {among} beside 32 where 4 of 5 prove right"
    return (
        f"measured {pace}: beside one stream, prompts are computed in pieces of {pace.prompt_tokens_beside(1)} tokens "
        f"and beside 32 of {pace.prompt_tokens_beside(32)}, so that streams wait {STALL:.0%} longer; guesses: {guesses}"
    )


class Hosts:
    """Every usable model of a folder. A thread looks for changes and loads; `adopt` makes them visible."""

    def __init__(self, models_dir: Path, load: Loader, *, poll_s: float) -> None:
        self.models_dir = models_dir
        self.load = load
        self.poll_s = poll_s
        self.keep_s = KEEP_S
        self.current: dict[str, Host] = {}
        """By name: the revision that takes new jobs."""
        self.retired: list[Host] = []
        """Older revisions that still have sequences, or may get more."""
        self._needed_until_s: dict[Host, float] = {}
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

    def find(self, name: str, tokenizer_sha256: str | None) -> Host | None:
        """Return the newest revision of a model that reads these ids; asked for, an older one is kept longer."""
        revisions = [host for host in reversed([*self.retired, *self.current.values()]) if host.name == name]
        found = next((host for host in revisions if host.folder.tokenizer_sha256 == tokenizer_sha256), None)
        if found in self._needed_until_s:
            self._needed_until_s[found] = time.monotonic() + self.keep_s
        return found

    def adopt(self) -> bool:
        """Let loaded models take new jobs and drop engines that are done; True when what is offered changed."""
        now_s = time.monotonic()
        self._needed_until_s = {host: until_s for host, until_s in self._needed_until_s.items() if now_s < until_s}
        self.retired = [host for host in self.retired if host.engine.has_work or host in self._needed_until_s]
        changed = False
        while True:
            try:
                change = self._changes.get_nowait()
            except queue.Empty:
                return changed
            changed = True
            name = change if isinstance(change, str) else change.name
            old = self.current.pop(name, None)
            if old is not None:
                self.retired.append(old)
            if isinstance(change, Host):
                self.current[name] = change
                if old is not None and old.folder.tokenizer_sha256 != change.folder.tokenizer_sha256:
                    self._needed_until_s[old] = now_s + self.keep_s

    def _watch(self) -> None:
        goes_on = GoesOn(log, "the look through the models folder")  # which may be closed for a while
        while not self._stop.is_set():
            with goes_on:
                self.refresh()
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
            except Exception as error:  # whatever is wrong with one model, those behind it load
                if isinstance(error, (SmolLMError, OSError)) or is_out_of_memory(error):
                    log.warning(
                        "cannot serve %s: %s", name, error if isinstance(error, SmolLMError) else first_line(error)
                    )
                else:  # a fault of ours: show where
                    log.exception("cannot serve %s: %s: %s", name, type(error).__name__, error)
                self._failed[name] = (folder, time.monotonic() + RETRY_S)
                continue
            self._failed.pop(name, None)
            self._loaded[name] = folder
            self._changes.put(host)
