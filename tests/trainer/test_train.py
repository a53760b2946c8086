"""One update: its loss, its gradient, and what changes neither."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import SMOLLM2_135M
from shared.errors import ConfigError, TokenizerError
from shared.model import SmolLM2
from tests.trainer.small_run import small_data
from trainer.batches import Batch
from trainer.evaluate import evaluate
from trainer.loss import IGNORED, RowLosses
from trainer.optimizer import build_optimizer
from trainer.prepare import PreparedData
from trainer.recipe import load_recipe
from trainer.sample import sample_texts
from trainer.train import StepResult, Trainer, load_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("small"))


def trainer_of(data: PreparedData, *overrides: str) -> Trainer:
    return Trainer(load_recipe("smoke", overrides), data)


def updated(trainer: Trainer) -> StepResult:
    """One more update, not given up."""
    result = trainer.train_step()
    assert result is not None
    return result


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


class WithIgnored:
    """The real batches with ever more targets ignored, so that rows and micro-batches count unequally."""

    def __init__(self, trainer: Trainer) -> None:
        self.batches = trainer.batches
        self.source_names = trainer.batches.source_names
        self.data_hash = trainer.batches.data_hash

    def batch_at(self, step: int) -> Batch:
        batch = self.batches.batch_at(step)
        targets = batch.targets_BT.copy()
        for row in range(len(targets)):
            targets[row, : 4 * row] = IGNORED
        targets[0] = IGNORED
        return Batch(inputs_BT=batch.inputs_BT, targets_BT=targets, sources_B=batch.sources_B)


def test_first_loss_is_a_uniform_guess(data: PreparedData) -> None:
    trainer = trainer_of(data)
    assert updated(trainer).loss.item() == pytest.approx(math.log(data.tokenizer.vocab_size), abs=0.3)


def test_how_rows_are_split_changes_no_update(data: PreparedData) -> None:
    ends = []
    for micro, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = trainer_of(data, f"micro_batch_size={micro}", f"gradient_accumulation_steps={accumulation}")
        trainer.batches = WithIgnored(trainer)  # type: ignore[assignment]
        results = [updated(trainer) for _ in range(3)]
        ends.append((weights(trainer), results[-1].loss.item(), results[-1].grad_norm.item()))
    for end, loss, grad_norm in ends[1:]:
        assert loss == pytest.approx(ends[0][1], rel=1e-6)
        assert grad_norm == pytest.approx(ends[0][2], rel=1e-5)
        for name, tensor in end.items():
            # AdamW divides by the root of a tiny square: where a gradient is nearly zero, its last bit becomes a
            # share of a whole step. 1e-4 is a thirtieth of one here (3e-3).
            torch.testing.assert_close(tensor, ends[0][0][name], rtol=1e-4, atol=1e-4)


def test_logged_loss_is_the_mean_over_the_steps_tokens(data: PreparedData) -> None:
    trainer = trainer_of(data)
    trainer.batches = WithIgnored(trainer)  # type: ignore[assignment]
    trainer.step = 9  # a stage with all sources
    batch = trainer.batches.batch_at(9)
    with torch.no_grad():
        logits = trainer.model(torch.from_numpy(batch.inputs_BT))
        by_hand = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.targets_BT).flatten(), ignore_index=IGNORED
        )
    result = updated(trainer)
    assert result.loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert result.source_tokens_S.sum() == (batch.targets_BT != IGNORED).sum()
    assert result.source_losses_S.sum().item() / result.source_tokens_S.sum() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_step_without_any_valid_token_adds_nothing(data: PreparedData) -> None:
    trainer = trainer_of(data)
    batch = trainer.batches.batch_at(0)
    targets = torch.full(batch.targets_BT.shape, IGNORED)
    assert RowLosses()(trainer.model, torch.from_numpy(batch.inputs_BT), targets, torch.float32).tolist() == [0.0] * 8


def test_micro_batches_of_a_step_are_distinct(data: PreparedData) -> None:
    batch = trainer_of(data).batches.batch_at(0)
    assert len({row.tobytes() for row in batch.inputs_BT}) == len(batch.inputs_BT)


def test_restored_state_goes_on_with_the_same_bits(data: PreparedData) -> None:
    one = trainer_of(data)
    for _ in range(6):
        updated(one)
    state = one.state()
    state = {**state, "model": weights(one), "optimizer": torch.utils._pytree.tree_map(copied, state["optimizer"])}
    other = trainer_of(data)
    other.restore(state)
    for _ in range(4):
        assert updated(one).loss.item() == updated(other).loss.item()
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def test_checkpoint_keeps_full_precision(data: PreparedData) -> None:
    trainer = trainer_of(data, "dtype=bfloat16")
    updated(trainer)
    state = trainer.state()
    tensors = [*state["model"].values(), *(average["exp_avg"] for average in state["optimizer"]["state"].values())]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_evaluation_changes_neither_weights_nor_what_follows(data: PreparedData) -> None:
    with_evaluation, without = trainer_of(data), trainer_of(data)
    for _ in range(3):
        evaluate(
            with_evaluation.model,
            data.token_files,
            sequence_length=32,
            max_windows=4,
            rows_per_pass=2,
            dtype=torch.float32,
        )
        updated(with_evaluation)
        updated(without)
    assert all(torch.equal(tensor, weights(without)[name]) for name, tensor in weights(with_evaluation).items())


def test_evaluation_and_samples_draw_none_of_the_random_numbers(data: PreparedData) -> None:
    trainer = trainer_of(data)
    updated(trainer)

    def generators() -> tuple[bytes, str, str]:
        return torch.get_rng_state().numpy().tobytes(), str(random.getstate()), str(np.random.get_state())

    before = generators()
    evaluate(trainer.model, data.token_files, sequence_length=32, max_windows=4, rows_per_pass=2, dtype=torch.float32)
    rows = sample_texts(
        trainer.model,
        data.tokenizer,
        trainer.config.prompts,
        step=1,
        max_new_tokens=8,
        trained_length=32,
        temperature=1.0,
        seed=3,
    )
    assert rows
    assert generators() == before


@pytest.mark.slow
def test_the_whole_network_first_guesses_uniformly(data: PreparedData) -> None:
    """SmolLM2-135M itself: within 0.3 of ln(49,152) = 10.80 before any update."""
    model = SmolLM2(SMOLLM2_135M)
    model.initialize(1337)
    batch = trainer_of(data).batches.batch_at(9)
    inputs, targets = torch.from_numpy(batch.inputs_BT) * 151, torch.from_numpy(batch.targets_BT) * 151  # all ids
    with torch.no_grad():
        losses_B = RowLosses()(model, inputs, targets, torch.float32)
    assert losses_B.sum().item() / targets.numel() == pytest.approx(math.log(49_152), abs=0.3)


def test_other_data_or_tokenizer_is_refused_by_name(data: PreparedData) -> None:
    trainer = trainer_of(data)
    with pytest.raises(ConfigError, match="trained on data with hash 000000000000"):
        trainer.restore({**trainer.state(), "data_hash": "0" * 64})
    with pytest.raises(ConfigError, match="trained on a tokenizer with hash 000000000000"):
        trainer.restore({**trainer.state(), "tokenizer_sha256": "0" * 64})


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(data: PreparedData) -> None:
    with pytest.raises(TokenizerError, match="49,152"):
        trainer_of(data, "model.vocab_size=49152")


def test_decay_touches_matrices_only(data: PreparedData) -> None:
    trainer = trainer_of(data)

    def groups(*overrides: str) -> dict[str, Sequence[str]]:
        optimizer = build_optimizer(trainer.model, load_recipe("smoke", overrides), trainer.device)
        assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups}["free"] == 0.0
        return {group["name"]: group["parameter_names"] for group in optimizer.param_groups}

    everything = {name for name, _ in trainer.model.named_parameters()}
    decayed, free = (set(names) for names in groups().values())
    assert decayed | free == everything
    assert not decayed & free
    assert all("norm" in name for name in free)
    assert not any("norm" in name for name in decayed)
    assert "model.embed_tokens.weight" in decayed
    assert "model.embed_tokens.weight" in groups("decay_embeddings=false")["free"]


def test_clipping_bounds_the_gradient(data: PreparedData) -> None:
    trainer = trainer_of(data, "clip_norm=1e-9", "weight_decay=0.0")
    seen: list[float] = []

    def remember(*_: object) -> None:
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))

    trainer.optimizer.register_step_pre_hook(remember)
    assert updated(trainer).grad_norm.item() > 0.1
    assert seen[0] == pytest.approx(1e-9, rel=1e-3)


def test_health_remembers_one_bad_step(data: PreparedData) -> None:
    trainer = trainer_of(data)
    updated(trainer)
    assert trainer.is_healthy()
    good = trainer.state()
    good = {**good, "model": weights(trainer), "optimizer": torch.utils._pytree.tree_map(copied, good["optimizer"])}
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    updated(trainer)
    assert not trainer.is_healthy()
    trainer.restore(good)
    assert trainer.is_healthy()
    assert np.isfinite(updated(trainer).loss.item())


def test_loading_weights_keeps_the_tie(data: PreparedData) -> None:
    trainer = trainer_of(data)
    load_weights(trainer.model, {name: tensor + 1 for name, tensor in weights(trainer).items()})
    assert trainer.model.lm_head.weight.data_ptr() == trainer.model.model.embed_tokens.weight.data_ptr()


def test_a_step_given_up_leaves_everything_as_it_was(data: PreparedData) -> None:
    trainer, other = trainer_of(data), trainer_of(data)
    answers = iter([False, True])
    before = weights(trainer)
    assert trainer.train_step(lambda: next(answers)) is None
    assert trainer.step == 0
    assert all(torch.equal(tensor, weights(trainer)[name]) for name, tensor in before.items())
    updated(trainer)
    updated(other)
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(trainer).items())
