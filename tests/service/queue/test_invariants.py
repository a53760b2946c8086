"""Random operations and crashes against a model of the queue; after each step the books must balance.

Every job is in exactly one place, counters equal sums, tokens are those delivered, and no key lives for ever.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.api_keys import ApiKey
from service.errors import QueueFull
from service.queue import keys
from service.queue.connection import async_redis, blocking_redis
from service.queue.job import Finish, JobState, LeasedJob, QueueLimits, Verdict
from service.queue.job_queue import JobQueue, fingerprint
from service.queue.worker_queue import WorkerQueue
from tests.service.queue.conftest import MODEL, REVISION, chunk, request, worker_info

LIMITS = QueueLimits(max_queued_jobs=6, max_queued_tokens=200, result_ttl_s=60, lease_ms=60_000, max_attempts=3)
NUM_WORKERS = 3
MAX_OF_KEY = 4
ENTITLED = ApiKey(sha256="0" * 64, weight=2, requests_per_minute=1e6, max_queued_jobs=MAX_OF_KEY)


@dataclass
class Known:
    """What the model knows of one job."""

    cost: int
    key: str
    state: JobState = JobState.QUEUED
    attempt: int = 0
    lost: int = 0
    silent: bool = False
    released: bool = False
    tokens: list[int] = field(default_factory=list)


def room_for(who: str, turns: dict[str, float], now_ms: int) -> tuple[int, float]:
    """Return the jobs and tokens that may wait once this one does."""
    turns = {one: due for one, due in turns.items() if due > now_ms - 10_000}
    if turns.get(who, float("inf")) <= now_ms + 250:
        return 2 * LIMITS.max_queued_jobs, 2 * LIMITS.max_queued_tokens
    if turns:
        return LIMITS.max_queued_jobs - LIMITS.max_queued_jobs // 4, 0.75 * LIMITS.max_queued_tokens
    return LIMITS.max_queued_jobs, LIMITS.max_queued_tokens


class QueueMachine(RuleBasedStateMachine):
    """Hands hold leases that workers believe in; some of them are zombies."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client: redis.Redis = blocking_redis(self.url)
        self.client.flushdb()
        self.api = async_redis(self.url)
        self.queue = JobQueue(self.api, limits=LIMITS)
        self.workers = [WorkerQueue(self.client, worker_id=str(i), limits=LIMITS) for i in range(NUM_WORKERS)]
        self.jobs: dict[str, Known] = {}
        self.hands: list[tuple[WorkerQueue, LeasedJob]] = []

    def teardown(self) -> None:
        self.runner.run(self.api.aclose())
        self.runner.close()
        self.client.close()

    @initialize()
    def announce(self) -> None:
        for worker in self.workers:
            worker.announce(worker_info(worker.worker_id))

    @rule(size=st.integers(1, 80), key=st.sampled_from("ab"), priority=st.integers(0, 2), watched=st.booleans())
    def admit(self, size: int, key: str, priority: int, watched: bool) -> None:
        queued = [job for job in self.jobs.values() if job.state is JobState.QUEUED]
        cost = size + 2
        has_its_share = [self.jobs[job].key for job in self.ids(JobState.QUEUED)].count(key) < MAX_OF_KEY
        asked = request(max_new_tokens=size)
        turns, asked_ms = self.promises(), self.now_ms()

        def fits(at_ms: int) -> bool:
            num_jobs, num_tokens = room_for(fingerprint(asked, key), turns, at_ms)
            return len(queued) < num_jobs and sum(job.cost for job in queued) + cost <= num_tokens

        try:
            admission = self.runner.run(
                self.queue.admit(
                    asked,
                    key=key,
                    entitled_to=ENTITLED,
                    priority=priority,
                    timeout_s=60,
                    cancel_on_disconnect=watched,
                )
            )
        except QueueFull as refusal:
            assert refusal.retry_after_s
            is_full = refusal.code_name == "queue_full"
            assert not (fits(asked_ms) and fits(self.now_ms())) if is_full else not has_its_share
            return
        assert (fits(asked_ms) or fits(self.now_ms())) and has_its_share, "a turn may come in between"
        self.jobs[admission.id] = Known(cost, key)

    @precondition(lambda self: self.promises())
    @rule(data=st.data())
    def come_due(self, data: st.DataObject) -> None:
        """The time comes that somebody was promised; whether they come back is another matter."""
        who = data.draw(st.sampled_from(sorted(self.promises())))
        self.client.zadd(keys.PROMISES + MODEL, {who: self.now_ms()})

    def promises(self) -> dict[str, float]:
        pairs: Any = self.client.zrange(keys.PROMISES + MODEL, 0, -1, withscores=True)
        return dict(pairs)

    def now_ms(self) -> int:
        seconds, microseconds = self.client.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    @rule(who=st.integers(0, NUM_WORKERS - 1), num_slots=st.integers(1, 3), room=st.integers(1, 150))
    def take(self, who: int, num_slots: int, room: int) -> None:
        worker = self.workers[who]
        taken = worker.next(MODEL, REVISION, num_slots=num_slots, num_tokens=room)
        for known in self.jobs.values():  # poison is found whoever asks
            if known.state is JobState.RUNNING and known.silent and known.attempt and known.lost + 1 >= 3:
                known.state = JobState.FAILED
        assert len(taken) <= num_slots
        assert sum(job.request.cost for job in taken) <= room
        for job in taken:
            known = self.jobs[job.id]
            if known.state is JobState.RUNNING:
                known.lost += known.silent
            else:
                assert known.state is JobState.QUEUED
            assert job.attempt == known.attempt + (not known.released)
            known.state, known.silent, known.released, known.attempt = JobState.RUNNING, False, False, job.attempt
            assert list(job.completion_ids) == known.tokens
            self.hands.append((worker, job))

    def expected(self, job: LeasedJob) -> Verdict:
        known = self.jobs[job.id]
        if known.attempt != job.attempt:
            return Verdict.FENCED
        return {
            JobState.RUNNING: Verdict.OK,
            JobState.CANCELLED: Verdict.CANCEL,
            JobState.EXPIRED: Verdict.CANCEL,
        }.get(known.state, Verdict.FENCED)

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), count=st.integers(1, 3), twice=st.booleans())
    def append(self, data: st.DataObject, count: int, twice: bool) -> None:
        worker, job = data.draw(st.sampled_from(self.hands))
        known, verdict = self.jobs[job.id], self.expected(job)
        start = len(known.tokens)
        write = chunk(start, *range(start, start + count))
        for _ in range(1 + twice):
            assert worker.append([(job, write)])[0][0] is verdict
        if verdict is Verdict.OK:
            known.tokens += write.token_ids
            known.silent = False

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        worker, job = data.draw(st.sampled_from(self.hands))
        assert worker.heartbeat([job]) == [self.expected(job)]
        if self.expected(job) is Verdict.OK:
            self.jobs[job.id].silent = False

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), reason=st.sampled_from(["stop", "length", "error"]))
    def finish(self, data: st.DataObject, reason: Any) -> None:
        worker, job = data.draw(st.sampled_from(self.hands))
        known, verdict = self.jobs[job.id], self.expected(job)
        state = JobState.FAILED if reason == "error" else JobState.SUCCEEDED
        if known.attempt == job.attempt and known.state is state:
            verdict = Verdict.OK  # an ending sent twice
        last = chunk(len(known.tokens), 7)
        was_running = known.state is JobState.RUNNING
        assert worker.finish(job, Finish(reason=reason), chunk=last) is verdict
        if verdict is Verdict.OK and was_running:
            known.state = state
            known.tokens.append(7)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker, job = data.draw(st.sampled_from(self.hands))
        verdict = self.expected(job)
        assert worker.release([job]) == [verdict]
        if verdict is Verdict.OK:
            known = self.jobs[job.id]
            known.attempt, known.silent, known.released = known.attempt + 1, False, True

    @precondition(lambda self: any(job.state is JobState.RUNNING for job in self.jobs.values()))
    @rule(data=st.data())
    def lose_lease(self, data: st.DataObject) -> None:
        """A worker falls silent for longer than its lease; a job handed over already has none to lose."""
        running = [job_id for job_id, job in self.jobs.items() if job.state is JobState.RUNNING]
        job_id = data.draw(st.sampled_from(running))
        if self.client.zscore(keys.LEASES + MODEL, job_id):
            self.client.zadd(keys.LEASES + MODEL, {job_id: 1})
            self.jobs[job_id].silent = True

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        record = self.runner.run(self.queue.cancel(job_id))
        assert record is not None
        if not self.jobs[job_id].state.is_final:
            self.jobs[job_id].state = JobState.CANCELLED

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), which=st.sampled_from([keys.DEADLINES, keys.WATCHES]))
    def time_passes(self, data: st.DataObject, which: str) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        self.runner.run(self.queue.reap())
        if self.client.zadd(which, {job_id: 1}, xx=True, ch=True):
            assert self.workers[0].reap() == 1
            self.jobs[job_id].state = JobState.EXPIRED if which == keys.DEADLINES else JobState.CANCELLED

    @invariant()
    def every_job_is_in_exactly_one_place(self) -> None:
        lines = Counter(
            job_id for priority in range(3) for job_id in self.client.zrange(f"{keys.BACKLOG}{MODEL}:{priority}", 0, -1)
        )
        leases = Counter(self.client.zrange(keys.LEASES + MODEL, 0, -1))
        live = Counter(self.client.zrange(keys.DEADLINES, 0, -1))
        assert lines == Counter(self.ids(JobState.QUEUED))
        assert leases == Counter(self.ids(JobState.RUNNING))
        assert live == lines + leases
        assert set(self.client.zrange(keys.WATCHES, 0, -1)) <= set(live)

    @invariant()
    def counters_are_sums(self) -> None:
        statistics = self.runner.run(self.queue.statistics(MODEL))[MODEL]
        for state in (JobState.QUEUED, JobState.RUNNING):
            members = [self.jobs[job_id] for job_id in self.ids(state)]
            assert getattr(statistics, state) == len(members)
            assert getattr(statistics, f"{state}_cost") == sum(job.cost for job in members)
        counts: Any = self.client.hgetall(keys.COUNTS + MODEL)
        for letter, state in (("k:", JobState.QUEUED), ("r:", JobState.RUNNING)):
            of_keys = {name[2:]: int(value) for name, value in counts.items() if name.startswith(letter)}
            assert of_keys == Counter(self.jobs[job_id].key for job_id in self.ids(state))

    @invariant()
    def no_key_lives_for_ever(self) -> None:
        names = self.client.keys()
        pipeline = self.client.pipeline(transaction=False)
        for name in names:
            pipeline.pttl(name)
        lifetimes = dict(zip(names, pipeline.execute(), strict=True))
        assert all(lifetime > 0 for lifetime in lifetimes.values()), lifetimes

    @invariant()
    def tokens_are_those_delivered(self) -> None:
        for job_id, known in self.jobs.items():
            record = self.runner.run(self.queue.get(job_id))
            assert record is not None
            assert record.state is known.state
            assert list(record.completion.token_ids) == known.tokens
            assert record.completion.text == chunk(0, *known.tokens).text

    def ids(self, state: JobState) -> Iterator[str]:
        return (job_id for job_id, job in self.jobs.items() if job.state is state)


def test_books_balance_whatever_happens(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setattr(QueueMachine, "url", redis_url)
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=15,
            stateful_step_count=30,
            deadline=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],  # without the slow tracing of Phase.explain
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
