"""A whole service for tests: the real app on a real socket, and a worker that is real to the queue but scripted.

`ScriptedWorker` speaks the queue's own protocol; only where its tokens come from is not a network. So a test decides
when a job is taken, what it says and when it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from pydantic import SecretStr

from service.api.app import create_app
from service.api.server import take_port
from service.api.wire import BoundedHttp
from service.queue.connection import blocking_redis
from service.queue.job import Chunk, Finish, LeasedJob, QueueLimits, Verdict, WorkerInfo
from service.queue.worker_queue import WorkerQueue
from service.settings import Settings
from shared.tokenizer import Tokenizer

TEXT = " Speak, speak. Größe 🙂 hear me."
PATIENCE_S = 10.0


def wait_until(predicate: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Return the predicate's first true answer."""
    give_up_at = time.monotonic() + timeout_s
    while not (answer := predicate()):
        assert time.monotonic() < give_up_at, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.005)
    return answer


def make_settings(redis_url: str, models_dir: Path, runs_dir: Path, **changes: Any) -> Settings:
    values = {"default_model": "tiny", "model_poll_s": 0.1, **changes}
    return Settings(_env_file=None, redis_url=SecretStr(redis_url), models_dir=models_dir, runs_dir=runs_dir, **values)


class Api:
    """One API process' worth of the app, on a thread with its own event loop, behind a real socket."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app = create_app(settings)
        self.listener = take_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, http=BoundedHttp, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started, "the API to start")

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        self.listener.close()
        assert not self.thread.is_alive(), "the API did not stop"


@contextmanager
def running_api(settings: Settings) -> Iterator[Api]:
    api = Api(settings)
    try:
        yield api
    finally:
        api.stop()


def client_of(api: Api, **options: Any) -> httpx2.Client:
    # Loading certificates for plain HTTP would take longer than most tests.
    return httpx2.Client(base_url=api.url, trust_env=False, verify=False, timeout=PATIENCE_S, **options)


class ScriptedWorker:
    """A thread that takes jobs and answers each with `TEXT`, over and over, until its length."""

    def __init__(self, redis_url: str, models: dict[str, tuple[str, Tokenizer]]) -> None:
        self.models = models
        self.queue = WorkerQueue(blocking_redis(redis_url), worker_id="scripted", limits=QueueLimits())
        self.takes = threading.Event()
        """Clear: jobs stay in the queue."""
        self.writes = threading.Event()
        """Clear: a job that runs stays at the token it has."""
        self.ends = threading.Event()
        """Clear: a job that delivered all its tokens stays open."""
        self.finish: Finish | None = None
        """Set: how jobs end, whatever they deliver."""
        self.text = TEXT
        self.tokenizers: dict[str, str] = {}
        """By model: what it announces; a worker of an older version says nothing."""
        self.taken: list[LeasedJob] = []
        self.dropped: list[str] = []
        """Jobs that the queue told it to drop."""
        self._taking = threading.Lock()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        for event in (self.takes, self.writes, self.ends):
            event.set()

    def take_no_more(self) -> None:
        """Once this returns, jobs stay in the queue."""
        with self._taking:
            self.takes.clear()

    def start(self) -> ScriptedWorker:
        self.announce()
        self._thread.start()
        return self

    def stop(self) -> None:
        self._leaving.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def announce(self) -> None:
        names = {name: revision for name, (revision, _) in self.models.items()}
        self.queue.announce(
            WorkerInfo(
                id="scripted",
                models=names,
                tokenizers=self.tokenizers,
                slots=8,
                free=8,
                device="cpu",
                dtype="float32",
            )
        )

    def _run(self) -> None:
        threads: list[threading.Thread] = []
        announced_at = 0.0
        while not self._leaving.is_set():
            if time.monotonic() - announced_at > 0.5:
                self.announce()
                announced_at = time.monotonic()
            with self._taking:
                for model, (revision, _) in self.models.items() if self.takes.is_set() else ():
                    for job in self.queue.next(model, revision, num_slots=8, num_tokens=100_000):
                        self.taken.append(job)
                        threads.append(threading.Thread(target=self._serve, args=(job,), daemon=True))
                        threads[-1].start()
            self._leaving.wait(0.002)
        for thread in threads:
            thread.join(PATIENCE_S)

    def _serve(self, job: LeasedJob) -> None:
        _, tokenizer = self.models[job.request.model]
        decoder = tokenizer.stream_decoder()
        ids = tokenizer.encode(self.text)
        index = len(job.completion_ids)
        while index < job.request.max_new_tokens and not (self.finish and index >= 3):
            token_id = ids[index % len(ids)]
            if not self._wait(self.writes, job):
                return
            chunk = Chunk(
                first_index=index,
                token_ids=(token_id,),
                text=decoder.push(token_id),
                logprobs=(logprobs_of(token_id, job.request.logprobs),) if job.request.logprobs is not None else None,
            )
            if self.queue.append([(job, chunk)])[0][0] is not Verdict.OK:
                self.dropped.append(job.id)
                return
            index += 1
        if not self._wait(self.ends, job):
            return
        tail = Chunk(first_index=index, token_ids=(), text=decoder.flush())
        self.queue.finish(
            job,
            self.finish or Finish(reason="length"),
            chunk=tail if tail.text else None,
            timings={"prefill_ms": 1.5, "cached_tokens": 1},
        )

    def _wait(self, event: threading.Event, job: LeasedJob) -> bool:
        """Hold a job's lease until the event is set; False when the job is to be dropped."""
        while not event.wait(0.02):
            if self._leaving.is_set() or self.queue.heartbeat([job])[0] is not Verdict.OK:
                self.dropped.append(job.id)
                return False
        return True


def logprobs_of(token_id: int, alternatives: int) -> dict[str, Any]:
    """One token's entry as `service/engine` writes it; the last alternative is impossible, so its number is -inf."""
    top = [[(token_id + place) % 512, -1.0 - place] for place in range(alternatives)]
    if alternatives:
        top[-1][1] = float("-inf")
    return {"token_id": token_id, "logprob": -1.0, "top": top}
