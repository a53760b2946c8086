"""/runs: what training runs wrote, for the page that shows them. Reads files that a trainer may be writing."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from service.api.answers import RowsAnswer, RunsAnswer
from service.api.caller import identify
from service.api.documentation import errors
from service.api.errors import JsonResponse, shorten
from service.api.state import state_of
from service.errors import NotFound

router = APIRouter(prefix="/runs", tags=["runs"], dependencies=[Depends(identify)])

MAX_ROWS = 2_000
MOST_ROWS = 100_000
Row = dict[str, Any]
MaxRows = Annotated[int, Query(ge=1, le=MOST_ROWS, description="thinned out evenly to this many")]
AfterStep = Annotated[int, Query(ge=-1, le=2**53, description="only rows of later steps")]


async def find_run(request: Request, name: str) -> Path:
    """Return the folder of a run. Only names that stand in the runs folder are known, so no name leads outside.

    Raises:
        NotFound: there is no such run.
    """
    folders = list_folders(state_of(request).settings.runs_dir)
    if name not in folders:
        raise NotFound(f"There is no run {shorten(name)}; GET /runs lists them.", param="name", code="run_not_found")
    return folders[name]


RunDep = Annotated[Path, Depends(find_run)]


def list_folders(runs_dir: Path) -> dict[str, Path]:
    try:
        return {path.name: path for path in sorted(runs_dir.iterdir()) if path.is_dir() and path.name[0] != "."}
    except OSError:
        return {}


@router.get("", summary="The training runs there are", responses={200: {"model": RunsAnswer}, **errors(401)})
async def list_runs(request: Request) -> Response:
    folders = list_folders(state_of(request).settings.runs_dir)
    runs = await asyncio.to_thread(lambda: [summarise(path) for path in folders.values()])
    return JsonResponse({"runs": runs})


@router.get(
    "/{name}/metrics", summary="Numbers of a run", responses={200: {"model": RowsAnswer}, **errors(401, 404, 422)}
)
async def read_metrics(folder: RunDep, max_rows: MaxRows = MAX_ROWS, after_step: AfterStep = -1) -> Response:
    """The rows of metrics.jsonl. Where there are more than `max_rows`, training steps are thinned out evenly; the
    last one, evaluations and changes of state stay as long as there is room."""
    rows = await asyncio.to_thread(read_rows, folder / "metrics.jsonl")
    rows = [row for row in rows if step_of(row) > after_step]
    return JsonResponse({"name": folder.name, "num_rows": len(rows), "rows": clean(thin_out(rows, max_rows))})


@router.get(
    "/{name}/samples", summary="Texts a run wrote", responses={200: {"model": RowsAnswer}, **errors(401, 404, 422)}
)
async def read_samples(folder: RunDep, max_rows: MaxRows = MAX_ROWS, after_step: AfterStep = -1) -> Response:
    """The rows of samples.jsonl, the newest where there are more than `max_rows`."""
    rows = await asyncio.to_thread(read_rows, folder / "samples.jsonl")
    rows = [row for row in rows if step_of(row) > after_step]
    return JsonResponse({"name": folder.name, "num_rows": len(rows), "rows": clean(rows[-max_rows:])})


def summarise(folder: Path) -> Row:
    """Where a run stands, by the last rows of their kinds."""
    rows = read_rows(folder / "metrics.jsonl")
    last: dict[str, Row] = {str(row.get("kind")): row for row in rows}
    state, train = last.get("run", {}), last.get("train", {})
    steps = [row["step"] for row in (last.get("train"), last.get("evaluation")) if row and "step" in row]
    try:
        changed_s = (folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        changed_s = None
    summary = {
        "name": folder.name,
        "state": state.get("state"),
        "step": max(steps, key=lambda step: step if isinstance(step, int) else -1, default=None),
        "num_steps": state.get("num_steps"),
        "stage": train.get("stage"),
        "loss": train.get("loss"),
        "tokens_per_second": train.get("tokens_per_second"),
        "updated_at": None
        if changed_s is None
        else datetime.fromtimestamp(changed_s, UTC).isoformat(timespec="seconds"),
        "age_s": None if changed_s is None else round(max(0.0, time.time() - changed_s), 1),
    }
    cleaned: Row = clean(summary)
    return cleaned


def read_rows(path: Path) -> list[Row]:
    """Return the objects of a JSON-lines file; lines that are cut or none of ours are left out."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return list(_read_rows(path, stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=8)
def _read_rows(path: Path, mtime_ns: int, size: int) -> tuple[Row, ...]:  # noqa: ARG001
    rows = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return tuple(rows)


def step_of(row: Row) -> float:
    """A row's step; rows that are of no step count as the latest."""
    step = row.get("step", row.get("at_step"))
    return step if isinstance(step, int | float) and not isinstance(step, bool) else math.inf


def thin_out(rows: list[Row], most: int) -> list[Row]:
    """Keep `most` rows: the last, then what is rare, then training steps evenly, the first among them."""
    if len(rows) <= most:
        return rows
    rare = (
        [place for place, row in enumerate(rows[:-1]) if row.get("kind") != "train"][-(most - 1) :] if most > 1 else []
    )
    common = [place for place, row in enumerate(rows[:-1]) if row.get("kind") == "train"]
    room = most - 1 - len(rare)
    evenly = [common[i * len(common) // room] for i in range(room)] if room > 0 and common else []
    return [rows[place] for place in sorted({*rare, *evenly, len(rows) - 1})]


def clean(value: Any) -> Any:
    """Replace numbers that JSON has no word for by null: a loss can diverge."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: clean(member) for name, member in value.items()}
    return [clean(member) for member in value] if isinstance(value, list) else value
