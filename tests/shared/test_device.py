"""Choices of device, dtype and threads, on this machine and on machines described by files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from shared import device as device_module
from shared.cpu import cpu_flags
from shared.device import (
    choose_device,
    choose_dtype,
    choose_num_threads,
    cpu_quota,
    peak_flops,
    peak_of_named_gpu,
)
from shared.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_device_says_why() -> None:
    choice = choose_device("auto")
    assert choice.value.type in ("cpu", "cuda", "mps")
    assert "found" in choice.reason


@pytest.mark.parametrize("requested", ["gpu", "cuda:99", "meta", ""])
def test_an_unusable_device_is_named(requested: str) -> None:
    with pytest.raises(ConfigError, match="device is"):
        choose_device(requested)


def test_the_device_asked_for() -> None:
    assert choose_device("cpu").value == CPU


def test_float16_never_runs_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="float16"):
        choose_dtype(CPU, "float16", purpose="serve")
    with pytest.raises(ConfigError, match="loss scaling"):
        choose_dtype(torch.device("cuda"), "float16", purpose="train")
    with pytest.raises(ConfigError, match="'half'"):
        choose_dtype(CPU, "half", purpose="serve")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f"}, torch.float32),
        ({"avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"amx_tile", "amx_bf16"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
@pytest.mark.parametrize("purpose", ["serve", "train"])
def test_bfloat16_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: torch.dtype, purpose: device_module.Purpose
) -> None:
    monkeypatch.setattr(device_module, "cpu_flags", lambda: frozenset(flags))
    choice = choose_dtype(CPU, "auto", purpose=purpose)
    assert choice.value == expected
    assert "bfloat16" in choice.reason


def test_an_apple_gpu_serves_float16_and_trains_float32() -> None:
    mps = torch.device("mps")
    assert choose_dtype(mps, "auto", purpose="serve").value == torch.float16
    assert choose_dtype(mps, "auto", purpose="train").value == torch.float32


def test_flags_of_x86_and_arm(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16\nbugs\t: x\n")
    assert cpu_flags(info) == {"fpu", "avx512_bf16"}
    info.write_text("Features\t: fp asimd bf16\n")
    assert "bf16" in cpu_flags(info)
    assert cpu_flags(tmp_path / "absent") == frozenset()


def test_quota_of_version_2(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5


def test_quota_of_version_1(tmp_path: Path) -> None:
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "cpu.cfs_period_us").write_text("100000")
    (folder / "cpu.cfs_quota_us").write_text("-1")
    assert cpu_quota(tmp_path) is None
    (folder / "cpu.cfs_quota_us").write_text("50000")
    assert cpu_quota(tmp_path) == 0.5


@pytest.mark.parametrize(("quota", "threads"), [("50000 100000", 1), ("100000 100000", 1), ("199000 100000", 1)])
def test_a_quota_is_rounded_down_but_leaves_one(tmp_path: Path, quota: str, threads: int) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may run on one core only")
    (tmp_path / "cpu.max").write_text(quota)
    choice = choose_num_threads(0, cgroup_root=tmp_path)
    assert choice.value == threads
    assert "container" in choice.reason


def test_threads_follow_affinity_and_wishes(tmp_path: Path) -> None:
    assert choose_num_threads(0, cgroup_root=tmp_path).value == len(os.sched_getaffinity(0))
    assert choose_num_threads(7, cgroup_root=tmp_path).value == 7
    with pytest.raises(ConfigError, match="num_threads is -1"):
        choose_num_threads(-1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce MX150", None),
    ],
)
def test_peaks_by_the_name_of_the_driver(name: str, peak: float | None) -> None:
    assert peak_of_named_gpu(name) == peak


def test_no_peak_is_invented_for_a_cpu() -> None:
    choice = peak_flops(CPU, torch.bfloat16)
    assert choice.value is None
    assert choice.reason.startswith("n/a")
