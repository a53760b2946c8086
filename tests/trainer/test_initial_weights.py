"""Starting from weights that exist: they are taken as they are, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shared.checkpoint import load_export
from shared.errors import ConfigError
from tests.trainer.small_run import small_data, train_small
from trainer.initial_weights import load_initial_weights
from trainer.prepare import PreparedData
from trainer.recipe import load_recipe
from trainer.train import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreparedData]:
    root = tmp_path_factory.mktemp("small")
    train_small(root, overrides=["export_name=first"])
    return root / "models" / "first", small_data(root)


def test_a_run_goes_on_from_an_export(trained: tuple[Path, PreparedData]) -> None:
    folder, data = trained
    recipe = load_recipe("smoke", [f"init_from={json.dumps(str(folder))}"])
    trainer, fresh = Trainer(recipe, data), Trainer(load_recipe("smoke"), data)
    exported, _ = load_export(folder, device=torch.device("cpu"), dtype=torch.float32)
    for name, tensor in exported.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    first, afresh = trainer.train_step(), fresh.train_step()
    assert first is not None
    assert afresh is not None
    assert first.loss < afresh.loss - 0.5, "it has learnt already"


def test_a_run_from_weights_resumes_from_its_own_checkpoint(trained: tuple[Path, PreparedData]) -> None:
    folder, data = trained
    recipe = load_recipe("smoke", [f"init_from={json.dumps(str(folder))}"])
    one, other = Trainer(recipe, data), Trainer(recipe, data)
    for _ in range(2):
        one.train_step()
    other.restore(one.state())
    results = one.train_step(), other.train_step()
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].loss.item() == results[1].loss.item()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_hidden_layers=3", ["num_hidden_layers", "(the recipe: 3)", "[model]"]),
        ("model.rope_theta=5000.0", ["rope_theta", "(the recipe: 5000.0)"]),
    ],
)
def test_another_network_is_refused(trained: tuple[Path, PreparedData], override: str, words: list[str]) -> None:
    folder, data = trained
    with pytest.raises(ConfigError) as raised:
        Trainer(load_recipe("smoke", [f"init_from={json.dumps(str(folder))}", override]), data)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_another_tokenizer_is_refused(trained: tuple[Path, PreparedData], tmp_path: Path) -> None:
    folder, data = trained
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(content))
    trainer = Trainer(load_recipe("smoke"), data)
    with pytest.raises(ConfigError, match="another tokenizer"):
        load_initial_weights(trainer.model, str(other), data.tokenizer, tmp_path)


def test_what_is_no_model_is_told(trained: tuple[Path, PreparedData], tmp_path: Path) -> None:
    _, data = trained
    trainer = Trainer(load_recipe("smoke"), data)
    with pytest.raises(ConfigError, match=r"init_from is 'nowhere'.*smollm2-135m"):
        load_initial_weights(trainer.model, "nowhere", data.tokenizer, tmp_path)
