"""Several processes under a real torchrun: the same batches, the same bits, one meeting per step, any one may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from tests.trainer.kills import SLOWLY, wait_for
from tests.trainer.small_run import command, train_small, weights_sha256
from trainer.config import Torchrun
from trainer.processes import Processes
from trainer.run_folder import RunFolder, read_rows
from trainer.state import Checkpoints

pytestmark = pytest.mark.timeout(900)  # three Pythons start for each test, and the machine may be busy

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run in one process; read only."""
    return train_small(tmp_path_factory.mktemp("alone"))


def torchrun(root: Path, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return command(root, *arguments, launcher=[*TORCHRUN, *options])


def workers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Torchrun's processes by rank."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in read_rows(folder.metrics) if row["kind"] == "train"]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_every_row_goes_to_one_process(micro_batch_size: int, per_process: int, world_size: int) -> None:
    num_rows = micro_batch_size * per_process * world_size
    firsts = [
        first
        for rank in range(world_size)
        for first in Processes(rank=rank, world_size=world_size).share_of(num_rows, micro_batch_size)
    ]
    assert firsts == list(range(0, num_rows, micro_batch_size))


def test_micro_batches_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"8 micro-batches of 4, which 3 processes cannot share .* keeping their prod"
    ):
        Processes(rank=0, world_size=3).share_of(32, 4)


def test_one_gpu_for_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for field, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(field, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Torchrun.read() == Torchrun(rank=1, world_size=2, local_rank=1, local_world_size=2)
    with pytest.raises(ConfigError, match="device is 'cuda:0', and each of torchrun's processes takes its own"):
        Processes.join("cuda:0")


def test_two_processes_one_of_which_dies_end_like_one_alone(tmp_path: Path, alone: RunFolder) -> None:
    folder = RunFolder(tmp_path / "runs" / "smoke")
    process = torchrun(tmp_path, "train", "smoke", *SLOWLY, options=("--max-restarts=2",))
    assert wait_for(lambda: len(losses(folder)) >= 8, process), process.communicate()[1]
    workers(process)[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "resuming run 'smoke'" in folder.training_log.read_text(), "torchrun started both again"
    assert weights_sha256(folder) == weights_sha256(alone)
    assert losses(folder) == losses(alone)


def test_stopped_with_two_processes_it_goes_on_with_one(tmp_path: Path, alone: RunFolder) -> None:
    folder = RunFolder(tmp_path / "runs" / "smoke")
    process = torchrun(tmp_path, "train", "smoke", *SLOWLY, "--set", "save_every=1000", "--set", "evaluate_every=1000")
    assert wait_for(lambda: len(losses(folder)) >= 3, process), process.communicate()[1]
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to its processes, and says itself that it was stopped
    _, errors = process.communicate(timeout=400)
    assert "saved; the same command goes on from here" in errors
    stopped = read_rows(folder.metrics)[-1]
    assert stopped["state"] == "stopped"
    assert Checkpoints(folder.checkpoints, keep=2).steps()[-1] == stopped["at_step"]
    train_small(tmp_path)
    assert weights_sha256(folder) == weights_sha256(alone)
    assert losses(folder) == losses(alone)


def test_shards_learn_the_same_and_one_process_reads_them(tmp_path: Path, alone: RunFolder) -> None:
    """FSDP2: the norm of the gradient is summed shard by shard, so the last bits differ from one process's."""
    folder = RunFolder(tmp_path / "runs" / "smoke")
    process = torchrun(tmp_path, "train", "smoke", "--set", 'parallel="fsdp"', "--set", "num_threads=1")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    checkpoints, theirs = (Checkpoints(run.checkpoints, keep=2) for run in (folder, alone))
    newest = checkpoints.path(20)
    assert len(list(newest.glob("shard-*.safetensors"))) == 2
    ours, one = checkpoints.load(20), theirs.load(20)
    assert ours["model"].keys() == one["model"].keys()
    for name, tensor in ours["model"].items():
        assert (tensor - one["model"][name]).abs().max() < 1e-4, name
    assert ours["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()
    # Go on in one process from the shards, two steps before the end.
    earlier = checkpoints.steps()[-2]
    (newest / "state.pt").write_bytes(b"gone")
    train_small(tmp_path)
    assert f"at step {earlier}/20" in folder.training_log.read_text()
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)


GRADIENTS = """
import sys
from pathlib import Path

import torch

from tests.trainer.small_run import small_data
from trainer.processes import Processes
from trainer.recipe import load_recipe
from trainer.train import Trainer

root, out = map(Path, sys.argv[1:])
processes = Processes.join("cpu")
split = ["micro_batch_size=1", "gradient_accumulation_steps=8", "clip_norm=0.0"]
trainer = Trainer(load_recipe("smoke", split), processes.in_turn(lambda: small_data(root)), processes)
trainer.train_step()  # DDP forms its buckets
gradients = {}
trainer.optimizer.register_step_pre_hook(
    lambda *_: gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
)
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    result = trainer.train_step()
meetings = [event.name for event in profile.events() if event.name in ("gloo:all_reduce", "gloo:all_gather")]
torch.save({"meetings": meetings, "gradients": gradients, "loss": result.loss}, out / f"{processes.rank}.pt")
processes.leave()
"""


def test_gradients_meet_once_a_step_however_many_micro_batches(tmp_path: Path) -> None:
    import torch

    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    results = {}
    for number, launcher in ((1, []), (2, TORCHRUN)):
        out = tmp_path / str(number)
        out.mkdir()
        arguments = [sys.executable, *launcher, str(script), str(tmp_path), str(out)]
        subprocess.run(arguments, check=True, env=environment, timeout=400, capture_output=True)
        results[number] = [torch.load(path, weights_only=True) for path in sorted(out.glob("*.pt"))]
    [one], [first, second] = results[1], results[2]
    assert one["meetings"] == []
    assert first["meetings"] == second["meetings"] == ["gloo:all_reduce", "gloo:all_gather"], "gradients, then losses"
    assert first["loss"] == second["loss"] == one["loss"]
    for name, gradient in one["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        # ((a + b) + c) + d against (a + b) + (c + d): the last bits.
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-5, atol=1e-7)
