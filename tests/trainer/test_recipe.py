"""Recipes: what comes with the trainer is right, and what a user gets wrong is told in one sentence."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from shared.config import SMOLLM2_135M
from shared.errors import ConfigError
from trainer.config import (
    DataSection,
    Directories,
    ModelSection,
    PromptSection,
    StageSection,
    TrainConfig,
)
from trainer.recipe import load_recipe, recipe_names, to_toml


def test_every_recipe_loads_and_survives_being_written(tmp_path: Path) -> None:
    assert {"original", "cpu", "smoke"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        written = tmp_path / "recipe.toml"
        written.write_text(to_toml(recipe), encoding="utf-8")
        assert load_recipe(str(written)) == recipe


def test_original_is_the_originals_table() -> None:
    original = load_recipe("original")
    assert original.model.build(tokenizer_vocab_size=49_152) == SMOLLM2_135M
    assert (original.micro_batch_size, original.gradient_accumulation_steps, original.sequence_length) == (4, 8, 128)
    assert (original.num_steps, original.warmup_steps, original.schedule) == (5_050, 100, "cosine")
    assert (original.learning_rate, original.min_learning_rate, original.betas) == (6e-4, 3e-4, (0.9, 0.95))
    assert original.sample_every == 500
    assert original.data.tokenizer == "smollm2"
    assert [(stage.name, stage.start_step, stage.end_step, stage.shares) for stage in original.stages] == [
        ("Foundation", 0, 1000, {"input": 1.0}),
        ("General + Code", 1000, 2000, {"input": 0.8, "code": 0.2}),
        ("Specialized", 2000, 3000, {"input": 0.6, "code": 0.2, "math": 0.2}),
        ("Refinement", 3000, 5000, {"input": 0.4, "code": 0.3, "math": 0.3}),
        ("Final Polish", 5000, 5050, {"input": 0.4, "code": 0.3, "math": 0.3}),
    ]


def test_every_recipe_has_the_originals_five_stages() -> None:
    original = [(stage.name, stage.shares) for stage in load_recipe("original").stages]
    for name in recipe_names():
        assert [(stage.name, stage.shares) for stage in load_recipe(name).stages] == original


def test_overrides_reach_into_tables_and_keep_their_types() -> None:
    recipe = load_recipe(
        "smoke", ["learning_rate=1e-2", "data.vocab_size=512", "export_name=mine", "betas=[0.8, 0.9]", "dtype=bfloat16"]
    )
    assert (recipe.learning_rate, recipe.data.vocab_size, recipe.export_name) == (1e-2, 512, "mine")
    assert (recipe.betas, recipe.dtype) == ((0.8, 0.9), "bfloat16")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learning_rat=1"], ["unknown key 'learning_rat'", "did you mean 'learning_rate'?"]),
        (["data.vocab=1"], ["unknown key 'data.vocab'", "'vocab_size'"]),
        (["model.hiden_size=1"], ["unknown key 'model.hiden_size'", "'hidden_size'"]),
        (["prompts=[{txt='x'}]"], ["prompts.0.txt", "'text'"]),
        (["num_steps=0"], ["num_steps", "0", "greater than 0"]),
        (["num_steps=true"], ["num_steps"]),
        (['num_steps="20"'], ["num_steps", "'20'"]),
        (["learning_rate=nan"], ["learning_rate", "nan"]),
        (["learning_rate=inf"], ["learning_rate", "inf"]),
        (["schedule=cosin"], ["schedule", "'cosin'", "cosine"]),
        (["num_steps=21"], ["20", "21"]),
        (["stages=[]"], ["stages"]),
        (["warmup_steps=20"], ["warmup_steps is 20", "num_steps 20"]),
        (["min_learning_rate=1"], ["min_learning_rate 1", "learning_rate 0.003"]),
        (["sequence_length=4096"], ["sequence_length 4096", "max_position_embeddings"]),
        (["model.preset=gpt2"], ["gpt2", "smollm2-135m"]),
        (["model.hidden_size=33"], ["hidden_size 33", "num_attention_heads"]),
        (["data.tokenizer=smollm2"], ["data.vocab_size", "data.tokenizer"]),
        (['data.sources=["input","input"]'], ["data.sources", "input"]),
        (["export_name=../evil"], ["export_name", "../evil"]),
        (["just-words"], ["just-words", "key=value"]),
        (["seed.x=1"], ["seed"]),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load_recipe("smoke", overrides)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("num_steps = 3")
    with pytest.raises(ConfigError, match=r"mine\.toml: model is missing"):
        load_recipe(str(recipe))
    recipe.write_text("num_steps = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(str(recipe))
    with pytest.raises(ConfigError, match="there is no recipe 'smok'; did you mean 'smoke'"):
        load_recipe("smok")
    with pytest.raises(ConfigError, match=r"there is no recipe file nowhere/x\.toml"):
        load_recipe("nowhere/x.toml")


def test_every_field_is_described() -> None:
    sections: list[type[BaseModel]] = [TrainConfig, DataSection, ModelSection, PromptSection, StageSection, Directories]
    for section in sections:
        assert [name for name, field in section.model_fields.items() if not field.description] == []
