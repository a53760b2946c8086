"""Which level of instructions a machine gets, told by what its `/proc/cpuinfo` says; and that Arm's compile."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
import torch

from service.engine.kernels import build
from service.engine.kernels.build import LEVELS, compile_library, library_name, usable_levels
from service.engine.kernels.library import load_library
from shared import device as device_module
from shared.cpu import cpu_flags
from shared.device import choose_dtype

CROSS_COMPILER = "aarch64-linux-gnu-g++"
AARCH64 = 183
"""The machine's number in an ELF file's head, at byte 18."""

CORTEX_A72 = """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd08
CPU revision	: 3
"""
RASPBERRY_PI_4 = f"""\
{CORTEX_A72}
{CORTEX_A72.replace(": 0", ": 1", 1)}
Revision	: c03112
Model		: Raspberry Pi 4 Model B Rev 1.2
"""
GRAVITON_2 = """\
processor	: 0
BogoMIPS	: 243.75
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1
"""
GRAVITON_3 = GRAVITON_2.replace("0xd0c", "0xd40").replace("ssbs", "sve i8mm svebf16 bf16 dgh rng ssbs")
DOTS = ["neon_bf16", "neon_dotprod", "portable"]


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "levels", "dtype"),
    [
        ("aarch64", GRAVITON_3, DOTS, torch.bfloat16),
        ("aarch64", GRAVITON_2, DOTS[1:], torch.float32),
        ("aarch64", RASPBERRY_PI_4, DOTS[2:], torch.float32),
        ("arm64", "", DOTS[2:], torch.float32),  # macOS, which has no such file
        ("riscv64", "processor\t: 0\nisa\t: rv64imafdc\n", DOTS[2:], torch.float32),
    ],
)
def test_levels_and_dtype_of_machines_unlike_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, cpuinfo: str, levels: list[str], dtype: torch.dtype
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(cpuinfo)
    flags = cpu_flags(info)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for module in (build, device_module):
        monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    assert [level.name for level in usable_levels()] == levels
    assert choose_dtype(torch.device("cpu"), "auto", purpose="serve").value == dtype


def test_a_compiler_older_than_the_cpu_gives_the_best_level_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newest = build.Level("from_next_year", frozenset(), ("-mno-such-instructions",))
    known = usable_levels()[0]
    monkeypatch.setattr(build, "levels", lambda: (newest, known))
    with caplog.at_level("INFO"):
        assert load_library.__wrapped__().level == known.name
    assert "no kernels for from_next_year" in caplog.text and "no-such-instructions" in caplog.text


@pytest.mark.skipif(shutil.which(CROSS_COMPILER) is None, reason=f"there is no {CROSS_COMPILER} here")
@pytest.mark.parametrize("level", LEVELS["aarch64"], ids=lambda level: level.name)
def test_arm_s_levels_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: build.Level) -> None:
    monkeypatch.setattr(build, "COMPILERS", (CROSS_COMPILER,))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-Wall", "-Wextra", "-Werror"))
    library = tmp_path / library_name(level)
    compile_library(level, library)
    assert int.from_bytes(library.read_bytes()[18:20], "little") == AARCH64
