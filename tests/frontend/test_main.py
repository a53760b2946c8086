"""`python -m frontend`: a wrong setting or a taken port is one sentence and exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.processes import ROOT


def run_page(**settings: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SMOLLM_", "UI_"))}
    return subprocess.run(
        [sys.executable, "-m", "frontend"],
        cwd=ROOT,
        env={**inherited, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_taken_port_names_the_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run_page(UI_PORT=str(port))
    assert ended.returncode == 2
    assert ended.stderr == f"Port {port} on 127.0.0.1 is taken: set UI_PORT to a free one.\n"


@pytest.mark.parametrize(
    ("name", "value"), [("UI_PORT", "many"), ("UI_PORT", "70000"), ("SMOLLM_API_URL", "localhost:8000")]
)
def test_a_wrong_setting_is_named_with_its_value(name: str, value: str) -> None:
    ended = run_page(**{name: value})
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"The setting {name} is {value!r}: ")
    assert ended.stderr.count("\n") == 1
