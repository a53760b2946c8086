"""Compile the kernels with the machine's own compiler: a few seconds, once, kept by the hash of what went into it.

One library per level of instructions; the best that this CPU has is used. An image without a compiler ships them:

    python -m service.engine.kernels.build [LEVEL ...]

builds levels (default: all of this architecture) into the package, where they are found first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from shared.cpu import cpu_flags

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
SHIPPED = SOURCES / "built"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-O2",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-uninitialized",
)
COMPILE_TIMEOUT_S = 120.0
one_at_a_time = threading.Lock()
"""Who wants a library that is just being compiled waits for it."""


class KernelsUnavailable(Exception):
    """There is no compiled library for this machine, and the sentence why. Never reaches a user: torch computes."""


@dataclass(frozen=True, slots=True)
class Level:
    """A set of instructions: the CPU flags it needs, as Linux names them, and the compiler's options for it."""

    name: str
    needs: frozenset[str]
    options: tuple[str, ...]


def x86(name: str, needs: str, options: str, *more: str) -> Level:
    return Level(name, frozenset(needs.split()), (*(f"-m{option}" for option in options.split()), *more))


def arm(name: str, needs: str, options: str) -> Level:
    """A level of Armv8.2, which comes with atomics, and of what it may have besides."""
    return Level(name, frozenset(f"atomics {needs}".split()), (f"-march=armv8.2-a+{options}",))


PORTABLE = Level("portable", frozenset(), ())
AVX512 = "avx512f avx512bw avx512vl avx512dq"
LEVELS = {
    "x86_64": (
        x86(
            "amx",
            f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8",
            f"fma {AVX512} avx512vnni avx512bf16 amx-tile amx-bf16 amx-int8 tune=sapphirerapids",
            "-O3",  # its transposes are loops that GCC 12 keeps in registers only so
        ),
        x86("avx512_bf16", f"{AVX512} avx512_vnni avx512_bf16", f"fma {AVX512} avx512vnni avx512bf16"),
        x86("avx512", AVX512, f"fma {AVX512}"),
        x86("avx2", "avx2 fma", "avx2 fma"),
        PORTABLE,
    ),
    "aarch64": (
        arm("neon_bf16", "asimddp bf16", "dotprod+bf16"),
        arm("neon_dotprod", "asimddp", "dotprod"),
        PORTABLE,  # NEON, which every such CPU has
    ),
}
"""By architecture as Linux names it, best first. Elsewhere only the portable level."""
OTHER_NAMES = {"AMD64": "x86_64", "arm64": "aarch64"}


def levels() -> tuple[Level, ...]:
    """Return this architecture's levels, best first."""
    machine = platform.machine()
    return LEVELS.get(OTHER_NAMES.get(machine, machine), (PORTABLE,))


def usable_levels(wanted: str = "auto") -> list[Level]:
    """Return the levels that this CPU has, best first; with a name, that one alone.

    Raises:
        KernelsUnavailable: no level has that name, or this CPU lacks its instructions.
    """
    flags = cpu_flags()
    usable = [level for level in levels() if level.needs <= flags]
    if wanted == "auto":
        return usable
    if named := [level for level in usable if level.name == wanted]:
        return named
    raise KernelsUnavailable(f"this CPU has no level {wanted!r}; it has {', '.join(level.name for level in usable)}")


def library_name(level: Level) -> str:
    """Name a library after everything it is made of."""
    digest = hashlib.sha256(" ".join((*FLAGS, *level.options, sys.platform)).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.name.encode() + path.read_bytes())
    return f"decoder-{level.name}-{digest.hexdigest()[:16]}.so"


def find_library(level: Level) -> Path:
    """Return the library of a level, compiling it where it is found neither in the package nor in the cache.

    Raises:
        KernelsUnavailable: it cannot be compiled or kept.
    """
    name = library_name(level)
    cache = cache_folder()
    with one_at_a_time:
        for folder in (SHIPPED, cache):
            if (folder / name).is_file():
                return folder / name
        compile_library(level, cache / name)
    return cache / name


def compile_ahead(wanted: str) -> None:
    """Begin, beside what else a start has to do, to compile what `load_library` will look for; it says what fails."""

    def find() -> None:
        with contextlib.suppress(KernelsUnavailable):
            find_library(usable_levels(wanted)[0])

    threading.Thread(target=find, name="compile-ahead", daemon=True).start()


def cache_folder() -> Path:
    """Where compiled libraries are kept: in the user's own home, as nobody else may write what is loaded here."""
    try:
        return Path.home() / ".cache" / "smollm" / "kernels"
    except RuntimeError as error:
        raise KernelsUnavailable(f"there is no home folder to keep compiled kernels in ({error})") from error


def compile_library(level: Level, target: Path) -> None:
    """Compile a level to `target`, which appears whole or not at all.

    Raises:
        KernelsUnavailable: there is no compiler, it failed, or the folder cannot be written.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelsUnavailable(f"there is no C++ compiler here (looked for {', '.join(COMPILERS)})")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".so")
        os.close(handle)
    except OSError as error:
        raise KernelsUnavailable(f"compiled kernels cannot be kept in {target.parent} ({error.strerror})") from error
    command = [compiler, *FLAGS, *level.options, "-o", temporary, str(SOURCES / "decoder.cpp")]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or ["it gave no reason"]
            raise KernelsUnavailable(f"{compiler} failed: {lines[0][:300]}")
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"{compiler} failed: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    log.info("compiled the kernels for %s with %s into %s", level.name, compiler, target)


def main(names: list[str]) -> int:
    """Build levels into the package."""
    for level in levels():
        if not names or level.name in names:
            compile_library(level, SHIPPED / library_name(level))
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sys.exit(main(sys.argv[1:]))
    except KernelsUnavailable as error:
        sys.exit(str(error))
