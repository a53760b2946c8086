"""The page: a header that tells how the service is, and the tabs below it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from frontend.answer import Stops
from frontend.chat import build_chat
from frontend.client import ApiClient, ApiError, Json
from frontend.compare import build_compare
from frontend.generate import build_generate
from frontend.markup import count, notice, plural
from frontend.settings import Settings
from frontend.status import build_status
from frontend.training import build_training

TITLE = "SmolLM2"
EVERY_S = 3.0


def create_app(settings: Settings) -> FastAPI:
    """The page as an ASGI application, with `/health` for whoever runs it."""
    key = settings.api_key.get_secret_value() if settings.api_key else None
    client = ApiClient(settings.api_url, api_key=key)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        yield
        await client.close()

    app = FastAPI(title=TITLE, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    page: FastAPI = gr.mount_gradio_app(
        app,
        build_page(client),
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        root_path=settings.root_path or None,
        footer_links=[],
        show_error=False,  # what is for people is shown where it belongs; a bug's own words belong in the log
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme(),
        css_paths=Path(__file__).with_name("page.css"),
    )
    return page


def theme() -> gr.themes.Base:
    """White cards on a pale ground, and the system's own fonts: nothing is fetched."""
    plain = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        secondary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    dressed: gr.themes.Base = plain.set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        slider_color_dark="*primary_500",
        block_background_fill="white",
        input_background_fill="white",
        input_border_width="1px",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_600",
        input_background_fill_dark="*neutral_900",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_large_text_size="*text_md",
        button_large_padding="8px 16px",
        button_large_text_weight="500",
        button_cancel_background_fill="#dc2626",
        button_cancel_background_fill_hover="#b91c1c",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_text_color="white",
    )
    return dressed


def build_page(client: ApiClient) -> gr.Blocks:
    """All tabs; events wait for the API's queue and never for Gradio's own."""
    stops = Stops()
    page: gr.Blocks
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title", padding=False)
            health = gr.HTML(notice("Asking the API …", "busy"), elem_id="api-status", padding=False)
        with gr.Tabs(overflow_behavior="wrap"):  # all of them in sight, on a phone too
            with gr.Tab("Generate") as generate_tab:
                models = [build_generate(client, stops)]
            with gr.Tab("Chat") as chat_tab:
                chat_model = build_chat(client)
            with gr.Tab("Compare") as compare_tab:
                models += build_compare(client, stops)
            with gr.Tab("Training") as training_tab:
                training_timer = build_training(client, training_tab)
            with gr.Tab("Service") as status_tab:
                status_timer = build_status(client, status_tab)

        shown = gr.State("")
        clock = gr.Timer(EVERY_S)
        choices = [*models, chat_model]

        async def refresh(shown: str, *chosen: str | None) -> tuple[Any, ...]:
            try:
                known, state = await client.models(), await client.health()
            except ApiError as error:
                return notice(str(error), "bad"), "", *[gr.skip()] * len(chosen)
            seen = json.dumps(known)
            if seen == shown:  # an open list of choices stays open
                return describe(state), *[gr.skip()] * (1 + len(chosen))
            *for_text, for_right, for_chat = chosen
            return (
                describe(state),
                seen,
                *[choose(default_first(known), name) for name in for_text],
                choose(default_second(known), for_right),
                choose(chatty(known), for_chat),
            )

        gr.on([page.load, clock.tick], refresh, [shown, *choices], [health, shown, *choices], show_progress="hidden")
        watched = {training_tab: training_timer, status_tab: status_timer}
        for tab in (generate_tab, chat_tab, compare_tab, training_tab, status_tab):
            actives = [gr.Timer(active=tab is one) for one in watched]
            tab.select(lambda actives=actives: actives, outputs=list(watched.values()), show_progress="hidden")
        page.queue(default_concurrency_limit=None, api_open=False)
    return page


def default_first(models: Sequence[Json]) -> list[Json]:
    return sorted(models, key=lambda model: not model["is_default"])


def default_second(models: Sequence[Json]) -> list[Json]:
    """For the other side of a comparison: the default beside itself tells nothing."""
    ordered = default_first(models)
    return ordered[1:] + ordered[:1]


def chatty(models: Sequence[Json]) -> list[Json]:
    """Models that know turns; those that were brought, and so surely taught on chats, come first."""
    knowing = [model for model in models if model["has_chat_template"]]
    return sorted(knowing, key=lambda model: bool(model["owned_by"] == "trained here"))


def choose(models: Sequence[Json], chosen: str | None) -> Any:
    """A model choice with what there is now, the first for one that is gone."""
    names = [model["id"] for model in models]
    labels = [(f"{model['id']} ({count(model['num_parameters'])})", model["id"]) for model in models]
    return gr.update(choices=labels, value=chosen if chosen in names else next(iter(names), None))


def describe(health: Json) -> str:
    """The service in one sentence."""
    if health["status"] != "ok":
        return notice(health["reason"], "bad" if health["status"] == "down" else "busy")
    models, workers = len(health["models"]), len(health["workers"])
    running, queued = (sum(model[name] for model in health["models"]) for name in ("running", "queued"))
    state = f"{running} running, {queued} waiting" if running or queued else "idle"
    return notice(f"{plural(models, 'model')}, {plural(workers, 'worker')}, {state}.", "good")
