"""The FastAPI app: routes, error shape, middleware, and what lives as long as the process. Imports no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from service.api import generate, jobs, openai, runs, status, tgi, tokens
from service.api.boundary import Boundary
from service.api.documentation import install_documentation
from service.api.errors import install_error_handlers
from service.api.state import ApiState
from service.settings import Settings
from service.tracing import Tracer

DESCRIPTION = """\
Language models trained here, served through a bounded queue. Begin with `POST /generate`, or point any OpenAI client
at `/v1`. Every error has one shape: `{"error": {"message", "type", "param", "code"}}`."""

# For pages of `cors_origins`, which browsers hold to these. Keys travel in a header, so cookies are never asked for.
ALLOWED_HEADERS = ("authorization", "content-type", "idempotency-key", "last-event-id", "prefer", "x-request-id")
EXPOSED_HEADERS = ("location", "retry-after", "retry-after-ms", "x-job-id", "x-request-id")


def create_app(settings: Settings, *, tracer: Tracer | None = None) -> FastAPI:
    """Return the app; connections open when it starts and close when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.api = state = ApiState(settings, tracer=tracer)
        await state.open()
        try:
            yield
        finally:
            await state.close()

    app = FastAPIOffline(  # FastAPI's own /docs is blank without the internet: it loads Swagger UI from a CDN
        title="SmolLM2 curriculum service",
        version=version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        static_url="/docs/assets",
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=ALLOWED_HEADERS,
            expose_headers=EXPOSED_HEADERS,
            max_age=600,
        )
    app.add_middleware(Boundary, max_body_bytes=settings.max_body_bytes)
    install_error_handlers(app)
    install_documentation(app)
    for room in (generate, jobs, openai, tgi, tokens, runs, status):
        app.include_router(room.router)
    return app


def version() -> str:
    try:
        return importlib.metadata.version("smollm2-curriculum")
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was not installed
        return "0"
