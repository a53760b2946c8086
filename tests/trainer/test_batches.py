"""A batch depends on the seed, the curriculum, the data and the step; on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DataError
from tests.trainer.test_curriculum import SOURCES, stage_tables
from trainer.batches import Batches, epoch_order
from trainer.curriculum import Curriculum, Stage
from trainer.processes import Processes
from trainer.token_file import TokenFile

T = 8
SIZES = {"input": 2_600 * T + 1, "code": T + 1}
STAGES = [Stage("a", 0, 50, {"input": 1.0}), Stage("b", 50, 200, {"input": 0.8, "code": 0.2})]


def token_files(sizes: dict[str, int] = SIZES) -> dict[str, TokenFile]:
    """Files whose tokens count upwards, so that every window names its own place."""
    return {
        name: TokenFile(
            source=name,
            train=np.arange(size, dtype=np.uint16),
            held_out=np.empty(0, dtype=np.uint16),
            num_train_bytes=size,
            num_held_out_bytes=0,
            manifest={"train": {"sha256": f"{name}-{size}"}},
        )
        for name, size in sizes.items()
    }


def batches(seed: int = 1, **sizes: int) -> Batches:
    return Batches(token_files(SIZES | sizes), Curriculum(STAGES, 32), seed=seed, sequence_length=T)


def test_any_step_is_the_same_whatever_was_asked_before() -> None:
    in_order = [batches().batch_at(step) for step in (0, 60, 199)]
    there = batches()
    for step, expected in ((199, in_order[2]), (0, in_order[0]), (60, in_order[1]), (0, in_order[0])):
        np.testing.assert_array_equal(there.batch_at(step).inputs_BT, expected.inputs_BT)
        np.testing.assert_array_equal(there.batch_at(step).sources_B, expected.sources_B)


@settings(max_examples=40, deadline=None)
@given(stage_tables(longest=20), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_theorem_about_any_table(
    stages: list[Stage], micro_batch_size: int, per_process: int, world_size: int, data: st.DataObject
) -> None:
    """No window twice in a source's epoch; the same rows however they are split and in whatever order asked for."""
    batch_size = micro_batch_size * per_process * world_size
    files = token_files({name: data.draw(st.integers(1, 12)) * T + 1 for name in SOURCES})
    curriculum = Curriculum(stages, batch_size)

    def made() -> Batches:
        return Batches(files, curriculum, seed=7, sequence_length=T)

    in_order = made()
    batches_of_run = [in_order.batch_at(step) for step in range(curriculum.num_steps)]
    for index, name in enumerate(curriculum.sources):
        firsts = np.concatenate([batch.inputs_BT[batch.sources_B == index, 0] for batch in batches_of_run])
        windows = files[name].num_windows(T)
        for epoch in range(0, len(firsts), windows):
            seen = firsts[epoch : epoch + windows]
            assert len(set(seen.tolist())) == len(seen), (name, epoch)

    processes = [Processes(rank=rank, world_size=world_size) for rank in range(world_size)]
    asked = data.draw(st.permutations(range(curriculum.num_steps)))[:10]  # as workers that fetch ahead may
    each = [made() for _ in processes]
    for step in asked:
        rows = [
            there.batch_at(step).inputs_BT[first : first + micro_batch_size]
            for process, there in zip(processes, each, strict=True)
            for first in process.share_of(batch_size, micro_batch_size)
        ]
        np.testing.assert_array_equal(np.concatenate(rows), batches_of_run[step].inputs_BT)


def test_targets_are_the_next_tokens() -> None:
    batch = batches().batch_at(70)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == (32, T)
    np.testing.assert_array_equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
    np.testing.assert_array_equal(batch.inputs_BT + 1, batch.targets_BT)


def test_no_window_repeats_within_an_epoch_and_none_is_left_out() -> None:
    source = batches()
    windows = source._num_windows[0]
    first_epoch = [int(source.window(0, n)[0]) for n in range(windows)]
    second_epoch = [int(source.window(0, n)[0]) for n in range(windows, 2 * windows)]
    assert sorted(first_epoch) == sorted(second_epoch) == list(range(0, windows * T, T))
    assert first_epoch != second_epoch


def test_a_source_of_one_window_keeps_its_share() -> None:
    there = batches()
    sources = np.concatenate([there.batch_at(step).sources_B for step in range(50, 200)])
    assert np.mean(sources == there.source_names.index("code")) == 0.2


def test_a_tiny_source_does_not_push_a_large_ones_order_out() -> None:
    """One window at four fifths of the rows is many epochs a step; the large order is still made once."""
    stages = [Stage("a", 0, 50, {"input": 0.2, "code": 0.8})]
    there = Batches(token_files(), Curriculum(stages, 32), seed=1, sequence_length=T)
    for step in range(20):
        there.batch_at(step)
    assert there._epoch_orders[there.source_names.index("input")].cache_info().misses == 1


def test_another_seed_gives_another_order_of_the_same_data() -> None:
    assert batches(seed=1).data_hash == batches(seed=2).data_hash
    assert not np.array_equal(batches(seed=1).batch_at(3).inputs_BT, batches(seed=2).batch_at(3).inputs_BT)


def test_other_data_has_another_hash() -> None:
    assert batches().data_hash != batches(code=2 * T + 1).data_hash


def test_the_order_of_an_epoch_never_changes_between_versions() -> None:
    assert epoch_order(6, 1, "input", 0).tolist() == [5, 4, 1, 2, 0, 3]


def test_a_source_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="'code' has 8 tokens to train on, fewer than one window of 9"):
        batches(code=T)


def test_a_memory_map_serves_as_well(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.arange(SIZES["input"], dtype="<u2").tofile(path)
    files = token_files()
    mapped = TokenFile(
        "input", np.memmap(path, "<u2", mode="r"), files["input"].held_out, 0, 0, files["input"].manifest
    )
    there = Batches({**files, "input": mapped}, Curriculum(STAGES, 32), seed=1, sequence_length=T)
    np.testing.assert_array_equal(there.batch_at(7).inputs_BT, batches().batch_at(7).inputs_BT)
