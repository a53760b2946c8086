"""Which device, which dtype, how many threads: every automatic choice comes with its reason."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from shared.cpu import cpu_flags
from shared.errors import ConfigError

T = TypeVar("T")
Purpose = Literal["serve", "train"]

MOST_THREADS = 1_024
"""More are a mistake, and with a million of them PyTorch ends in a segmentation fault."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DENSE_16BIT_PEAK_FLOPS = {
    # Dense tensor-core bf16/fp16 peaks from the vendors' data sheets. The first name found in the device's wins.
    "GB200": 2_500e12,
    "B300": 2_500e12,
    "B200": 2_250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 5090": 209.5e12,
    "RTX 5080": 112.6e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 4070 Ti": 80.2e12,
    "RTX 4070": 58.3e12,
    "RTX 3090": 71e12,
    "RTX 3080": 59.5e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "MI300X": 1_307e12,
    "MI250X": 383e12,
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or this machine has no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@dataclass(frozen=True)
class Choice(Generic[T]):
    """What was chosen, and the reason a person reads in the log."""

    value: T
    reason: str


def choose_device(requested: str) -> Choice[torch.device]:
    """Choose where tensors live: "auto", or a torch device such as "cpu", "cuda:1", "mps".

    Raises:
        ConfigError: the device asked for is unknown or not on this machine.
    """
    if requested == "auto":
        if torch.cuda.is_available():
            return Choice(torch.device("cuda"), f"found {torch.cuda.get_device_name()}")
        if torch.backends.mps.is_available():
            return Choice(torch.device("mps"), "found an Apple GPU")
        return Choice(torch.device("cpu"), "found no GPU that this PyTorch can use")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise ConfigError(f"device is {requested!r}; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {requested!r}, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs; use auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device is 'mps', but PyTorch sees no Apple GPU; use auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device is {requested!r}; use auto, cpu, cuda, cuda:N or mps")
    return Choice(device, "as asked for")


def choose_dtype(device: torch.device, requested: str, *, purpose: Purpose) -> Choice[torch.dtype]:
    """Choose the numbers of the matrix products.

    To serve, it is the dtype of the weights. To train, weights stay float32 and this is the autocast dtype, where
    float32 means no autocast.

    Raises:
        ConfigError: unknown, or one this device computes a hundred times slower or cannot train in.
    """
    if requested != "auto":
        return requested_dtype(device, requested, purpose)
    choices: dict[str, Callable[[Purpose], Choice[torch.dtype]]] = {"cuda": cuda_dtype, "mps": mps_dtype}
    return choices.get(device.type, cpu_dtype)(purpose)


def requested_dtype(device: torch.device, requested: str, purpose: Purpose) -> Choice[torch.dtype]:
    if requested not in DTYPES:
        raise ConfigError(f"dtype is {requested!r}; use auto, {', '.join(DTYPES)}")
    dtype = DTYPES[requested]
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError(
            "dtype is 'float16', which a CPU multiplies hundreds of times slower; use auto: FP16 files load as well"
        )
    if dtype == torch.float16 and purpose == "train":
        raise ConfigError("dtype is 'float16', which needs loss scaling to train; use auto, bfloat16 or float32")
    return Choice(dtype, "as asked for")


def cuda_dtype(purpose: Purpose) -> Choice[torch.dtype]:
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice(torch.bfloat16, "the GPU multiplies bfloat16 at full speed")
    if purpose == "train":
        return Choice(torch.float32, "the GPU has no bfloat16, and float16 would need loss scaling")
    return Choice(torch.float16, "the GPU has no bfloat16")


def mps_dtype(purpose: Purpose) -> Choice[torch.dtype]:
    if purpose == "train":
        return Choice(torch.float32, "float16 would need loss scaling on an Apple GPU")
    return Choice(torch.float16, "an Apple GPU multiplies float16 at full speed")


def cpu_dtype(purpose: Purpose) -> Choice[torch.dtype]:  # noqa: ARG001
    """bfloat16 only where the CPU has instructions for it; never float16, which is a thousand times slower."""
    if flags := cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Choice(torch.bfloat16, f"the CPU multiplies bfloat16 in hardware ({', '.join(sorted(flags))})")
    return Choice(torch.float32, "the CPU has no bfloat16 instructions")


def choose_num_threads(requested: int, *, cgroup_root: Path = Path("/sys/fs/cgroup")) -> Choice[int]:
    """Choose how many threads compute; 0 asks for as many as this process may really use.

    A container's quota is rounded down: one thread too many makes every step wait for a thread that is throttled.
    """
    if not 0 <= requested <= MOST_THREADS:
        raise ConfigError(f"num_threads is {requested}; it must lie in 0 (automatic)..{MOST_THREADS}")
    if requested:
        return Choice(requested, "as asked for")
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(cgroup_root)
    if quota is not None and quota < affinity:
        return Choice(max(1, math.floor(quota)), f"the container may use {quota:g} of {affinity} cores")
    return Choice(affinity, f"this process may run on {affinity} cores")


def cpu_quota(cgroup_root: Path) -> float | None:
    """Return the cores that the control group allows, or None where it sets no limit. Reads version 2, then 1."""
    quotas = []
    for folder in cgroup_folders(cgroup_root):
        try:  # version 2: "max 100000" or "150000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):
            pass
        try:  # version 1: -1 is no limit
            microseconds = int((folder / "cpu.cfs_quota_us").read_text())
            if microseconds > 0:
                quotas.append(microseconds / int((folder / "cpu.cfs_period_us").read_text()))
        except (OSError, ValueError):
            pass
    return min(quotas) if quotas else None


def cgroup_folders(root: Path) -> list[Path]:
    """List the folders whose limits hold for this process: the mount's root and every one down to its own group."""
    folders = [root, root / "cpu", root / "cpu,cpuacct"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base = root
        elif "cpu" in controllers.split(","):
            base = root / controllers
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        folders += [base.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders


def peak_flops(device: torch.device, dtype: torch.dtype) -> Choice[float | None]:
    """Return the device's peak of dense matrix products in FLOP/s at `dtype`; None where nobody published it."""
    if device.type != "cuda":
        return Choice(None, f"n/a: no published peak for {device.type}")
    name = torch.cuda.get_device_name(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice(None, f"n/a: no peak listed for {dtype} on {name}")
    peak = peak_of_named_gpu(name)
    if peak is None:
        return Choice(None, f"n/a: no peak listed for {name}")
    return Choice(peak, f"{name}: {peak / 1e12:g} TFLOP/s dense 16-bit")


def peak_of_named_gpu(name: str) -> float | None:
    """Look a GPU's 16-bit peak up by the name its driver gives: "NVIDIA H100 80GB HBM3"."""
    words = f" {name.replace('-', ' ').replace('_', ' ')} ".lower()
    for listed, peak in DENSE_16BIT_PEAK_FLOPS.items():
        if f" {listed.lower()} " in words:
            return peak
    return None
