"""Numbers of a run for machines: metrics.jsonl, samples.jsonl and TensorBoard; and the honest speed.

Rows of metrics.jsonl, each with the time it was written:

    {"kind": "run", "state": "running|finished|stopped", "at_step", "num_steps", "stages": [{"name", ...}]}
    {"kind": "train", "step", "stage", "loss", "learning_rate", "tokens_per_second", "mfu", "grad_norm",
     "source_loss": {source: nats}, "source_share": {source: share of the tokens since the row before}, "tokens"}
    {"kind": "evaluation", "step", "held_out": {source: {"loss", "bits_per_byte", "perplexity"}},
     "train_gap": {source: nats}}

`step` counts finished updates. A train row is that one step: its loss is the mean over the step's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from shared.config import ModelConfig
from shared.files import storage_errors
from trainer.run_folder import RunFolder, append_row, keep_rows_through
from trainer.track import Tracker

MFU_FORMULA = "(6 x parameters + 12 x layers x hidden size x sequence length) x tokens per second / peak FLOP/s"


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Forward and backward, attention counted in full. Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B.

    The head's matrix counts; looking an embedding up costs nothing.
    """
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    return 6 * (config.num_parameters - looked_up) + attention


class Metrics:
    """Writes rows and remembers them; after a resume it goes on from the rows up to the restored step."""

    def __init__(self, folder: RunFolder, *, resume_step: int, tracker: Tracker | None = None) -> None:
        self.folder = folder
        self.tracker = tracker or Tracker("off", run=folder.name, settings={})
        with storage_errors(folder.tensorboard):
            self.tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=resume_step + 1)
        self.rows: list[dict[str, Any]] = []
        self.evaluated_steps: set[int] = set()
        self.sampled_steps: set[int] = set()
        self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`; a run that begins anew forgets all."""
        step = step or -1
        self.rows = keep_rows_through(self.folder.metrics, step)
        self.evaluated_steps = {row["step"] for row in self.of_kind("evaluation")}
        self.sampled_steps = {row["step"] for row in keep_rows_through(self.folder.samples, step)}

    def write(self, row: dict[str, Any]) -> None:
        row = {**row, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        append_row(self.folder.metrics, row)
        self.rows.append(row)

    def run(self, state: str, *, at_step: int, num_steps: int, stages: list[dict[str, Any]]) -> None:
        self.write({"kind": "run", "state": state, "at_step": at_step, "num_steps": num_steps, "stages": stages})

    def train(self, row: dict[str, Any]) -> None:
        self.write({"kind": "train", **row})
        names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
        values = {f"train/{name}": row[name] for name in names if row[name] is not None}
        values |= {f"train_loss/{source}": loss for source, loss in row["source_loss"].items()}
        values |= {f"train_share/{source}": share for source, share in row["source_share"].items()}
        self.scalars(row["step"], values)

    def evaluation(
        self, step: int, held_out: Mapping[str, Mapping[str, float]], train_gap: Mapping[str, float]
    ) -> None:
        self.write({"kind": "evaluation", "step": step, "held_out": held_out, "train_gap": train_gap})
        self.evaluated_steps.add(step)
        values = {f"train_gap/{source}": gap for source, gap in train_gap.items()}
        for source, numbers in held_out.items():
            values |= {f"held_out_{name}/{source}": value for name, value in numbers.items()}
        self.scalars(step, values)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            append_row(self.folder.samples, row)
            with storage_errors(self.folder.tensorboard):
                self.tensorboard.add_text(f"sample/{row['prompt'][:20]}", row["prompt"] + row["text"], step)
        self.sampled_steps.add(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with storage_errors(self.folder.tensorboard):  # its thread's errors come with the next number
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        self.tracker.log(values, step=step)

    def of_kind(self, kind: str, *, after: int = -1, through: int | None = None) -> list[dict[str, Any]]:
        """Rows of one kind with after < step <= through."""
        return [
            row
            for row in self.rows
            if row.get("kind") == kind and row["step"] > after and (through is None or row["step"] <= through)
        ]

    def close(self) -> None:
        with storage_errors(self.folder.tensorboard):
            self.tensorboard.close()
        self.tracker.close()


class SharesDrawn:
    """Tokens trained on per source since somebody asked last."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.counts = dict.fromkeys(sources, 0)

    def add(self, tokens_S: Iterable[int]) -> None:
        """Count one step's tokens, in the sources' order."""
        for source, count in zip(self.counts, tokens_S, strict=True):
            self.counts[source] += int(count)

    def take(self) -> dict[str, float]:
        """Return each source's share, and count anew."""
        total = max(1, sum(self.counts.values()))
        shares = {source: count / total for source, count in self.counts.items() if count}
        self.counts = dict.fromkeys(self.counts, 0)
        return shares


class Clock:
    """Wall time of training, with evaluation, samples and saves counted apart."""

    def __init__(self) -> None:
        self.started = self.mark = time.perf_counter()
        self.apart_since_mark = 0.0
        self.apart_s: dict[str, float] = {}

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Count the block's time under `what`, not as training; a block within another is its own only."""
        start, apart_before = time.perf_counter(), self.apart_since_mark
        try:
            yield
        finally:
            within = self.apart_since_mark - apart_before
            spent = time.perf_counter() - start - within
            self.apart_since_mark += spent
            self.apart_s[what] = self.apart_s.get(what, 0.0) + spent

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.perf_counter()
        spent = now - self.mark - self.apart_since_mark
        self.mark, self.apart_since_mark = now, 0.0
        return max(spent, 1e-9)

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self.started

    @property
    def training_s(self) -> float:
        return max(self.total_s - sum(self.apart_s.values()), 1e-9)
