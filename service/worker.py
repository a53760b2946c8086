"""The worker's loop: takes jobs from the queue, steps the engines, sends tokens. It joins queue and engine.

One thread computes. One delivers (`publishing`), one hears of cancelled jobs (`cancels`), one keeps the leases
(`heartbeat`), one looks for new models (`engine.host`). SIGTERM: no new jobs, what can end within the grace time ends,
the rest is handed over, to be taken up at the same token.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from service.cancels import CancelWatch
from service.engine.host import Host, Hosts
from service.engine.sequence import Output, Sequence
from service.errors import NotReady
from service.heartbeat import Heartbeat
from service.metrics import WorkerMetrics
from service.observer import Observer
from service.publishing import Publisher
from service.queue.connection import MAX_BLOCK_S
from service.queue.job import LeasedJob, WorkerInfo
from service.queue.worker_queue import WorkerQueue
from service.tracing import Tracer
from shared.errors import SmolLMError
from shared.sampling import SamplingParams

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.25
"""How long an idle worker sleeps at most before it looks for new models, lost workers' jobs, and SIGTERM."""
LAST_WORDS_S = 1.0
"""How long a worker that is done tries to tell Redis what it still has to say."""
ANY_COST = 2**31
SLOTS_PER_SPARE = 32
"""One slot of so many is not for an API key that has more than half of what runs: others begin at once."""


@dataclass(slots=True)
class Running:
    """A job in this worker's hands, and the engine that works on it."""

    job: LeasedJob
    host: Host


class Worker:
    """One process' loop (`worker_process` starts it). `run` returns when `stop` was called and all was handed over."""

    def __init__(
        self,
        queue: WorkerQueue,
        hosts: Hosts,
        metrics: WorkerMetrics,
        *,
        shutdown_grace_s: float,
        tracer: Tracer | None = None,
    ) -> None:
        self.queue = queue
        self.hosts = hosts
        self.metrics = metrics
        self.shutdown_grace_s = shutdown_grace_s
        self.running: dict[str, Running] = {}
        self.observer = Observer(metrics, tracer or Tracer("worker"))
        self.publisher = Publisher(queue)
        self.cancels = CancelWatch(queue)
        self.heartbeat = Heartbeat(
            queue, lease_s=queue.limits.lease_ms / 1000, jobs=self.leased_jobs, describe=self.describe
        )
        self.stopping_since_s: float | None = None
        self.must_announce = False

    def stop(self) -> None:
        """Ask the loop to end; asked again, it gives everything back at once. Safe in a signal handler."""
        if self.is_stopping:
            self.shutdown_grace_s = 0.0
        else:
            self.stopping_since_s = time.monotonic()

    @property
    def is_stopping(self) -> bool:
        return self.stopping_since_s is not None

    @property
    def grace_left_s(self) -> float:
        """Seconds in which jobs in hand may still end by themselves."""
        since_s = time.monotonic() if self.stopping_since_s is None else self.stopping_since_s
        return max(0.0, since_s + self.shutdown_grace_s - time.monotonic())

    def run(self) -> None:
        """Work until stopped."""
        self.hosts.start()
        self.heartbeat.start()
        self.cancels.start()
        try:
            while not self.is_stopping:
                if not self.turn():
                    self.rest()
            self.drain()
        finally:
            self.publisher.close()
            self.cancels.stop()
            self.hosts.stop()
            self.heartbeat.stop()

    def turn(self) -> bool:
        """Take jobs, step each engine once, deliver; False when there was nothing to compute."""
        self.heartbeat.tick()
        if self.hosts.adopt():
            self.must_announce = True
        self.drop_lost(self.heartbeat.take_lost())
        self.ask_redis()
        return self.compute()

    def ask_redis(self) -> None:
        """Everything between two steps that needs Redis, except the delivery."""
        if not self.heartbeat.is_connected:
            self.metrics.redis_up.set(0)
            return
        try:
            if self.must_announce:
                self.heartbeat.announce()
                self.must_announce = False
            for job_id in self.cancels.take() & self.running.keys():
                self.forget(job_id, "cancelled")
            if not self.is_stopping:
                for host in self.hosts.current.values():
                    self.take_jobs(host)
            self.metrics.redis_up.set(1)
        except NotReady as error:
            self.heartbeat.lost_connection(error)

    def take_jobs(self, host: Host) -> None:
        """Fill the free slots of one engine."""
        engine = host.engine
        if any(old.name == host.name and old.engine.statistics.num_waiting for old in self.hosts.retired):
            return  # the head of the queue is a replaced revision's, and waits in its engine for room
        # Whatever the first costs: an empty engine is all the room there will ever be.
        if not engine.has_work and not self.take(host, num_slots=1, num_tokens=ANY_COST):
            return
        num_spare = engine.cache.num_slots // SLOTS_PER_SPARE
        self.take(host, num_slots=engine.free_slots, num_tokens=engine.free_tokens, num_spare=num_spare)

    def take(self, host: Host, *, num_slots: int, num_tokens: int, num_spare: int = 0) -> int:
        """Take jobs for one engine and return how many; what only a replaced revision can read goes to that one."""
        room = {"num_slots": num_slots, "num_tokens": num_tokens, "num_spare": num_spare}
        jobs = self.queue.next(host.name, host.revision, **room)
        strays = []
        for job in jobs:
            owner = self.owner_of(job, host)
            if owner is None or owner is host:
                self.begin(job, host)
            else:
                strays.append((job, owner))
        # They were leased as jobs of this revision; leased anew as the other's, their answers name the one they are of.
        self.queue.release([job for job, _ in strays])
        for owner, count in Counter(owner for _, owner in strays).items():
            for job in self.queue.next(owner.name, owner.revision, num_slots=count, num_tokens=ANY_COST):
                if self.owner_of(job, owner) is owner:
                    self.begin(job, owner)
                else:
                    self.queue.release([job])
        return len(jobs)

    def owner_of(self, job: LeasedJob, host: Host) -> Host | None:
        """The revision of a host's model whose tokenizer wrote a job's ids; None where it is not loaded (any more)."""
        if can_read(host, job):
            return host
        return self.hosts.find(host.name, job.request.options["tokenizer_sha256"])

    def begin(self, job: LeasedJob, host: Host) -> None:
        """Hand a job to an engine, behind what an earlier attempt delivered."""
        if job.id in self.running:  # this worker itself lost it for a moment
            self.forget(job.id, "lost")
        self.running[job.id] = Running(job, host)
        self.observer.took(job, host.name)
        request = job.request
        if not can_read(host, job):
            # Its ids would be read as other words, and nobody would know.
            sentence = f"The model {host.name!r} was replaced by one with another tokenizer meanwhile; send it again."
            self.fail(job.id, sentence, code="model_changed")
            return
        try:
            host.engine.add(
                Sequence(
                    id=job.id,
                    prompt_ids=request.prompt_ids,
                    params=SamplingParams(**request.sampling),
                    max_new_tokens=request.max_new_tokens,
                    stop=request.stop,
                    logprobs=request.logprobs,
                    scores_prompt=bool(request.options.get("scores_prompt", False)),
                    completion_ids=list(job.completion_ids),
                    end_token_ids=host.folder.end_token_ids,
                    ignore_eos=bool(request.options.get("ignore_eos", False)),
                    stop_token_ids=request.options.get("stop_token_ids", ()),
                    grammar=request.options.get("grammar"),
                )
            )
        except (SmolLMError, TypeError) as error:
            log.warning("job %s cannot be served: %s", job.id, error)
            self.fail(job.id, f"The model cannot serve this request: {error}.")

    def compute(self) -> bool:
        """Step every engine that has work and send what came out."""
        working = [host for host in self.hosts.all if host.engine.has_work]
        for host in working:
            self.step(host)
            self.exchange()
        self.exchange()
        return bool(working)

    def step(self, host: Host) -> None:
        """Advance one engine by one step."""
        before = host.engine.statistics
        started_s = time.monotonic()
        try:
            outputs = host.engine.step()
        except SmolLMError as error:  # damaged weights: the jobs fail, other models go on
            log.error("%s: %s", host.name, error)
            for running in [running for running in self.running.values() if running.host is host]:
                host.engine.cancel(running.job.id)
                self.fail(running.job.id, f"The model {host.name!r} failed: {error}.")
            self.observer.stands(host.name, host.engine)
            return
        for output in outputs:
            self.accept(output)
        self.observer.stepped(host.name, host.engine, before, time.monotonic() - started_s)

    def accept(self, output: Output) -> None:
        """Note what a step brought one job."""
        self.publisher.add(self.running[output.sequence_id].job, output)
        self.observer.drew(output)
        if output.finish_reason is not None:
            del self.running[output.sequence_id]
            self.observer.left(output.sequence_id, output.finish_reason)

    def exchange(self, *, wait_s: float = 0.0) -> None:
        """Hear what Redis made of the last delivery and send the next; with time to wait, everything there is."""
        self.hear_of_delivery(wait_s)
        if self.heartbeat.is_connected:
            self.publisher.send(everything=wait_s > 0)
        if wait_s:
            self.hear_of_delivery(wait_s)

    def hear_of_delivery(self, wait_s: float) -> None:
        """Drop the jobs that Redis no longer wants from this worker."""
        delivery = self.publisher.take_result(wait_s=wait_s)
        if delivery is None:
            return
        self.drop_lost(delivery.lost)
        for verdict in delivery.refused:
            self.metrics.refused_writes.labels(verdict.value).inc()
        if delivery.error is not None:
            self.heartbeat.lost_connection(delivery.error)
        else:
            self.metrics.publish_seconds.observe(delivery.seconds)

    def drop_lost(self, lost: Iterable[LeasedJob]) -> None:
        """Drop jobs whose lease is over, but not one that this worker has taken again since."""
        for job in lost:
            if self.holds(job):
                self.forget(job.id, "lost")

    def forget(self, job_id: str, why: str) -> None:
        """Drop a job that is no longer ours; its slot is free at once."""
        self.publisher.drop(job_id)
        running = self.running.pop(job_id, None)
        if running is not None:
            running.host.engine.cancel(job_id)
            self.observer.left(job_id, why)
            self.observer.stands(running.host.name, running.host.engine)  # there may be no further step to tell it

    def fail(self, job_id: str, sentence: str, *, code: str | None = None) -> None:
        """End a job with an error for its client."""
        running = self.running.pop(job_id)
        self.publisher.fail(running.job, sentence, code=code)
        self.observer.left(job_id, "error")

    def rest(self) -> None:
        """Nothing to compute: sleep until a job may be waiting."""
        if self.publisher.has_undelivered:
            self.exchange(wait_s=0.02)
        if self.publisher.has_undelivered or not self.heartbeat.is_connected or not self.hosts.current:
            time.sleep(0.02)
            return
        try:
            self.queue.wait_for_work(IDLE_WAIT_S)
        except NotReady as error:
            self.heartbeat.lost_connection(error)

    def drain(self) -> None:
        """Let end what can within the grace time; hand over the rest, which goes on elsewhere at the same token."""
        log.info("stopping: %d jobs are running, %.1f s to end them", len(self.running), self.grace_left_s)
        self.must_announce = True
        self.hand_over([running for running in self.running.values() if not self.ends_in_time(running)])
        while self.running and self.grace_left_s > 0:  # asked again to stop, none is left
            self.turn()
        self.hand_over(list(self.running.values()))
        give_up_at_s = time.monotonic() + LAST_WORDS_S
        while self.publisher.has_undelivered and time.monotonic() < give_up_at_s:
            self.exchange(wait_s=0.02)
            time.sleep(0.005)
        try:
            self.queue.withdraw()
        except NotReady as error:
            log.warning("%s", error)

    def ends_in_time(self, running: Running) -> bool:
        """Whether a job can draw all its tokens within the grace at the engine's usual pace."""
        statistics, sequence = running.host.engine.statistics, running.host.engine.sequences.get(running.job.id)
        if sequence is None:
            return True
        step_s = statistics.busy_s / max(1, statistics.num_steps)
        num_left = sequence.max_new_tokens - len(sequence.completion_ids)
        return num_left * step_s < self.grace_left_s

    def hand_over(self, handed: list[Running]) -> None:
        """Give jobs back to the queue, to be taken at once by whoever asks next."""
        if not handed:
            return
        self.exchange(wait_s=MAX_BLOCK_S)  # all that is known goes out before
        jobs = [running.job for running in handed if self.holds(running.job)]
        try:
            self.queue.release(jobs if self.heartbeat.is_connected else ())
        except NotReady as error:
            self.heartbeat.lost_connection(error)  # another worker takes them when their leases have run out
        for job in jobs:
            self.forget(job.id, "handed_over")
        log.info("handed over %d jobs", len(jobs))

    def holds(self, job: LeasedJob) -> bool:
        """Whether this very lease is in hand: its number alone may come again, after Redis lost everything."""
        running = self.running.get(job.id)
        return running is not None and running.job is job

    def leased_jobs(self) -> list[LeasedJob]:
        """The jobs in hand; called from the heartbeat's thread."""
        return [running.job for running in list(self.running.values())]

    def describe(self) -> WorkerInfo:
        """What this worker says about itself; called from the heartbeat's thread as well."""
        current = dict(self.hosts.current)
        engines = [host.engine for host in current.values()]
        return WorkerInfo(
            id=self.queue.worker_id,
            models={name: host.revision for name, host in current.items()},
            tokenizers={name: sha256 for name, host in current.items() if (sha256 := host.folder.tokenizer_sha256)},
            slots=sum(engine.cache.num_slots for engine in engines),
            free=sum(engine.free_slots for engine in engines),
            device=str(engines[0].model.device) if engines else "",
            dtype=str(engines[0].cache.dtype).removeprefix("torch.") if engines else "",
            draining=self.is_stopping,
            details={
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "cached_tokens": sum(engine.statistics.cached_tokens for engine in engines),
                "max_cached_tokens": sum(engine.cache.max_cached_tokens for engine in engines),
            },
        )


def can_read(host: Host, job: LeasedJob) -> bool:
    """Whether a job's ids are of a model's own tokenizer; true where an older API says nothing of it."""
    own = host.folder.tokenizer_sha256
    return bool(job.request.options.get("tokenizer_sha256", own) == own)
