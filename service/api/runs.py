"""/runs: what training runs wrote, for the page that shows them.

All of it is done beside the event loop: a run may have 100,000 rows, and streams of others are to go on meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from service.api.answers import RowsAnswer, RunsAnswer
from service.api.caller import identify
from service.api.documentation import errors
from service.api.errors import JsonResponse, shorten, to_json
from service.api.json_lines import Row, last_rows_of, rows_of
from service.api.state import state_of
from service.errors import NotFound

router = APIRouter(prefix="/runs", tags=["runs"], dependencies=[Depends(identify)])

MAX_ROWS = 2_000
MOST_ROWS = 100_000
MaxRows = Annotated[int, Query(ge=1, le=MOST_ROWS, description="thinned out evenly to this many")]
AfterStep = Annotated[int, Query(ge=-1, le=2**53, description="only rows of later steps")]


async def find_run(request: Request, name: str) -> Path:
    """Return the folder of a run. Only names that stand in the runs folder are known, so no name leads outside.

    Raises:
        NotFound: there is no such run.
    """
    folders = await asyncio.to_thread(list_folders, state_of(request).settings.runs_dir)
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
    runs_dir = state_of(request).settings.runs_dir
    return await asyncio.to_thread(
        lambda: JsonResponse({"runs": [summarise(path) for path in list_folders(runs_dir).values()]})
    )


@router.get(
    "/{name}/metrics", summary="Numbers of a run", responses={200: {"model": RowsAnswer}, **errors(401, 404, 422)}
)
async def read_metrics(folder: RunDep, max_rows: MaxRows = MAX_ROWS, after_step: AfterStep = -1) -> Response:
    """The rows of metrics.jsonl. Where there are more than `max_rows`, training steps are thinned out evenly; the
    last one, evaluations and changes of state stay as long as there is room."""
    return await asyncio.to_thread(answer, folder, "metrics.jsonl", after_step, lambda rows: thin_out(rows, max_rows))


@router.get(
    "/{name}/samples", summary="Texts a run wrote", responses={200: {"model": RowsAnswer}, **errors(401, 404, 422)}
)
async def read_samples(folder: RunDep, max_rows: MaxRows = MAX_ROWS, after_step: AfterStep = -1) -> Response:
    """The rows of samples.jsonl, the newest where there are more than `max_rows`."""
    return await asyncio.to_thread(answer, folder, "samples.jsonl", after_step, lambda rows: rows[-max_rows:])


def answer(folder: Path, file: str, after_step: int, choose: Callable[[list[Row]], list[Row]]) -> Response:
    """Write a run's rows out, one after the other: one call for 100,000 of them would let no other thread go on."""
    rows = [row for row in rows_of(folder / file).look() if step_of(row) > after_step]
    head = to_json({"name": folder.name, "num_rows": len(rows)}).removesuffix("}")
    body = ",".join(to_json(clean(row)) for row in choose(rows))
    return Response(f'{head},"rows":[{body}]}}', media_type="application/json")


def summarise(folder: Path) -> Row:
    """Where a run stands, by the last rows of their kinds."""
    last = last_rows_of(folder / "metrics.jsonl").look()
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
