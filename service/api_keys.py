"""Who may ask, and for how much: the API's keys, known by their hashes alone, and what each is entitled to.

A key is `sk-` and 32 random bytes (`python -m service key` makes one), so its plain SHA-256 tells nobody anything:
there is no dictionary to try. Keys come from two places: `SMOLLM_API_KEYS`, a list of keys without limits, and
`SMOLLM_API_KEYS_FILE`, TOML with one table per key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared.errors import ConfigError

log = logging.getLogger(__name__)

Priority = Literal["high", "normal", "batch"]
PRIORITIES: Final[dict[Priority, int]] = {"high": 0, "normal": 1, "batch": 2}
"""0 is served first."""

HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
ID_DIGITS = 16


class ApiKey(BaseModel):
    """One key's record; the key itself is nowhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sha256: str = Field(description="of the key, 64 hexadecimal digits")
    name: str = Field("", max_length=100, description="whose it is, for people")
    weight: Annotated[float, Field(gt=0, le=1_000)] = Field(
        1.0, description="share of a busy service, against the other keys' weights"
    )
    max_priority: Priority = Field("high", description="the best priority its requests may ask for")
    requests_per_minute: Annotated[float, Field(gt=0)] | None = Field(
        None, description="token bucket: jobs per minute, a minute's worth at once; null is no limit"
    )
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the same for cost: prompt + max_new_tokens"
    )
    max_queued_jobs: Annotated[int, Field(ge=1)] | None = Field(None, description="of this key's jobs that wait")

    @field_validator("sha256")
    @classmethod
    def is_hash(cls, text: str) -> str:
        """Take the 64 digits with or without `sha256:` in front."""
        text = text.removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            raise ValueError(
                "must be the 64 hexadecimal digits of a key's SHA-256; `python -m service key` prints both"
            )
        return text

    @property
    def id(self) -> str:
        """What stands for it in Redis, metrics and logs: the beginning of its hash; "" where no key is asked for."""
        return self.sha256[:ID_DIGITS]


ANYBODY: Final = ApiKey.model_construct(sha256="", name="anybody")
"""Everyone, where no key is asked for."""


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    return "sk-" + secrets.token_urlsafe(32)


def parse_list(text: str) -> tuple[ApiKey, ...]:
    """Read `key,sha256:HASH,...`: a key that stands there itself is hashed at once and forgotten."""
    entries = (entry.strip() for entry in text.split(","))
    return tuple(
        ApiKey(sha256=found[1] if (found := HASH.fullmatch(entry)) else hash_of(entry)) for entry in entries if entry
    )


def read_file(path: Path) -> tuple[ApiKey, ...]:
    """Read a file of keys, one `[[key]]` table each.

    Raises:
        ConfigError: the file cannot be read, or says something that no key has.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"SMOLLM_API_KEYS_FILE: {path} cannot be read: {reason}.") from error
    tables = document.pop("key", [])
    if document or not isinstance(tables, list) or not tables:
        raise ConfigError(f"SMOLLM_API_KEYS_FILE: {path} must hold [[key]] tables and nothing else.")
    try:
        keys = tuple(ApiKey.model_validate(table) for table in tables)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in fault["loc"])
        raise ConfigError(f"SMOLLM_API_KEYS_FILE: in {path}, {name}: {fault['msg']}.") from None
    if len({key.sha256 for key in keys}) < len(keys):
        raise ConfigError(f"SMOLLM_API_KEYS_FILE: {path} names one key twice.")
    return keys


def find_key(keys: Iterable[ApiKey], presented: str) -> ApiKey | None:
    """Return the record of a key. Compares with all of them, each whole, so that time tells nothing."""
    digest = hash_of(presented)
    found = None
    for key in keys:
        if hmac.compare_digest(digest, key.sha256):
            found = key
    return found


class KeyRing:
    """The keys there are now: a changed file counts without a restart."""

    def __init__(self, listed: Sequence[ApiKey], path: Path | None) -> None:
        """Raises `ConfigError` as `read_file`."""
        self._listed = tuple(listed)
        self._path = path
        self._state = self._look()
        self.keys = self._all(read_file(path) if path else ())

    async def refresh(self) -> None:
        """Read the file again if it changed; one that cannot be read leaves the keys as they are."""
        state = self._look()
        if self._path is None or state == self._state:
            return
        self._state = state
        try:
            self.keys = self._all(read_file(self._path))
        except ConfigError as error:
            log.error("%s The keys stay as they were.", error)
        else:
            log.info("%d keys are known now", len(self.keys))

    def _all(self, filed: Sequence[ApiKey]) -> tuple[ApiKey, ...]:
        """The file's record of a key wins over the list's, which says less."""
        return tuple({key.sha256: key for key in (*self._listed, *filed)}.values())

    def _look(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size
