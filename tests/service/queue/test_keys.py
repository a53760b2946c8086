"""Key names and scripts: one prefix, one place, each script short enough to read at once."""

from __future__ import annotations

import re

import pytest

from service.queue import keys, scripts

FILES = sorted(scripts.DIRECTORY.glob("*.lua"))


def test_every_key_is_ours_and_described() -> None:
    assert len(set(keys.NAMES.values())) == len(keys.NAMES)
    for name, value in keys.NAMES.items():
        assert value.startswith("{smollm}:"), name
        assert name in (keys.__doc__ or "") or name in ("PREFIX", "ROUTE"), f"{name} is not in the table"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_script_is_short_and_writes_no_key_by_hand(path: object) -> None:
    text = path.read_text()  # type: ignore[attr-defined]
    assert len(text.splitlines()) <= 60
    assert keys.PREFIX not in text
    assert max(map(len, text.splitlines())) <= 120


def test_every_script_uses_only_what_it_needs() -> None:
    parts = {path.stem for path in FILES} - set(scripts.NAMES)
    for name in scripts.NAMES:
        body = (scripts.DIRECTORY / f"{name}.lua").read_text()
        needed = re.search(r"^-- needs:(.*)$", body, re.MULTILINE)
        for part in needed.group(1).split() if needed else []:
            assert part in parts, f"{name} needs {part}, which is not a part"
