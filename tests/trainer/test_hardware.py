"""Choices of how a step is computed: each with its reason, and none of them changes what is learnt."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.config import SMOLLM2_135M
from tests.trainer.small_run import small_data
from trainer.hardware import Hardware, choose_compile, choose_sparse_embedding, training_flops
from trainer.memory import activation_bytes_per_token, choose_logit_chunk, choose_micro_batch, memory_limits
from trainer.prefetch import Prefetch
from trainer.prepare import PreparedData
from trainer.recipe import load_recipe
from trainer.train import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("small"))


def ends(data: PreparedData, *overrides: str) -> tuple[list[float], dict[str, Tensor]]:
    trainer = Trainer(load_recipe("smoke", overrides), data)
    results = [trainer.train_step() for _ in range(3)]
    return [result.loss.item() for result in results if result], dict(trainer.model.named_parameters())


def test_every_choice_is_told_with_its_reason() -> None:
    lines = Hardware.choose(load_recipe("original")).description().splitlines()
    assert [line.split()[0] for line in lines] == [
        "device",
        "arithmetic",
        "threads",
        "compile",
        "rows",
        "logits",
        "embedding",
        "prefetch",
    ]


def test_merging_changes_no_row_and_no_loss(data: PreparedData) -> None:
    apart, together = (["micro_batch_size=2", "gradient_accumulation_steps=4", merge] for merge in ("", ""))
    apart[2], together[2] = "merge_micro_batches=false", "merge_micro_batches=true"
    trainer = Trainer(load_recipe("smoke", together), data)
    assert trainer.micro_batch_size == 8
    assert ends(data, *together)[0] == pytest.approx(ends(data, *apart)[0], rel=1e-5)


def test_merged_micro_batches_share_out_over_processes_and_fit() -> None:
    original = load_recipe("original")
    rows = {n: choose_micro_batch(original, SMOLLM2_135M, CPU, num_processes=n).value for n in (1, 2, 4, 8)}
    assert rows[1] > original.micro_batch_size
    for num_processes, micro in rows.items():
        assert original.batch_size % (micro * num_processes) == 0
    given = load_recipe("original", ["merge_micro_batches=false"])
    assert choose_micro_batch(given, SMOLLM2_135M, CPU, num_processes=1).value == 4


def test_checkpointing_keeps_less_and_changes_no_bit(data: PreparedData) -> None:
    plain, frugal = load_recipe("original"), load_recipe("original", ["activation_checkpointing=true"])
    assert activation_bytes_per_token(frugal, SMOLLM2_135M) < activation_bytes_per_token(plain, SMOLLM2_135M) / 2
    losses, weights = ends(data)
    losses_again, weights_again = ends(data, "activation_checkpointing=true")
    assert losses == losses_again
    assert all(torch.equal(tensor, weights_again[name]) for name, tensor in weights.items())


def test_logits_are_chunked_only_where_they_are_large() -> None:
    assert choose_logit_chunk(SMOLLM2_135M, CPU, num_tokens=100).value is None
    chunk = choose_logit_chunk(SMOLLM2_135M, CPU, num_tokens=100_000).value
    assert chunk is not None
    assert chunk * SMOLLM2_135M.vocab_size * 4 <= 2**27


def test_compiling_pays_for_long_runs_only() -> None:
    original, cpu = load_recipe("original"), load_recipe("cpu")
    assert choose_compile("on", CPU, training_flops=1.0).value
    assert not choose_compile("off", CPU, training_flops=1e30).value
    short = training_flops(cpu, cpu.model.build(tokenizer_vocab_size=4096))
    assert not choose_compile("auto", CPU, training_flops=short).value
    assert "would not be won back" in choose_compile("auto", CPU, training_flops=short).reason
    long = training_flops(original, SMOLLM2_135M)
    assert long == pytest.approx(6 * 134_515_008 * 5050 * 4096)


def test_the_embeddings_gradient_is_sparse_only_where_it_may_be() -> None:
    assert choose_sparse_embedding(SMOLLM2_135M, CPU, num_processes=1).value
    assert not choose_sparse_embedding(SMOLLM2_135M, CPU, num_processes=2).value


def test_memory_limit_of_a_container_is_read(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert min(memory_limits(tmp_path)) == 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert 2**30 not in memory_limits(tmp_path)


def test_prefetch_gives_what_would_be_made_anyway() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    ahead = Prefetch(make, ahead=True)
    assert [ahead(step) for step in (0, 1, 2, 7, 8)] == [0, 1, 4, 49, 64]
    assert {0, 1, 2, 3, 7, 8} <= set(made)
    plain = Prefetch(make, ahead=False)
    made.clear()
    assert [plain(step) for step in (0, 1)] == [0, 1]
    assert made == [0, 1]


def test_prefetch_raises_what_making_raised() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("no such step")
        return step

    prefetch = Prefetch(make, ahead=True)
    assert prefetch(0) == 0
    with pytest.raises(ValueError, match="no such step"):
        prefetch(1)


@pytest.mark.slow  # compiling takes half a minute
@pytest.mark.filterwarnings("ignore")  # torch.compile meets warnings of its own, and would stop at each as an error
def test_compiled_layers_resume_to_the_bit_and_learn_the_same(data: PreparedData) -> None:
    recipe = load_recipe("smoke", ["compile=on"])
    one, other = Trainer(recipe, data), Trainer(recipe, data)
    for _ in range(2):
        one.train_step()
    state = copy.deepcopy(one.state())
    assert not any("_orig_mod" in name for name in state["model"])
    other.restore(state)
    results = one.train_step(), other.train_step()
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].loss.item() == results[1].loss.item()
    weights = dict(other.model.named_parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.model.named_parameters())
    assert results[0].loss.item() == pytest.approx(ends(data)[0][2], rel=1e-5)
