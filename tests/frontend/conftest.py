"""One whole stack and one Chromium for the tests of the page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from service.queue.local_server import start_redis
from shared.checkpoint import write_export
from shared.config import ModelConfig
from shared.model import SmolLM2
from tests.frontend.stack import Stack
from tests.tiny import tiny_tokenizer, write_tiny_export
from tests.trainer.small_run import command

# Many thin layers: milliseconds a token on any machine, so that there is time to press Stop.
SLOW = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=200,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=4096,
)

PATIENCE_MS = 30_000
"""On two cores that also train and compile, a token of the slow model takes 0.2 s."""

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

LOCAL = re.compile(r"(https?://127\.0\.0\.1:\d+/|data:|blob:)")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two models to ask, and a run that trains while the first tests go on."""
    root = tmp_path_factory.mktemp("stack")
    write_tiny_export(root / "models", "tiny")
    write_slow_export(root / "models" / "slow")
    with start_redis() as redis:
        stack = Stack(root, redis)
        trainer = command(root, "train", "smoke", "--run", "smoke")
        try:
            stack.wait_until_ready()
            yield stack
            assert trainer.wait(60) == 0
        finally:
            trainer.kill()
            trainer.communicate()
            codes = stack.stop()
    assert set(codes) == {0}, f"exit codes {codes}; logs in {root}"


def write_slow_export(folder: Path) -> None:
    """A model that never ends by itself, so that only length or Stop do."""
    slow = SmolLM2(SLOW)
    slow.initialize(0)
    write_export(folder, slow.eval(), tiny_tokenizer(), trained_length=None, details={})
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": []}))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium of this machine.

    Playwright keeps an event loop in the main thread for as long as it lives, so no asynchronous test can run beside
    it: it lives no longer than one module.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "the browser tests need chromium on PATH; without it: pytest -m 'not browser'"
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, stack: Stack, request: pytest.FixtureRequest) -> Iterator[Page]:
    """An open page; afterwards nothing was asked of any other machine and the console is clean.

    Indirect parameters: the width of the window and the address to open.
    """
    width, url = getattr(request, "param", (1280, stack.page_url))
    context = browser.new_context(viewport={"width": width, "height": 900}, locale="en-GB")
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.extend(complaint_of(message)))
    page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
    page.on("request", lambda asked: complaints.extend(stranger(asked)))
    page.goto(url or stack.page_url, wait_until="domcontentloaded")
    yield page
    context.close()
    assert not complaints


def complaint_of(message: ConsoleMessage) -> list[str]:
    return [f"console: {message.text}"] if message.type == "error" else []


def stranger(request: Request) -> list[str]:
    return [] if LOCAL.match(request.url) else [f"request to {request.url}"]
