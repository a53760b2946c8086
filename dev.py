"""The whole stack on one machine, without Docker: `python dev.py demo | up | down`.

`up` starts Redis (the URL given, a server on PATH, else an embedded one), api, worker and page, shows what each says
with its name in front, starts again what dies, and stops all of it on Ctrl-C or SIGTERM. `make` calls this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from frontend.settings import Settings as PageSettings
from service.queue.local_server import start_redis
from service.settings import Settings, explain, get_settings
from shared.catalog import list_model_folders
from shared.errors import ConfigError, SmolLMError

STATE = Path(".smollm")
STOP_MARGIN_S = 5.0
"""How much longer than the grace of their answers processes have to end."""
READY_TIMEOUT_S = 120.0
RESTART_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 5.0)
"""A process that dies is started again after these waits; one that lives a minute starts over at the first."""

PUBLIC_MODEL = "smollm2-135m-instruct"
COLOURS = {"redis": 35, "api": 36, "worker": 32, "page": 34}


def say(text: str) -> None:
    print(text, flush=True)


@dataclass
class Part:
    """One process of the stack."""

    name: str
    command: list[str]
    process: subprocess.Popen[str]
    started_at: float
    num_deaths: int = 0


class Stack:
    """The processes of `up`: started, watched, stopped together."""

    def __init__(self, environment: dict[str, str], *, stop_grace_s: float) -> None:
        """What has not ended `stop_grace_s` after it was told to is killed."""
        self._environment = environment
        self._stop_grace_s = stop_grace_s
        self._parts: list[Part] = []
        self._stopping = threading.Event()

    def start(self, name: str, command: list[str]) -> None:
        self._parts.append(Part(name, command, self._spawn(name, command), time.monotonic()))

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the others in order
        )
        threading.Thread(target=self._show, args=(name, process), daemon=True).start()
        return process

    def _show(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        head = f"{name:>8} | "
        if sys.stdout.isatty():
            head = f"\033[{COLOURS.get(name.partition('-')[0], 37)}m{head}\033[0m"
        for line in process.stdout:
            say(head + line.rstrip("\n"))

    def watch(self) -> int:
        """Start again whatever dies, until told to stop; return the exit code."""
        while not self._stopping.wait(0.2):
            for part in self._parts:
                code = part.process.poll()
                if code is None:
                    continue
                part.num_deaths = 0 if time.monotonic() - part.started_at > 60 else part.num_deaths
                if code == ConfigError.exit_code or part.num_deaths >= len(RESTART_DELAYS_S):
                    say(f"{part.name} ended with exit code {code} and is not started again; stopping the rest")
                    return code or 1
                delay = RESTART_DELAYS_S[part.num_deaths]
                say(f"{part.name} ended with exit code {code}; starting it again in {delay:g} s")
                if self._stopping.wait(delay):
                    break
                part.num_deaths += 1
                part.process, part.started_at = self._spawn(part.name, part.command), time.monotonic()
        return 0

    def ask_to_stop(self) -> None:
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def dead(self) -> str | None:
        """The name of a part that refused to start, if any."""
        return next((p.name for p in self._parts if p.process.poll() == ConfigError.exit_code), None)

    def stop(self) -> None:
        """End every process: page first, so that nothing new comes in, the worker with its grace, Redis' users last."""
        for part in reversed(self._parts):
            if part.process.poll() is None:
                part.process.terminate()
        deadline = time.monotonic() + self._stop_grace_s
        for part in reversed(self._parts):
            try:
                part.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f"{part.name} did not stop within {self._stop_grace_s:g} s and is killed")
                part.process.kill()
                part.process.wait()


def check_ports(settings: Settings, page: PageSettings) -> None:
    """Refuse to start where somebody else listens.

    Raises:
        ConfigError: naming the port and the setting that moves it.
    """
    for host, port, name in ((settings.api_host, settings.api_port, "API_PORT"), (page.host, page.port, "UI_PORT")):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ConfigError(
                    f"port {port} on {host} cannot be used ({error.strerror}): "
                    f"stop what runs there (`make down`), or set {name}, for example {name}={port + 10} make up"
                ) from error


def ensure_model(settings: Settings) -> None:
    """Bring the public weights where there is nothing to serve."""
    if not list_model_folders(settings.models_dir):
        say(f"no model in {settings.models_dir}/ yet: bringing {PUBLIC_MODEL}")
        bring_public_model(settings)


def bring_public_model(settings: Settings) -> None:
    """In a process of its own: converting the weights takes 700 MB, which this one would keep."""
    run_python("shared.pretrained", PUBLIC_MODEL, "--models-dir", str(settings.models_dir))


def up(settings: Settings, page: PageSettings, *, demo: bool = False) -> int:
    """Run the stack until it is told to stop."""
    check_ports(settings, page)
    ensure_model(settings)
    state = STATE / f"stack-{settings.api_port}"
    state.mkdir(parents=True, exist_ok=True)
    given = settings.redis_url.get_secret_value() if "redis_url" in settings.model_fields_set else None
    with start_redis(directory=state / "redis", url=given) as redis, pid_file(state / "pid"):
        say(f"{'redis':>8} | {redis.description}")
        api_url = f"http://127.0.0.1:{settings.api_port}"
        people = {"SMOLLM_API_URL": api_url, "SMOLLM_LOG_FORMAT": "text"}
        environment = {**people, **os.environ, "SMOLLM_REDIS_URL": redis.url, "PYTHONUNBUFFERED": "1"}
        stack = Stack(environment, stop_grace_s=settings.shutdown_grace_s + STOP_MARGIN_S)

        def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            say("stopping")
            stack.ask_to_stop()

        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        started = time.monotonic()
        stack.start("api", ["service", "api"])
        for number in range(settings.num_workers):
            stack.start("worker" if settings.num_workers == 1 else f"worker-{number + 1}", ["service", "worker"])
        stack.start("page", ["frontend"])
        threading.Thread(target=announce, args=(stack, settings, page, started, demo), daemon=True).start()
        try:
            return stack.watch()
        finally:
            stack.stop()
            say("stopped")


def announce(stack: Stack, settings: Settings, page: PageSettings, started: float, demo: bool) -> None:
    """Wait until the stack answers, then say where."""
    api, ui = f"http://127.0.0.1:{settings.api_port}", f"http://127.0.0.1:{page.port}"
    try:
        wait_until_ready(stack, f"{api}/ready", f"{ui}/health")
    except TimeoutError as error:
        say(f"{error}; the lines above say why")
        return
    if stack.stopping or stack.dead:
        return
    say(f"\nready after {time.monotonic() - started:.0f} s")
    if demo:
        with contextlib.suppress(OSError):
            show_answers(api, settings)
    say(f"""
  page   {ui}
  API    {api}/docs
  try    curl -s {api}/generate -H 'Content-Type: application/json' -d '{{"prompt": "First Citizen:"}}'
  stop   Ctrl-C here, or `make down`
""")


def wait_until_ready(stack: Stack, *addresses: str) -> None:
    """Return when every address answers 200, or the stack stops."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    for address in addresses:
        while not stack.stopping and not stack.dead:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2) as response:
                if response.status == 200:
                    break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{address} did not answer within {READY_TIMEOUT_S:g} s")
            time.sleep(0.1)


def show_answers(api: str, settings: Settings) -> None:
    """Ask every model something, as a user would."""
    wait_until_served(api)
    for name in list_model_folders(settings.models_dir):
        if name.endswith("instruct"):
            question = "What is the capital of Japan?"
            body: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": 40}
            answer = post(f"{api}/v1/chat/completions", {**body, "messages": [{"role": "user", "content": question}]})
            text = answer["choices"][0]["message"]["content"]
        else:
            question = "First Citizen:"
            answer = post(f"{api}/generate", {"model": name, "prompt": question, "max_new_tokens": 80, "seed": 1})
            text = answer["text"]
        say(f"\n{name} <- {question}\n" + "\n".join(f"    {line}" for line in text.strip().splitlines()))


def wait_until_served(api: str) -> None:
    """Return when a worker takes jobs of every model: `/ready` speaks of the default one only."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{api}/health", timeout=5) as response:
            if all(model["workers"] for model in json.load(response)["models"]):
                return
        time.sleep(0.2)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def demo(settings: Settings, page: PageSettings) -> int:
    """Data, training, export, public weights, then the stack."""
    check_ports(settings, page)
    recipe = run_python("trainer", "recipe", capture=True).strip()
    begun = time.monotonic()
    say(f"\n1/4  data: text for recipe {recipe!r}, as tokens")
    run_python("trainer", "prepare", recipe)
    say(f"\n2/4  training: recipe {recipe!r}, five stages, with checkpoints, samples, plots and export")
    run_python("trainer", "train", recipe)
    say(f"\n3/4  public weights: {PUBLIC_MODEL}, for a second model that answers questions")
    bring_public_model(settings)
    say(f"\n4/4  the stack (so far {time.monotonic() - begun:.0f} s)")
    return up(settings, page, demo=True)


def run_python(module: str, *arguments: str, capture: bool = False) -> str:
    """Run `python -m module ...`; its errors are already sentences, so its exit code is all that is passed on.

    Whoever stops this process waits until that one has ended in its own way: a training saves first. (The library's
    `subprocess.run` kills it a quarter of a second after a Ctrl-C.)
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # noqa: ARG005
    try:
        output, _ = process.communicate()
    except KeyboardInterrupt:  # it has heard the same Ctrl-C; a second one ends both at once
        process.wait()
        raise
    except SystemExit:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if process.returncode:
        sys.exit(process.returncode)
    return output or ""


def down(settings: Settings) -> int:
    """Stop the stack on this API port that runs in the background."""
    path = STATE / f"stack-{settings.api_port}" / "pid"
    try:
        pid = int(path.read_text())
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        say(f"no stack runs on API_PORT {settings.api_port}")
        return 0
    say(f"stopping: answers that are being written have up to {settings.shutdown_grace_s:g} s")
    deadline = time.monotonic() + settings.shutdown_grace_s + 2 * STOP_MARGIN_S
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    say("stopped" if not path.exists() else f"process {pid} did not stop yet")
    return int(path.exists())


@contextlib.contextmanager
def pid_file(path: Path) -> Iterator[None]:
    path.write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


COMMANDS = {
    "demo": "data, training, export, then the stack",
    "up": "Redis, api, worker and page in the foreground",
    "down": "stop a stack that runs in the background",
}


def get_page_settings() -> PageSettings:
    """Return the page's settings, which its own process reads again.

    Raises:
        ConfigError: as `get_settings`.
    """
    try:
        return PageSettings()
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = "; ".join(f"{name}: {meaning}" for name, meaning in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=commands)
    command = parser.parse_args(arguments).command
    try:
        settings, page = get_settings(), get_page_settings()
        if command == "down":
            return down(settings)
        return demo(settings, page) if command == "demo" else up(settings, page)
    except SmolLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
