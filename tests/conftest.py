"""Which Redis the tests run on (`--redis-server PATH` instead of the first one found), and the public weights."""

from __future__ import annotations

import os
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
