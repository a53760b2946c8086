"""Public files by address, with the hash they must have."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from shared.errors import DataError
from shared.files import write_atomically

TIMEOUT_S = 5.0
MAX_BYTES = 64_000_000


@dataclass(frozen=True)
class PublicFile:
    """A file on the web that never changes."""

    title: str
    url: str
    sha256: str
    suffix: str


PUBLIC_FILES = {
    "input": PublicFile(
        title="tiny Shakespeare (karpathy/char-rnn)",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        suffix=".txt",
    ),
    "math": PublicFile(
        title="GSM8K train (openai/grade-school-math)",
        url="https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl",
        sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        suffix=".jsonl",
    ),
}


def download(file: PublicFile, path: Path) -> None:
    """Fetch a file, check it, and put it at `path`.

    Raises:
        DataError: the address does not answer within seconds, or sends something else.
    """
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT_S) as response:
            content = response.read(MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DataError(f"{file.title} could not be downloaded: {reason}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(f"{file.title} has the sha256 {found} now, not {file.sha256}; it is not used")
    write_atomically(path, content)
