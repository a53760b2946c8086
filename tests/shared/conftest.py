"""The public weights, for the tests marked `weights`; everything else is made by tests/tiny.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INSTRUCT = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def instruct_folder() -> Path:
    if not (INSTRUCT / "manifest.json").is_file():
        pytest.skip("models/smollm2-135m-instruct is not there; run `python -m shared.pretrained`")
    return INSTRUCT


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
