"""A changed recipe on resume: harmless changes pass, others are named, and what comes may change where one says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConfigError
from tests.trainer.small_run import train_small, weights_sha256
from trainer.changes import ACCEPTABLE_ON_RESUME, SAFE_ON_RESUME, changes_on_resume, flatten
from trainer.recipe import load_recipe
from trainer.run_folder import RunFolder, read_rows

LAST_STAGE = (
    "{ name = 'Final Polish', start_step = 18, end_step = %d, shares = { input = 0.4, code = 0.3, math = 0.3 } }"
)


def longer(num_steps: int, first_share: float = 1.0) -> list[str]:
    """Overrides under which `smoke` trains on; its first stage is the one that ends at step 4."""
    stages = [
        f"{{ name = 'Foundation', start_step = 0, end_step = 4, shares = {shares_of(first_share)} }}",
        "{ name = 'All', start_step = 4, end_step = 18, shares = { input = 0.6, code = 0.2, math = 0.2 } }",
        LAST_STAGE % num_steps,
    ]
    return [f"num_steps={num_steps}", f"stages=[{', '.join(stages)}]", 'schedule="constant"']


def shares_of(share: float) -> str:
    return "{ input = 1.0 }" if share == 1.0 else f"{{ input = {share}, code = {round(1 - share, 6)} }}"


def test_every_key_named_exists() -> None:
    keys = flatten(load_recipe("smoke").model_dump(mode="json"))
    assert keys.keys() >= SAFE_ON_RESUME | ACCEPTABLE_ON_RESUME
    assert not SAFE_ON_RESUME & ACCEPTABLE_ON_RESUME


def test_what_changes_no_update_passes_and_is_named() -> None:
    harmless = ["micro_batch_size=8", "gradient_accumulation_steps=1", "log_every=7", "prompts=[]", "parallel=fsdp"]
    changes = changes_on_resume(load_recipe("smoke"), load_recipe("smoke", harmless), step=5)
    assert not changes.acceptable
    assert not changes.forbidden
    assert "log_every (1 -> 7)" in changes.safe
    assert "micro_batch_size (4 -> 8)" in changes.safe


def test_what_makes_it_another_run_is_named() -> None:
    other = load_recipe("smoke", ["seed=1", "data.vocab_size=400", "micro_batch_size=8", "weight_decay=0.2"])
    assert changes_on_resume(load_recipe("smoke"), other, step=5).forbidden == [
        "data.vocab_size (320 -> 400)",
        "seed (1337 -> 1)",
        "weight_decay (0.1 -> 0.2)",
        "micro_batch_size x gradient_accumulation_steps (8 -> 16 rows per step)",
    ]


def test_stages_may_change_where_they_have_not_been_trained() -> None:
    saved, extended = load_recipe("smoke", longer(20)), load_recipe("smoke", longer(24))
    assert changes_on_resume(saved, extended, step=20).acceptable == ["num_steps (20 -> 24)", "stages (to come)"]
    rewritten = load_recipe("smoke", longer(20, first_share=0.9))
    assert changes_on_resume(saved, rewritten, step=20).forbidden == ["stages (before step 20)"]
    assert changes_on_resume(extended, saved, step=24).forbidden == [
        "stages (before step 24)",
        "num_steps (20, and 24 are done)",
    ]


def test_a_longer_run_is_the_shorter_one_gone_on_with(tmp_path: Path) -> None:
    folder = train_small(tmp_path / "two", overrides=longer(20))
    with pytest.raises(
        ConfigError, match=r"num_steps \(20 -> 24\), stages \(to come\); .* by --accept-changes, or train"
    ):
        RunFolder(folder.path).open(load_recipe("smoke", longer(24)))
    train_small(tmp_path / "two", overrides=longer(24), accept_changes=True)
    assert read_rows(folder.metrics)[-1]["at_step"] == 24
    assert weights_sha256(folder) == weights_sha256(train_small(tmp_path / "one", overrides=longer(24)))
