"""`python dev.py up` and `down` as a user runs them: real processes, real ports, a real Redis."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.frontend.stack import answers
from tests.processes import PATIENCE_S, ROOT, free_port, wait_until
from tests.tiny import write_tiny_export


class Up:
    """One `dev.py up` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        write_tiny_export(folder / "models")
        self.folder = folder
        self.api_port, self.page_port = free_port(), free_port()
        self.process: subprocess.Popen[str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SMOLLM_", "UI_", "API_"))}
        ours = {"API_PORT": str(self.api_port), "UI_PORT": str(self.page_port), "SMOLLM_DTYPE": "float32"}
        return {**inherited, **ours, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def command(self, name: str) -> list[str]:
        return [sys.executable, str(ROOT / "dev.py"), name]

    def start(self) -> None:
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                self.command("up"), cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True
            )
        wait_until(lambda: "stop   Ctrl-C here" in self.log, f"the stack to be ready; its log: {self.folder / 'log'}")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    def generate(self) -> str:
        body = {"prompt": "Speak", "max_new_tokens": 4, "temperature": 0}
        answer = httpx2.post(f"{self.url}/generate", json=body, trust_env=False, timeout=PATIENCE_S)
        return str(answer.raise_for_status().json()["text"])

    def family(self) -> list[psutil.Process]:
        """The process and all it started."""
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run another command beside it."""
        return subprocess.run(
            self.command(name),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)


@pytest.fixture
def stacks(tmp_path: Path) -> Iterator[list[Up]]:
    both = [Up(tmp_path / "one"), Up(tmp_path / "two")]
    yield both
    for stack in both:
        stack.end()


def test_two_stacks_answer_side_by_side_and_stop_without_a_trace(stacks: list[Up]) -> None:
    for stack in stacks:
        stack.start()
    assert stacks[0].generate() == stacks[1].generate()
    assert all(answers(f"http://127.0.0.1:{stack.page_port}/health") for stack in stacks)
    first, second = stacks
    family = first.family()
    assert first.process is not None and second.process is not None
    first.process.send_signal(signal.SIGINT)  # what Ctrl-C sends
    assert first.process.wait(PATIENCE_S) == 0
    _ended, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive
    assert second.generate()
    down = second.run("down")
    assert down.returncode == 0
    assert re.fullmatch(r"stopping: answers .* have up to 5 s\nstopped\n", down.stdout)
    assert second.process.wait(PATIENCE_S) == 0


def test_what_dies_is_started_again(stacks: list[Up]) -> None:
    stack = stacks[0]
    stack.start()
    worker = next(process for process in stack.family() if process.cmdline()[-2:] == ["service", "worker"])
    worker.kill()
    wait_until(lambda: "worker ended with exit code -9; starting it again" in stack.log, "the loss to be noticed")
    assert stack.generate()


@pytest.mark.parametrize("name", ["API_PORT", "UI_PORT"])
def test_a_taken_port_is_named_with_the_setting_that_moves_it(stacks: list[Up], name: str) -> None:
    stack = stacks[0]
    port = stack.api_port if name == "API_PORT" else stack.page_port
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        result = stack.run("up")
    assert result.returncode == 2
    assert f"port {port} on 127.0.0.1 cannot be used" in result.stderr and f"set {name}" in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_to_stop_is_said(stacks: list[Up]) -> None:
    result = stacks[0].run("down")
    assert (result.returncode, result.stdout) == (0, f"no stack runs on API_PORT {stacks[0].api_port}\n")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_whoever_stops_a_demo_lets_its_training_save_first(tmp_path: Path, stop: signal.Signals) -> None:
    (tmp_path / "slow_to_stop.py").write_text(
        "import pathlib, signal, threading, time\n"
        "stop = threading.Event()\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda *_: stop.set())\n"
        "pathlib.Path('begun').touch()\n"
        "while not stop.wait(0.01): pass\n"
        "time.sleep(1.0)  # longer than subprocess.run waits\n"
        "pathlib.Path('saved').touch()\n"
    )
    (tmp_path / "demo.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import dev\n"
        "dev.run_python('slow_to_stop')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    demo = subprocess.Popen(
        [sys.executable, "demo.py"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until((tmp_path / "begun").exists, "the program to begin")
    if stop == signal.SIGINT:
        os.killpg(demo.pid, stop)  # as a terminal does: everybody hears a Ctrl-C
    else:
        demo.send_signal(stop)
    assert demo.wait(PATIENCE_S) in (-signal.SIGINT, 128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert (tmp_path / "saved").exists()
