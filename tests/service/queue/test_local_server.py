"""Starting a Redis: which one, where, and that it never outlives its use."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.queue.connection import blocking_redis
from service.queue.local_server import find_server, start_redis
from shared.errors import ConfigError
from tests.service.queue.conftest import wait_until


def test_given_url_is_used_as_it_is_and_its_password_is_not_shown() -> None:
    server = start_redis(url="redis://user:secret@example.invalid:6379/3")
    assert server.url == "redis://user:secret@example.invalid:6379/3"
    assert "secret" not in server.description
    server.stop()


def test_binary_comes_with_its_reason() -> None:
    binary, reason = find_server()
    assert binary.is_file()
    assert "PATH" in reason


def test_started_server_is_local_keeps_everything_and_stops(tmp_path: Path) -> None:
    with start_redis() as server, blocking_redis(server.url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
        home = Path(str(client.config_get("dir")["dir"]))
        process = server.process
        assert process is not None
    assert process.poll() is not None
    assert not home.exists()
    server.stop()


def test_directory_keeps_jobs_over_a_restart(tmp_path: Path) -> None:
    with start_redis(directory=tmp_path) as server, blocking_redis(server.url) as client:
        client.set("job", "kept", ex=60)
    port = int(server.url.rsplit(":", 1)[1].split("/")[0])
    with start_redis(directory=tmp_path, port=port) as again, blocking_redis(again.url) as client:
        assert again.url == server.url
        assert client.get("job") == "kept"


def test_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} is taken"):
            start_redis(port=port)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_server_ends_when_its_starter_is_killed() -> None:
    program = (
        "from service.queue.local_server import start_redis; import sys, time;"
        "print(start_redis().process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        server = int(starter.stdout.readline())
        os.kill(starter.pid, signal.SIGKILL)
    wait_until(lambda: not _is_alive(server))


def _is_alive(process_id: int) -> bool:
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"
