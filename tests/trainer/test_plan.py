"""The plan says what a run will read, and refuses what would only be learnt by heart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.errors import DataError
from tests.trainer import small_run
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
    for stage in config.stages:
        epochs = [row.stage_epochs for row in made.rows if row.stage == stage.name]
        assert len(epochs) == len(stage.shares)
    for source in config.data.sources:
        rows = [row for row in made.rows if row.source == source]
        assert sum(row.stage_epochs for row in rows) == pytest.approx(rows[-1].epochs)
        assert rows[-1].repeats == max(0.0, rows[-1].epochs - 1)
    text = str(made)
    assert all(stage.name in text for stage in config.stages)
    assert f"{made.num_tokens:,} tokens" in text


def test_a_source_of_809_bytes_at_a_fifth_is_refused(tmp_path: Path) -> None:
    """The public original's code.txt, under the original's own table and the usual limit."""
    config = load_recipe("original", ['data.tokenizer="train"', "data.vocab_size=320", "data.held_out_share=0.001"])
    directories = small_directories(tmp_path)
    (directories.data_dir / "input.txt").write_text(small_run.texts()["input"] * 40)
    (directories.data_dir / "math.txt").write_text(small_run.texts()["math"] * 40)
    code = "def f(x):\n    return x\n\n" * 33
    (directories.data_dir / "code.txt").write_text(code + "#" * (809 - len(code)))
    data = prepare_data(config.data, directories)
    with pytest.raises(DataError) as refused:
        plan(config, data)
    sentence = str(refused.value)
    assert re.match(r"source 'code' has 8\d\d bytes, .* which repeats it 5,\d\d\d", sentence)
    assert "above data.max_epochs = 100: add text, lower its shares, or raise data.max_epochs" in sentence
