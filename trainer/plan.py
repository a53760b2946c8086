"""What a run will read before it starts: tokens, epochs and repeats of every source in every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from shared.config import ModelConfig
from shared.errors import DataError
from trainer.curriculum import Curriculum, Stage
from trainer.prepare import PreparedData
from trainer.progress import duration
from trainer.token_file import TokenFile

BYTES_PER_PARAMETER = 16
"""fp32 weight, gradient and AdamW's two averages."""

BYTES_PER_PARAMETER_SAVED = 12
"""The same without the gradient."""


class PlannedData(Protocol):
    @property
    def max_epochs(self) -> float: ...


class PlannedRun(Protocol):
    """The part of a recipe a plan needs."""

    @property
    def batch_size(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def data(self) -> PlannedData: ...
    def curriculum_stages(self) -> list[Stage]: ...


@dataclass(frozen=True)
class PlanRow:
    """One source in one stage, or over the whole run."""

    stage: str
    steps: str
    source: str
    num_tokens: int
    share: float
    stage_epochs: float
    """How often this stage reads the source."""
    epochs: float
    """How often the run has read the source by the end of this stage; what is above 1 is repeated."""

    @property
    def repeats(self) -> float:
        """How often tokens have been read again by then, on average over the source."""
        return max(0.0, self.epochs - 1)


@dataclass(frozen=True)
class Plan:
    """A run's reading list; `str()` is the table people see."""

    rows: tuple[PlanRow, ...]
    totals: tuple[PlanRow, ...]
    num_steps: int
    tokens_per_step: int

    def __str__(self) -> str:
        lines = [f"{self.num_steps:,} steps of {self.tokens_per_step:,} tokens = {self.num_tokens:,} tokens", ""]
        lines.append(
            f"{'stage':<22}{'steps':<13}{'source':<12}{'tokens':>13}{'share':>9}"
            f"{'epochs':>10}{'so far':>10}{'repeats':>10}"
        )
        shown = ""
        for row in (*self.rows, *self.totals):
            stage, steps = (row.stage, row.steps) if row.stage != shown else ("", "")
            shown = row.stage
            lines.append(
                f"{stage:<22}{steps:<13}{row.source:<12}{row.num_tokens:>13,}{row.share:>9.2%}"
                f"{row.stage_epochs:>10.2f}{row.epochs:>10.2f}{row.repeats:>10.2f}"
            )
        return "\n".join(lines)

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.tokens_per_step


def plan(config: PlannedRun, data: PreparedData) -> Plan:
    """Lay out a recipe over its token files.

    Raises:
        DataError: a source would be read more often than `data.max_epochs`, or has not one window.
    """
    made = lay_out(config.curriculum_stages(), data.token_files, config.batch_size, config.sequence_length)
    for total in made.totals:
        if total.epochs > config.data.max_epochs:
            file = data.token_files[total.source]
            raise DataError(
                f"source {total.source!r} has {file.num_train_bytes:,} bytes, {len(file.train):,} tokens to train "
                f"on; the stages ask for {total.num_tokens:,}, which repeats it {total.epochs:,.1f} times, above "
                f"data.max_epochs = {config.data.max_epochs:g}: add text, lower its shares, or raise data.max_epochs"
            )
    return made


def lay_out(stages: list[Stage], token_files: Mapping[str, TokenFile], batch_size: int, sequence_length: int) -> Plan:
    """Count every source's tokens per stage; `epochs` counts windows drawn over windows there are."""
    curriculum = Curriculum(stages, batch_size)
    windows = {name: token_files[name].num_windows(sequence_length) for name in curriculum.sources}
    rows = []
    for stage in stages:
        before, after = curriculum.counts_through(stage.start_step), curriculum.counts_through(stage.end_step)
        for name in stage.shares:
            drawn = after[name] - before[name]
            rows.append(
                PlanRow(
                    stage.name,
                    f"{stage.start_step}-{stage.end_step}",
                    name,
                    drawn * sequence_length,
                    drawn / (stage.num_steps * batch_size),
                    drawn / windows[name],
                    after[name] / windows[name],
                )
            )
    through = curriculum.counts_through(curriculum.num_steps)
    all_windows = curriculum.num_steps * batch_size
    totals = tuple(
        PlanRow("whole run", "", name, count * sequence_length, count / all_windows, *[count / windows[name]] * 2)
        for name, count in through.items()
    )
    return Plan(tuple(rows), totals, curriculum.num_steps, batch_size * sequence_length)


def bytes_of_checkpoints(model: ModelConfig, *, keep_checkpoints: int) -> int:
    """Return the most that a run's checkpoints take: the newest, the best one, and the one being written."""
    return model.num_parameters * BYTES_PER_PARAMETER_SAVED * (keep_checkpoints + 2)


def describe_needs(model: ModelConfig, *, keep_checkpoints: int) -> str:
    """Say what memory and disk a run takes: training state, its copy while a checkpoint is written, what it leaves."""
    state = model.num_parameters * BYTES_PER_PARAMETER
    checkpoint = model.num_parameters * BYTES_PER_PARAMETER_SAVED
    checkpoints = bytes_of_checkpoints(model, keep_checkpoints=keep_checkpoints)
    export = model.num_parameters * 4
    return (
        f"network: {model.num_parameters:,} parameters\n"
        f"memory:  {mebibytes(state)} of weights, gradients and averages, {mebibytes(checkpoint)} for a copy while a "
        "checkpoint is written, and activations\n"
        f"disk:    {mebibytes(checkpoints)} of checkpoints at most, {mebibytes(export)} of exports"
    )


def describe_trial(step_s: float, peak_bytes: int, num_steps: int) -> str:
    """Say what a trial step promises for the whole run."""
    return (
        f"trial:   {step_s:.3g} s per step and {mebibytes(peak_bytes)} at its peak on this machine: about "
        f"{duration(step_s * num_steps)} for {num_steps:,} steps; evaluation, samples and saves come on top"
    )


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
