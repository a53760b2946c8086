"""What several files of these tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.small_run import train_small


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a finished run and its export."""
    root = tmp_path_factory.mktemp("finished")
    train_small(root)
    return root
