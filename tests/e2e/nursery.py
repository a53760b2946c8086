"""A process that has imported the service once and forks a worker or an API process whenever it is asked.

    python -m tests.e2e.nursery          a JSON line in: {"command", "environment", "log"}; a line out: the process id

A proof that kills hundreds of processes would otherwise spend nearly all of its time importing torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.processes import ROOT


def serve() -> None:
    import service.api.server
    import service.worker_process  # noqa: F401
    from service.__main__ import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child:
            print(child, flush=True)  # noqa: T201
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(asked["environment"])
        os._exit(main([asked["command"]]))


class Nursery:
    """The parent's end of it."""

    def __init__(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SMOLLM_", "API_"))}
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.nursery"],
            cwd=ROOT,
            env={**inherited, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, command: str, *, log: Path, **environment: Any) -> Foundling:
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"command": command, "log": str(log), "environment": {k: str(v) for k, v in environment.items()}}
        with self._lock:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return Foundling(int(self._process.stdout.readline()), log)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class Foundling:
    """A process that the nursery made, with the names of `tests.processes.Process`."""

    def __init__(self, pid: int, log_path: Path) -> None:
        self.pid = pid
        self.log_path = log_path

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def pause(self) -> None:
        self.send(signal.SIGSTOP)

    def go_on(self) -> None:
        self.send(signal.SIGCONT)

    def wait(self, timeout_s: float = 15.0) -> int:
        """Wait until it is gone; its exit code is known to nobody."""
        give_up_at = time.monotonic() + timeout_s
        while Path(f"/proc/{self.pid}").exists():
            assert time.monotonic() < give_up_at, f"{self.pid} lives"
            time.sleep(0.005)
        return 0


if __name__ == "__main__":
    serve()
