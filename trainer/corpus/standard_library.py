"""Code without the web: the standard library of the Python that runs this."""

from __future__ import annotations

import json
import platform
import sysconfig
from pathlib import Path

from shared.files import write_atomically

MAX_BYTES = 6_000_000
MAX_FILE_BYTES = 60_000
"""Longer files are tables and generated code more often than not."""

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def bring_standard_library(path: Path) -> str:
    """Write one document per source file to `path` (.jsonl); return what they are."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    size = 0
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if LEFT_OUT & set(relative.parts) or file.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few files show other encodings on purpose
            continue
        if text.strip() and "\0" not in text:
            documents.append(json.dumps({"text": text, "file": relative.as_posix()}))
            size += len(text)
        if size >= MAX_BYTES:
            break
    write_atomically(path, "\n".join(documents) + "\n")
    return f"{len(documents)} files of Python {platform.python_version()}'s standard library"
