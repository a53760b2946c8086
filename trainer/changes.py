"""What may differ from the recipe a run was started with when it is resumed, and what may not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.config import TrainConfig

# What may differ when a run is resumed: it changes neither a batch nor an update. How the rows of a step are split
# into micro-batches is among them as long as their product stays; where it is computed moves only the last bits.
SAFE_ON_RESUME = frozenset(
    {
        "name",
        "description",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "merge_micro_batches",
        "activation_checkpointing",
        "device",
        "compile",
        "parallel",
        "deterministic",
        "num_threads",
        "data.max_epochs",
        "log_every",
        "evaluate_every",
        "evaluate_windows",
        "sample_every",
        "sample_tokens",
        "sample_temperature",
        "prompts",
        "save_every",
        "keep_checkpoints",
        "overfit_gap",
        "track",
        "export_name",
    }
)

# What may differ where a person says so: the state fits, and the updates done stay what they were, but those to come
# are not the ones the run was started for. (AdamW's other numbers are not among them: they are part of its state.)
ACCEPTABLE_ON_RESUME = frozenset(
    {
        "num_steps",
        "stages",
        "learning_rate",
        "min_learning_rate",
        "warmup_steps",
        "schedule",
        "decay_share",
        "clip_norm",
        "dtype",
    }
)


@dataclass(frozen=True)
class Changes:
    """`key (old -> new)` of every difference, by what it means for a resumed run."""

    safe: list[str] = field(default_factory=list)
    """Changes neither a batch nor an update."""
    acceptable: list[str] = field(default_factory=list)
    """Changes updates to come."""
    forbidden: list[str] = field(default_factory=list)
    """The run would not be the one that was saved."""


def changes_on_resume(saved: TrainConfig, wanted: TrainConfig, *, step: int) -> Changes:
    """Compare the recipe of a run that has a checkpoint at `step` with the one it is to go on under."""
    changes = Changes()
    old, new = flatten(saved.model_dump(mode="json")), flatten(wanted.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        if key == "stages":
            same_past = past(saved, step) == past(wanted, step)
            where = "to come" if same_past else f"before step {step}"
            (changes.acceptable if same_past else changes.forbidden).append(f"stages ({where})")
            continue
        change = f"{key} ({old.get(key)} -> {new.get(key)})"
        if key in SAFE_ON_RESUME:
            changes.safe.append(change)
        elif key in ACCEPTABLE_ON_RESUME:
            changes.acceptable.append(change)
        else:
            changes.forbidden.append(change)
    if saved.batch_size != wanted.batch_size:
        changes.forbidden.append(
            f"micro_batch_size x gradient_accumulation_steps ({saved.batch_size} -> {wanted.batch_size} rows per step)"
        )
    if wanted.num_steps < step:
        changes.forbidden.append(f"num_steps ({wanted.num_steps}, and {step} are done)")
    return changes


def past(config: TrainConfig, step: int) -> list[tuple[int, int, dict[str, float]]]:
    """The stages as far as they have been trained: their windows are drawn, in an order that counts on from there."""
    return [(s.start_step, min(s.end_step, step), s.shares) for s in config.stages if s.start_step < step]


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables become one with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
