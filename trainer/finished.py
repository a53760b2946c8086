"""Is a run done already? Then its command has nothing to do, and says so in one sentence."""

from __future__ import annotations

from pathlib import Path

from shared.catalog import read_json
from shared.errors import WeightsError
from trainer.config import TrainConfig
from trainer.run_folder import RunFolder, read_rows


def already_finished(folder: RunFolder, config: TrainConfig, *, data_hash: str, models_dir: Path) -> str | None:
    """Return the sentence for a run whose last step is done and whose export stands; None where work is left."""
    export = models_dir / (config.export_name or folder.name)
    runs = [row for row in read_rows(folder.metrics) if row.get("kind") == "run"]
    told = {"run": folder.name, "step": config.num_steps, "data_hash": data_hash}
    try:
        manifest = read_json(export / "manifest.json")
    except WeightsError:  # the export is not whole: write it again
        return None
    is_done = bool(runs) and (runs[-1]["state"], runs[-1]["at_step"]) == ("finished", config.num_steps)
    if not is_done or {key: manifest.get(key) for key in told} != told:
        return None
    return (
        f"run {folder.name!r} is finished: step {config.num_steps:,} of {config.num_steps:,}, exported to {export} "
        f"at {manifest.get('created_at')}; to train on, raise num_steps and the stages (--set num_steps=N "
        "--set 'stages=[...]' --accept-changes), to train afresh, take another --run NAME"
    )
