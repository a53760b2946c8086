"""docs/api.md is true: its commands run, and nothing the API has is missing from it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx2
import pytest

from service.api.documentation import ANSWERS, BODIES
from service.api.schemas import GenerateRequest
from service.metrics import ApiMetrics, WorkerMetrics
from tests.service.api.stack import Api, client_of

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs/api.md").read_text()
COMMANDS = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block[:50])
def test_commands_run(whole_api: Api, block: str) -> None:
    address = whole_api.url.removeprefix("http://")
    script = block.replace("localhost:8000", address).replace("curl -s", "curl -sf").replace("/NAME/", "/first/")
    shell = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10


def test_every_route_and_field_stands_in_it(whole_api: Api) -> None:
    with client_of(whole_api) as client:
        paths = client.get("/openapi.json").json()["paths"]
    for path in paths:
        name = path.replace("{job_id}", "ID").replace("{name}", "NAME").replace("{model}", "NAME")
        assert f"{name}`" in DOCUMENT or f"{name}](" in DOCUMENT, path
    assert not {field for field in GenerateRequest.model_fields if f"`{field}`" not in DOCUMENT}


def test_every_code_stands_in_it() -> None:
    sources = [*(ROOT / "service/api").glob("*.py"), *(ROOT / "service/queue").glob("*.py"), ROOT / "service/errors.py"]
    codes = {code for path in sources for code in re.findall(r'code ?= ?"([a-z_]+)"', path.read_text())}
    assert "queue_full" in codes
    assert not {code for code in codes if f"`{code}`" not in DOCUMENT}


def test_the_answer_shown_is_the_answer_given(whole_api: Api) -> None:
    shown = re.search(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    assert shown is not None
    with client_of(whole_api) as client:
        answer: httpx2.Response = client.post("/generate", json={"prompt": "All:", "max_new_tokens": 2})
    assert set(re.findall(r'"([a-z_]+)":', shown[1])) == set(answer.json()) | set(answer.json()["usage"]) | set(
        answer.json()["timings"]
    ) | {"max_new_tokens"}


def test_the_dashboard_and_the_guide_name_metrics_that_there_are() -> None:
    known = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metrics in (ApiMetrics(), WorkerMetrics())
        for metric in metrics.registry.collect()
    }
    guide = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"^\| `((?:api|queue|worker)_\w+)` \|", guide, re.MULTILINE)) == known
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert {name.removesuffix("_bucket") for name in re.findall(r"\b(?:api|queue|worker)_\w+", queries)} <= known


def test_every_body_and_answer_has_an_example_that_is_one(whole_api: Api) -> None:
    description = whole_api.app.openapi()
    schemas = description["components"]["schemas"]
    seen = set()
    for methods in description["paths"].values():
        for operation in methods.values():
            contents = [operation.get("requestBody", {}), *operation["responses"].values()]
            for schema in (one.get("content", {}).get("application/json", {}).get("schema") for one in contents):
                reference = (schema or {}).get("$ref") or (schema or {}).get("items", {}).get("$ref")
                if reference is not None:
                    seen.add(reference.rpartition("/")[2])
    assert {name for name in seen if not schemas[name].get("examples")} == set()
    assert len(seen) > 15
    for model in (*ANSWERS, *BODIES):
        for one in schemas[model.__name__]["examples"]:
            model.model_validate(one)
