"""Is it alive, can it serve, how is it doing: for orchestrators, for people, for Prometheus. No key is asked for."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response

from service.api.answers import HealthAnswer, LiveAnswer, ReadyAnswer
from service.api.documentation import errors
from service.api.errors import JsonResponse, body_of
from service.api.state import ApiState, state_of
from service.errors import NotReady, RequestError
from service.queue.job import ModelStatistics

router = APIRouter(tags=["status"])

NO_WORKER_RETRY_S = 2.0


@router.get("/live", summary="The process answers", responses={200: {"model": LiveAnswer}})
async def live() -> Response:
    return JsonResponse({"status": "live"})


@router.get("/ready", summary="A request would be served", responses={200: {"model": ReadyAnswer}, **errors(503)})
async def ready(request: Request) -> Response:
    """200 when Redis answers and a live worker serves the default model; 503 with the reason otherwise."""
    state = state_of(request)
    state.redis.require()
    model = await state.models.get(None)
    statistics = await state.queue.statistics(model.name)
    if not statistics[model.name].workers:
        raise NotReady(
            f"No worker serves the model {model.name!r} yet; start one with `python -m service worker`.",
            code="no_worker",
            retry_after_s=NO_WORKER_RETRY_S,
        )
    return JsonResponse({"status": "ready", "model": model.name, "workers": statistics[model.name].workers})


@router.get("/health", summary="How it is doing, for people", responses={200: {"model": HealthAnswer}})
async def health(request: Request) -> Response:
    """Always 200 while the process lives: `status` is ok, degraded (with the reason) or down (Redis is away)."""
    state = state_of(request)
    answer: dict[str, Any] = {
        "status": "ok",
        "default_model": state.models.default,
        "uptime_s": round(time.time() - state.started_at, 1),
        "versions": versions(),
        "limits": asdict(state.limits) | {"max_body_bytes": state.settings.max_body_bytes},
    }
    statistics: dict[str, ModelStatistics] = {}
    answer["workers"] = []
    try:
        state.redis.require()
        statistics = await state.queue.statistics()
        answer["workers"] = [asdict(worker) for worker in await state.queue.workers()]
        default = statistics.get(state.models.default or "", ModelStatistics())
        if state.models.default is None:
            answer |= {"status": "degraded", "reason": f"There is no model in {state.settings.models_dir} yet."}
        elif not default.workers and not serves(answer["workers"], state.models.default):
            answer |= {"status": "degraded", "reason": f"No worker serves the model {state.models.default}."}
    except RequestError as error:
        answer |= {"status": "down", "reason": body_of(error)["error"]["message"]}
    answer["models"] = [
        {
            "name": model.name,
            "revision": model.folder.revision,
            "is_default": model.name == state.models.default,
            **asdict(statistics.get(model.name, ModelStatistics(workers=serves(answer["workers"], model.name)))),
        }
        for model in state.models.all
    ]
    return JsonResponse(answer)


def serves(workers: list[dict[str, Any]], model: str) -> int:
    """How many workers say that they serve a model; the queue counts only for models that had a job lately."""
    return sum(model in worker["models"] and not worker["draining"] for worker in workers)


@router.get("/metrics", summary="Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    state = state_of(request)
    await count_queues(state)
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def count_queues(state: ApiState) -> None:
    """Set the gauges of Redis' side; while it is away they are left out rather than old."""
    try:
        state.redis.require()
        state.metrics.describe_queues(await state.queue.statistics(), await state.queue.workers())
    except NotReady:
        state.metrics.describe_queues({}, [])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("smollm2-curriculum", "fastapi", "uvicorn", "redis", "tokenizers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a folder that was not installed
            continue
    return found
