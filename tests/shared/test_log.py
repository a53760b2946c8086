"""One line each: text for a person, JSON for a collector."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shared.log import configure_logging, wants_json


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_text_names_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker", style="text")
    logging.getLogger("service.worker").info("loaded %s", "tiny")
    line = capsys.readouterr().err
    assert line.endswith("INFO    worker: loaded tiny\n")


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("api", style="json")
    logging.getLogger("service.api").warning("full: %d jobs", 3, extra={"job": "abc", "color_message": "full"})
    entry = json.loads(capsys.readouterr().err)
    assert entry["message"] == "full: 3 jobs"
    assert entry["level"] == "WARNING"
    assert entry["logger"] == "service.api"
    assert entry["process"] == "api"
    assert entry["job"] == "abc"
    assert "time" in entry and "color_message" not in entry


def test_a_traceback_stays_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("api", style="json")
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logging.getLogger().exception("it failed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ValueError" in json.loads(lines[0])["exc_info"]


def test_explicit_styles_win() -> None:
    assert wants_json("json")
    assert not wants_json("text")


def test_it_imports_without_the_json_package() -> None:
    code = (
        "import sys; sys.modules['pythonjsonlogger'] = None\n"
        "from shared.log import configure_logging; configure_logging('trainer', style='text')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
