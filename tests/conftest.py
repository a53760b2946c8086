"""Which Redis the tests run on (`--redis-server PATH` instead of the first one found), and the public weights."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

INSTRUCT = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--redis-server", metavar="PATH", help="a redis-server or valkey-server for every Redis of a test")


def pytest_configure(config: pytest.Config) -> None:
    """Put the server before all others: `find_server` looks for either name on PATH."""
    given = config.getoption("--redis-server")
    if given is None:
        return
    server = Path(given).resolve(strict=True)
    directory = tempfile.TemporaryDirectory(prefix="smollm-server-")
    config.add_cleanup(directory.cleanup)
    for name in ("redis-server", "valkey-server"):
        (Path(directory.name) / name).symlink_to(server)
    os.environ["PATH"] = f"{directory.name}{os.pathsep}{os.environ['PATH']}"


def pytest_report_header() -> str:
    from service.queue.connection import blocking_redis, check_server
    from service.queue.local_server import start_redis

    with start_redis() as server, blocking_redis(server.url) as client:
        return f"queue: {check_server(client)} ({server.description})"


CAPABILITY_VERSION_3 = 0x2008_0522
OVERRIDES_MODES = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, capabilities(7): what lets root pass over the mode of a file."""


@pytest.fixture
def modes_hold() -> Iterator[None]:
    """Let what a file's mode forbids be forbidden to root too, in this thread, as long as a test runs."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read everything")
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: the lower 32 of each, then the upper
    assert libc.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~OVERRIDES_MODES
    assert libc.capset(header, less) == 0
    yield
    assert libc.capset(header, before) == 0


@pytest.fixture(scope="session")
def instruct_folder() -> Path:
    """Public weights, for the tests marked `weights`; everything else is made by tests/tiny.py."""
    if not (INSTRUCT / "manifest.json").is_file():
        pytest.skip("models/smollm2-135m-instruct is not there; run `python -m shared.pretrained`")
    return INSTRUCT


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from a second thread, and lose much where the machine is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
