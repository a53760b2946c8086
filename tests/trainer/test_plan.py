"""The plan says what a run will read, and refuses what would only be learnt by heart."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import DataError
from tests.trainer.small_run import small_data, small_directories
from trainer.plan import plan
from trainer.recipe import load_recipe
from trainer.recipe_data import prepare_data


def test_tokens_and_epochs_add_up(tmp_path: Path) -> None:
    config = load_recipe("smoke")
    made = plan(config, small_data(tmp_path, config))
    assert sum(row.num_tokens for row in made.rows) == sum(row.num_tokens for row in made.totals) == made.num_tokens
    assert made.num_tokens == config.num_steps * config.batch_size * config.sequence_length
    for total in made.totals:
        last = [row for row in made.rows if row.source == total.source][-1]
        assert last.epochs == total.epochs
    text = str(made)
    assert all(stage.name in text for stage in config.stages)
    assert f"{made.num_tokens:,} tokens" in text


def test_a_source_of_809_bytes_at_a_fifth_is_refused(tmp_path: Path) -> None:
    """The public original's code.txt."""
    config = load_recipe("smoke", ["data.max_epochs=1.0"])
    directories = small_directories(tmp_path)
    (directories.data_dir / "code.txt").write_text("def f(x):\n    return x\n\n" * 33 + "print(f(1))\n")
    data = prepare_data(config.data, directories)
    with pytest.raises(DataError, match=r"'code' has .* bytes.* repeats it .* times, above data.max_epochs = 1: add"):
        plan(config, data)
