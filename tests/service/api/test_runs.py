"""Training runs over HTTP: read from files that a trainer may be writing, or a crash may have cut."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import pytest

from service.api import json_lines
from service.api import runs as routes
from service.api.errors import to_json
from service.queue.local_server import LocalRedis
from tests.service.api.stack import Api, client_of, make_settings, running_api
from tests.service.api.test_bad_input import assert_error

STAGES = [{"name": "warm", "start_step": 0, "end_step": 5_000}]


def train_row(step: int) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "stage": "warm",
        "loss": 5.0 - step / 2_000,
        "learning_rate": 1e-3,
        "tokens_per_second": 1234.5,
        "mfu": None,
        "grad_norm": 0.5,
        "source_loss": {"input": 4.0},
        "tokens": step * 512,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("trainer")
    runs = tmp_path / "runs"
    folder = runs / "long run.1"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"kind": "run", "state": "running", "at_step": 0, "num_steps": 5_000, "stages": STAGES},
        *(train_row(step) for step in range(1, 5_001)),
    ]
    rows.insert(
        600, {"kind": "evaluation", "step": 599, "held_out": {"input": {"loss": float("nan")}}, "train_gap": {}}
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "step": 5001, "lo')
    samples = [
        {"step": step, "source": "input", "prompt": "All:", "text": "🙂\u2028", "seed": 1} for step in (500, 1_000)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (runs / "empty").mkdir()
    (runs / "strange").mkdir()
    (runs / "strange" / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n"text"\n{"step": 1e999, "kind": "train"}\n\n' + b"\x00" * 50
    )
    (runs / ".hidden").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.jsonl").write_text('{"kind": "secret"}\n')
    return runs


@pytest.fixture(scope="module")
def client(redis_server: LocalRedis, models_dir: Path, runs: Path) -> Iterator[httpx2.Client]:
    with running_api(make_settings(redis_server.url, models_dir, runs)) as api, client_of(api) as client:
        yield client


def test_runs_are_listed_with_where_they_stand(client: httpx2.Client) -> None:
    listed = {run["name"]: run for run in client.get("/runs").json()["runs"]}
    assert set(listed) == {"long run.1", "empty", "strange"}
    run = listed["long run.1"]
    assert run["state"] == "running" and run["step"] == 5_000 and run["num_steps"] == 5_000
    assert listed["empty"]["state"] is None and listed["empty"]["step"] is None


def test_metrics_are_thinned_out_but_keep_what_matters(client: httpx2.Client) -> None:
    answer = client.get("/runs/long run.1/metrics").json()
    rows = answer["rows"]
    assert len(rows) <= 2_000
    assert [row["kind"] for row in rows].count("run") == 1 and [row["kind"] for row in rows].count("evaluation") == 1
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 5_000 and len(steps) > 1_000
    assert next(row for row in rows if row["kind"] == "evaluation")["held_out"] == {"input": {"loss": None}}
    assert next(row for row in rows if row["kind"] == "train") == train_row(1)


@pytest.mark.parametrize("max_rows", [10, 100, 6_000])
def test_the_number_of_rows_can_be_chosen(client: httpx2.Client, max_rows: int) -> None:
    rows = client.get("/runs/long run.1/metrics", params={"max_rows": max_rows}).json()["rows"]
    assert len(rows) == min(max_rows, 5_002)
    assert rows[-1]["step"] == 5_000


def test_a_reader_asks_only_for_what_is_new(client: httpx2.Client) -> None:
    rows = client.get("/runs/long run.1/metrics", params={"after_step": 4_990}).json()["rows"]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(4_991, 5_001))


def test_samples(client: httpx2.Client) -> None:
    rows = client.get("/runs/long run.1/samples").json()["rows"]
    assert [row["step"] for row in rows] == [500, 1_000] and rows[0]["text"] == "🙂\u2028"
    assert client.get("/runs/empty/samples").json()["rows"] == []
    assert client.get("/runs/empty/metrics").json()["rows"] == []


def test_files_of_any_content_are_no_failure(client: httpx2.Client) -> None:
    assert client.get("/runs/strange/metrics").status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e",
        "..%2fsecret",
        "%2e%2e%2fsecret",
        ".hidden",
        "long run.1%2f..%2f..%2fsecret",
        "a%00b",
        "x" * 3_000,
        "%2fetc%2fpasswd",
        "..%5csecret",
        "strange%2f..%2fstrange",
    ],
)
@pytest.mark.parametrize("what", ["metrics", "samples"])
def test_no_name_leads_outside(client: httpx2.Client, name: str, what: str) -> None:
    response = client.get(f"/runs/{name}/{what}")
    assert_error(response, 404)
    assert "kind" not in response.text


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "9" * 30, ""])
def test_a_number_of_rows_that_is_none_is_refused(client: httpx2.Client, value: str) -> None:
    response = client.get("/runs/empty/metrics", params={"max_rows": value})
    assert_error(response, 422, param="max_rows")


def test_no_folder_of_runs_is_no_runs(redis_url: str, models_dir: Path, tmp_path: Path, api: Api) -> None:
    settings = make_settings(redis_url, models_dir, tmp_path / "none")
    with running_api(settings) as other, client_of(other) as client:
        assert client.get("/runs").json()["runs"] == []


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


STARTED = {"kind": "run", "state": "running", "at_step": 0, "num_steps": 9}


@pytest.mark.anyio
async def test_rows_are_prepared_beside_the_event_loop(runs: Path) -> None:
    """Every stream of the process waits while its event loop works, and a run may have 100,000 rows."""
    places = {routes.__file__, json_lines.__file__, to_json.__code__.co_filename}
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename in places:
            calls[frame.f_code.co_name] += 1

    sys.setprofile(count)  # of this thread alone
    try:
        response = await routes.read_metrics(runs / "long run.1")
        await routes.read_samples(runs / "long run.1")
    finally:
        sys.setprofile(None)
    assert json.loads(bytes(response.body))["num_rows"] == 5_002
    assert calls["read_metrics"] and max(calls.values()) < 10, calls


def test_what_did_not_change_is_not_read_again_however_many_runs_there_are(tmp_path: Path) -> None:
    paths = [tmp_path / f"run-{number:02}" / "metrics.jsonl" for number in range(20)]
    for path in paths:
        path.parent.mkdir()
        path.write_text(lines(STARTED, train_row(3)))
    first = [routes.summarise(path.parent) for path in paths]
    assert {run["state"] for run in first} == {"running"} and {run["step"] for run in first} == {3}
    for path in paths:
        stat = path.stat()
        path.write_text("x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = [routes.summarise(path.parent) for path in paths]
    assert [{**run, "age_s": None} for run in again] == [{**run, "age_s": None} for run in first]


def test_of_a_file_that_grew_only_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(STARTED, *map(train_row, range(1, 8))) + '{"kind": "tra')
    assert routes.summarise(tmp_path)["step"] == 7
    with path.open("r+") as file:
        file.write("x" * 10)  # so that whoever read the first row again would miss it
    with path.open("a") as file:
        file.write(lines(train_row(8)).removeprefix('{"kind": "tra'))
    summary = routes.summarise(tmp_path)
    assert (summary["state"], summary["step"]) == ("running", 8)


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    """As a run that goes on from a checkpoint does: rows behind it are dropped and come again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(STARTED, *map(train_row, range(1, 8))))
    assert routes.summarise(tmp_path)["step"] == 7
    path.write_text(lines({**STARTED, "state": "resumed"}, train_row(1)))
    assert (routes.summarise(tmp_path)["state"], routes.summarise(tmp_path)["step"]) == ("resumed", 1)
    path.write_text(lines({**STARTED, "state": "again"}, *({**train_row(step), "loss": 1.0} for step in range(1, 99))))
    summary = routes.summarise(tmp_path)
    assert (summary["state"], summary["step"], summary["loss"]) == ("again", 98, 1.0)
    path.unlink()
    assert routes.summarise(tmp_path)["state"] is None


def test_a_last_row_without_a_line_end_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(train_row(1)) + json.dumps(train_row(2)))
    assert [row["step"] for row in json_lines.rows_of(path).look()] == [1, 2]
    with path.open("a") as file:
        file.write("\n" + lines(train_row(3)))
    assert [row["step"] for row in json_lines.rows_of(path).look()] == [1, 2, 3]
