"""The worker process over a real Redis: its answers are the plain loop's, whatever happens to workers and models."""

from __future__ import annotations

import dataclasses
import random
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from service.queue.job import JobRequest, JobState
from service.queue.local_server import start_redis
from shared.catalog import read_model_folder
from shared.checkpoint import write_export
from shared.config import ModelConfig
from shared.generate import generate
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from shared.scores import PromptScores
from tests.processes import free_port
from tests.service.worker_process import WorkerProcess, connect, wait_for
from tests.tiny import TINY, tiny_model, tiny_tokenizer, write_tiny_export

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_thread")]

StartWorker = Callable[..., WorkerProcess]

LONG: ModelConfig = dataclasses.replace(TINY, max_position_embeddings=2_048, num_hidden_layers=6)
"""Long and deep enough that a completion takes a second: something can happen to it in the middle."""


@pytest.fixture
def start_worker(redis_url: str, tmp_path: Path) -> Iterator[StartWorker]:
    workers: list[WorkerProcess] = []

    def start(url: str = redis_url, **settings: Any) -> WorkerProcess:
        workers.append(WorkerProcess(url, tmp_path / "models", tmp_path / f"worker{len(workers)}.log", **settings))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def request(prompt: str = "First Citizen:", model: str = "tiny", **values: Any) -> JobRequest:
    sampling = {"temperature": 0.0, "seed": 1, **values.pop("sampling", {})}
    prompt_ids = tuple(tiny_tokenizer().encode(prompt))
    return JobRequest(**{"model": model, "prompt_ids": prompt_ids, "max_new_tokens": 40, **values}, sampling=sampling)


def expected_ids(asked: JobRequest, model: SmolLM2, end_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    params = SamplingParams(**asked.sampling)
    return tuple(
        generate(model, asked.prompt_ids, params, max_new_tokens=asked.max_new_tokens, end_token_ids=end_token_ids)
    )


def write_long_export(models_dir: Path, *, seed: int = 3, num_hidden_layers: int = LONG.num_hidden_layers) -> None:
    model = SmolLM2(dataclasses.replace(LONG, num_hidden_layers=num_hidden_layers))
    model.initialize(seed)
    write_export(models_dir / "long", model.eval(), tiny_tokenizer(), trained_length=64)


def long_request(**values: Any) -> JobRequest:
    sampling = {"temperature": 1.0, "seed": 7, "frequency_penalty": 0.2}
    return request(**{"model": "long", "sampling": sampling, "max_new_tokens": 400, **values})


async def test_answers_are_the_plain_loops(redis_url: str, start_worker: StartWorker, tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "models")
    start_worker(num_slots=4, max_cached_tokens=512)
    draw = random.Random(0)
    asked = [
        request(
            draw.choice(["All:", "def add(", "日本", "Question: 12 + 30 = ?\nAnswer:"]),
            max_new_tokens=draw.randint(1, 60),
            sampling={"temperature": draw.choice([0.0, 0.8, 1.5]), "seed": draw.randrange(2**64)},
        )
        for _ in range(12)
    ]
    model = tiny_model().half().float()  # the export is FP16
    async with connect(redis_url) as client:
        await client.wait_for_workers(1, "tiny")
        job_ids = [await client.admit(each) for each in asked]
        for each, job_id in zip(asked, job_ids, strict=True):
            record = await client.result(job_id)
            assert record.state is JobState.SUCCEEDED and record.finish is not None
            ids = expected_ids(each, model, folder.end_token_ids)
            assert record.completion.token_ids == ids
            assert record.completion.text == tiny_tokenizer().decode(ids)
            assert record.finish.reason == ("length" if len(ids) == each.max_new_tokens else "stop")
            assert record.revision == folder.revision and record.prefill_ms is not None


async def test_one_worker_through_its_day(redis_url: str, start_worker: StartWorker, tmp_path: Path) -> None:
    """Bad jobs fail alone, cancelled ones free their slot, models come, change and go, and it ends politely."""
    models_dir = tmp_path / "models"
    first = write_tiny_export(models_dir)
    write_long_export(models_dir)
    metrics_port = free_port()
    worker = start_worker(num_slots=1, worker_metrics_port=metrics_port)
    async with connect(redis_url) as client:
        await client.wait_for_workers(1, "long")
        await client.wait_for_workers(1, "tiny")

        too_long = await client.admit(request(prompt_ids=(5,) * (TINY.max_position_embeddings + 1)))
        record = await client.result(too_long)
        assert record.state is JobState.FAILED and record.finish is not None
        assert "context" in str(record.finish.error)

        plain = await client.result(await client.admit(request(logprobs=2)))
        assert plain.completion.logprobs is not None
        assert [entry["token_id"] for entry in plain.completion.logprobs] == list(plain.completion.token_ids)
        stop = plain.completion.text[5:8]
        stopped = await client.result(await client.admit(request(stop=(stop,))))
        assert stopped.finish is not None and stopped.finish.stop_sequence == stop
        assert stopped.completion.text == plain.completion.text[: plain.completion.text.index(stop)]

        running = await client.admit(long_request())
        waiting = await client.admit(long_request())
        await client.until(running, lambda it: bool(it.completion.token_ids))
        await client.queue.cancel(running)
        await client.until(waiting, lambda it: bool(it.completion.token_ids))  # the only slot became free
        assert (await client.get(running)).state is JobState.CANCELLED
        await client.queue.cancel(waiting)
        await wait_for(lambda: tells(metrics_port, worker_running_sequences=0, worker_cached_tokens=0))

        waiting = await client.admit(long_request())
        await client.until(waiting, lambda it: bool(it.completion.token_ids))
        second = write_tiny_export(models_dir, "tiny", seed=1)
        write_tiny_export(models_dir, "other", seed=2)
        await client.wait_for_workers(1, "other")

        async def serves_second() -> bool | None:
            return second.revision in await client.wait_for_workers(1, "tiny") or None

        await wait_for(serves_second)
        answers = [await client.result(await client.admit(request(model=name))) for name in ("tiny", "other")]
        assert answers[0].revision == second.revision != first.revision
        assert answers[1].revision == read_model_folder(models_dir / "other").revision
        assert (await client.result(waiting)).state is JobState.SUCCEEDED  # its stream was not cut by any of it
        assert worker.terminate() == 0, worker.log
        assert await client.queue.workers() == []


async def test_a_model_replaced_in_mid_stream_cuts_no_stream(
    redis_url: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    """The old weights end what they began, token for token; new jobs are answered by the new ones."""
    models_dir = tmp_path / "models"
    write_long_export(models_dir)
    first = read_model_folder(models_dir / "long")
    start_worker(num_slots=2)
    async with connect(redis_url) as client:
        await client.wait_for_workers(1, "long")
        undisturbed = await client.result(await client.admit(long_request()))
        running = await client.admit(long_request())
        await client.until(running, lambda it: bool(it.completion.token_ids))
        write_long_export(models_dir, seed=4)
        second = read_model_folder(models_dir / "long")

        async def serves_second() -> bool | None:
            return second.revision in await client.wait_for_workers(1, "long") or None

        await wait_for(serves_second)
        answer = await client.result(await client.admit(long_request()))
        assert answer.revision == second.revision != first.revision
        record = await client.result(running)
        assert record.revision == first.revision and record.completion == undisturbed.completion
        assert answer.completion != undisturbed.completion


async def test_streams_survive_kill_and_hand_over(redis_url: str, start_worker: StartWorker, tmp_path: Path) -> None:
    write_long_export(tmp_path / "models")
    workers = [start_worker(), start_worker()]
    async with connect(redis_url) as client:
        await client.wait_for_workers(2, "long")
        undisturbed = await client.result(await client.admit(long_request()))
        assert undisturbed.state is JobState.SUCCEEDED

        job_id = await client.admit(long_request())
        record = await client.until(job_id, lambda it: len(it.completion.token_ids) > 5)
        [victim] = [worker for worker in workers if f"-{worker.process.pid}-" in str(record.worker)]
        victim.kill()
        assert not (await client.get(job_id)).state.is_final
        record = await client.result(job_id)
        assert record.attempt == 2 and record.completion == undisturbed.completion
        assert record.finish == undisturbed.finish

        [survivor] = [worker for worker in workers if worker is not victim]
        start_worker()
        await client.wait_for_workers(2, "long")
        job_ids = [await client.admit(long_request()) for _ in range(3)]
        for job_id in job_ids:
            await client.until(job_id, lambda it: len(it.completion.token_ids) > 5)
        survivor.terminate()
        for job_id in job_ids:
            record = await client.result(job_id)
            assert record.completion == undisturbed.completion and record.finish == undisturbed.finish


async def test_told_twice_to_stop_it_gives_back_at_once(
    redis_url: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    """Also when it is ending, within a long grace, what it has."""
    write_long_export(tmp_path / "models", num_hidden_layers=32)
    worker = start_worker(shutdown_grace_s=3_600)
    async with connect(redis_url) as client:
        await client.wait_for_workers(1, "long")
        job_id = await client.admit(long_request(max_new_tokens=2_000, options={"ignore_eos": True}))
        await client.until(job_id, lambda it: len(it.completion.token_ids) > 5)
        worker.process.send_signal(signal.SIGTERM)
        await wait_for(lambda: says(worker, "stopping: 1 jobs are running"))
        drawn = len((await client.get(job_id)).completion.token_ids)
        await client.until(job_id, lambda it: len(it.completion.token_ids) > drawn + 5)  # it does go on
        assert worker.terminate() == 0
        assert (await client.get(job_id)).state is JobState.RUNNING and "handed over 1 jobs" in worker.log


async def test_a_prompt_s_scores_survive_kill_and_hand_over(
    redis_url: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    """Killed while it computes them, or behind the first token, which brings them: they come once and are the same."""
    write_long_export(tmp_path / "models")
    workers = [start_worker(), start_worker()]
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(512) for _ in range(1_600)) for _ in range(3)]
    asked = [long_request(prompt_ids=prompt_ids, logprobs=2, options={"scores_prompt": True}) for prompt_ids in prompts]
    async with connect(redis_url) as client:
        await client.wait_for_workers(2, "long")
        undisturbed = [await client.result(await client.admit(each)) for each in asked]
        for each, record in zip(asked, undisturbed, strict=True):
            assert record.completion.prompt_scores is not None
            scores = PromptScores.from_text(record.completion.prompt_scores)
            assert len(scores.entries(each.prompt_ids)) == 1_600 and scores.top_ids_TK.shape == (1_599, 2)

        for num_tokens in (0, 6):
            job_ids = [await client.admit(each) for each in asked]
            record = await client.until(
                job_ids[0],
                lambda it, least=num_tokens: it.worker is not None and len(it.completion.token_ids) >= least,  # type: ignore[misc]
            )
            [victim] = [worker for worker in workers if f"-{worker.process.pid}-" in str(record.worker)]
            workers.remove(victim)
            victim.kill()
            if not num_tokens:
                workers.append(start_worker())
            for job_id, expected in zip(job_ids, undisturbed, strict=True):
                record = await client.result(job_id)
                assert record.finish == expected.finish
                assert record.completion.token_ids == expected.completion.token_ids
                assert [entry["token_id"] for entry in record.completion.logprobs or ()] == list(
                    record.completion.token_ids
                )
                told, exact = (PromptScores.from_text(it.completion.prompt_scores or "") for it in (record, expected))
                # PyTorch's sums owe their last bits to what is computed beside.
                np.testing.assert_allclose(told.logprobs_T, exact.logprobs_T, atol=1e-4)


async def test_redis_may_freeze_and_go_away(start_worker: StartWorker, tmp_path: Path) -> None:
    write_long_export(tmp_path / "models")
    with start_redis(directory=tmp_path / "redis") as redis:
        port = int(redis.url.split(":")[-1].split("/")[0])
        worker = start_worker(redis.url)
        async with connect(redis.url) as client:
            await client.wait_for_workers(1, "long")
            undisturbed = await client.result(await client.admit(long_request()))

            job_id = await client.admit(long_request())
            await client.until(job_id, lambda it: len(it.completion.token_ids) > 5)
            assert redis.process is not None
            redis.process.send_signal(signal.SIGSTOP)
            await anyio.sleep(1.0)  # the outage itself, shorter than any time-out
            redis.process.send_signal(signal.SIGCONT)
            record = await client.result(job_id)
            assert record.completion == undisturbed.completion and record.finish == undisturbed.finish

            job_id = await client.admit(long_request())
            await client.until(job_id, lambda it: len(it.completion.token_ids) > 5)
            redis.stop()
            await wait_for(lambda: says(worker, "goes on with what it has"))
            with start_redis(port=port, directory=tmp_path / "redis"):
                record = await client.result(job_id)
                assert record.completion == undisturbed.completion and record.finish == undisturbed.finish
                assert worker.terminate() == 0, worker.log


async def tells(port: int, **gauges: float) -> bool | None:
    """Whether a worker's metrics say so of the long model, also when nothing happens any more."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return all(f'{name}{{model="long"}} {float(value)}' in lines for name, value in gauges.items()) or None


async def says(worker: WorkerProcess, words: str) -> bool | None:
    return words in worker.log or None
