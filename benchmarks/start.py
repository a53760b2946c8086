"""How long a service takes from `python -m service` to its first token: without and with compiled kernels at hand.

    python -m benchmarks.start [models/smollm2-135m-instruct] [--rounds 5]

Each line starts real processes on the real weights. "worker" finds an API that runs already, "both" starts the two at
once; "cold" has a home folder without compiled kernels, "warm" one with them. Ready is when `/ready` first says 200,
the token is the first one of a request sent then. Limit: ready within 10 s. Files are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from service.queue.local_server import start_redis
from tests.e2e.cluster import get
from tests.processes import Process, free_port, wait_until

LIMIT_S = 10.0
PROMPT = {"prompt": "First Citizen:", "max_new_tokens": 1, "temperature": 0.0}


def generate(url: str) -> None:
    """Ask for one token and wait for it."""
    request = urllib.request.Request(
        url + "/generate", json.dumps(PROMPT).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200 and response.read()


def measure(root: Path, models_dir: Path, home: Path, *, both: bool) -> tuple[float, float, str]:
    """Return seconds until ready and until the first token, and the worker's log."""
    redis, port = start_redis(directory=root / "redis"), free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {
        "SMOLLM_REDIS_URL": redis.url,
        "SMOLLM_MODELS_DIR": models_dir,
        "SMOLLM_LOG_FORMAT": "text",
        "API_PORT": port,
        "HOME": home,
    }
    processes: dict[str, Process] = {}

    def start(command: str) -> None:
        processes[command] = Process(["service", command], log=root / f"{command}.log", **settings)

    try:
        if not both:
            start("api")
            wait_until(lambda: get(url, "/live")[0] == 200, "the API")
        started_s = time.perf_counter()
        start("worker")
        if both:
            start("api")
        wait_until(lambda: get(url, "/ready")[0] == 200, "a worker that serves")
        ready_s = time.perf_counter() - started_s
        generate(url)
        return ready_s, time.perf_counter() - started_s, processes["worker"].log
    finally:
        for process in processes.values():
            process.kill()
        redis.stop()


def report(name: str, rounds: int, run: Callable[[], tuple[float, float, str]]) -> float:
    """Print the medians and the slowest; return the slowest until ready."""
    runs = [run() for _ in range(rounds)]
    ready, first, log = [ready for ready, _, _ in runs], [first for _, first, _ in runs], runs[-1][2]
    print(
        f"{name:<14}{rounds:>7}{statistics.median(ready):>9.2f} s{max(ready):>9.2f} s"
        f"{statistics.median(first):>12.2f} s{max(first):>9.2f} s",
        flush=True,
    )
    told = [line for line in log.splitlines() if "loaded" in line or "compiled the kernels" in line]
    print("".join(f"    {line}\n" for line in told), end="")
    return max(ready)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="smollm-start-") as name:
        root = Path(name)
        (root / "models").mkdir()
        (root / "models" / options.folder.name).symlink_to(options.folder.resolve())
        warm = root / "warm"

        def home(*, cold: bool) -> Path:
            path = Path(tempfile.mkdtemp(dir=root)) if cold else warm
            path.mkdir(exist_ok=True)
            return path

        def run(*, cold: bool, both: bool) -> tuple[float, float, str]:
            where = Path(tempfile.mkdtemp(dir=root))
            return measure(where, root / "models", home(cold=cold), both=both)

        run(cold=False, both=False)  # fills the warm home
        print(f"{'':<14}{'rounds':>7}{'ready':>11}{'slowest':>11}{'first token':>14}{'slowest':>11}")
        for both in (False, True):
            for cold in (False, True):
                line = f"{'both' if both else 'worker'}, {'cold' if cold else 'warm'}"
                one = lambda cold=cold, both=both: run(cold=cold, both=both)  # noqa: E731
                slowest = max(slowest, report(line, options.rounds, one))
    if slowest > LIMIT_S:
        print(f"missed: ready after {slowest:.1f} s, limit {LIMIT_S:g}")
    return int(slowest > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
