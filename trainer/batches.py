"""`batch_at(step)`: a pure function of the seed, the curriculum, the data's hash and the step.

It keeps no position, so resuming is asking for the next step, and nothing about micro-batches, accumulation or the
number of processes can change what a step trains on. A source's windows are drawn without repeats: epoch after epoch,
each in an order of its own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.curriculum import Curriculum
from trainer.token_file import TokenFile

CACHED_EPOCHS = 2
"""Orders of epochs held in memory per source, 8 bytes per window each: a step may cross from one to the next."""


@dataclass(frozen=True)
class Batch:
    """All rows of one step, before any split into micro-batches."""

    inputs_BT: NDArray[np.int64]
    targets_BT: NDArray[np.int64]
    """The next token of every input; -100 would mark one that is not trained on."""
    sources_B: NDArray[np.int64]
    """Index into `Batches.source_names`."""


class Batches:
    """The batches of a whole run, each made when asked for."""

    def __init__(
        self, token_files: Mapping[str, TokenFile], curriculum: Curriculum, *, seed: int, sequence_length: int
    ) -> None:
        """
        Raises:
            DataError: a source the curriculum draws from has fewer tokens than one window.
        """
        self.curriculum = curriculum
        self.source_names = curriculum.sources
        self.sequence_length = sequence_length
        self._files = [token_files[name] for name in self.source_names]
        self._num_windows = [file.num_windows(sequence_length) for file in self._files]
        self.data_hash = data_hash({name: token_files[name] for name in self.source_names})
        # One cache per source: a source of one window passes through many epochs a step and would push the others out.
        self._epoch_orders = [
            functools.lru_cache(maxsize=CACHED_EPOCHS)(functools.partial(epoch_order, windows, seed, name))
            for name, windows in zip(self.source_names, self._num_windows, strict=True)
        ]

    def batch_at(self, step: int) -> Batch:
        """The rows of a step: inputs and targets (batch_size, sequence_length)."""
        rows = self.curriculum.rows_at(step)
        windows = np.stack(
            [
                self.window(source, n)
                for source, n in zip(rows.sources_B.tolist(), rows.ordinals_B.tolist(), strict=True)
            ]
        )
        return Batch(windows[:, :-1], windows[:, 1:], rows.sources_B)

    def window(self, source: int, ordinal: int) -> NDArray[np.int64]:
        """The `ordinal`th window drawn from a source over the whole run: (sequence_length + 1,)."""
        epoch, position = divmod(ordinal, self._num_windows[source])
        start = int(self._epoch_orders[source](epoch)[position]) * self.sequence_length
        return self._files[source].train[start : start + self.sequence_length + 1].astype(np.int64)


def epoch_order(num_windows: int, seed: int, source: str, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of 0..num_windows-1 that depends on its arguments alone.

    Sorts the raw numbers of the counter-based generator Philox (Salmon et al. 2011): numpy promises those never
    change, which it does not promise for its own `permutation`.
    """
    key = hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()[:16]
    numbers = np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(num_windows)
    return np.argsort(numbers, kind="stable")


def data_hash(token_files: Mapping[str, TokenFile]) -> str:
    """Return one sha256 over the training tokens of every source, as their manifests tell: `verify_tokens` compares."""
    digest = hashlib.sha256()
    for name, file in token_files.items():
        digest.update(f"{name}={file.manifest['train']['sha256']};".encode())
    return digest.hexdigest()
