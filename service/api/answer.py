"""A job's record as clients see it: the object of the contract, and the error that a job without answer becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from service.api.errors import body_of
from service.api.models import Model
from service.errors import DeadlinePassed, JobCancelled, JobFailed, NotReady, RequestError
from service.queue.job import Chunk, Completion, JobRecord, JobState
from shared.scores import PromptScores

IMPOSSIBLE = -9999.0
"""Stands for the logarithm of zero, which JSON has no word for."""


def describe(record: JobRecord, model: Model | None) -> dict[str, Any]:
    """The object that the blocking call, the event `done` and `GET /jobs/ID` answer with."""
    request, completion, finish = record.request, record.completion, record.finish
    num_prompt, num_completion = len(request.prompt_ids), len(completion.token_ids)
    answer: dict[str, Any] = {
        "id": record.id,
        "model": request.model,
        "revision": record.revision,
        "status": record.state.value,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": finish.reason if finish else None,
        "stop_sequence": finish.stop_sequence if finish else None,
        "warnings": request.options.get("warnings", []),
        "seed": request.sampling["seed"],
        "parameters": request.options.get("parameters", {}),
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "cached_tokens": record.cached_tokens,
        },
        "timings": timings(record),
        "attempts": record.attempt,
    }
    if completion.logprobs is not None:
        answer["logprobs"] = describe_logprobs(completion.logprobs, model)
    if completion.prompt_scores is not None:
        answer["prompt_logprobs"] = describe_logprobs(prompt_entries(completion, request.prompt_ids), model)
    if record.state is JobState.QUEUED:
        answer |= {"position": record.position, "eta_s": record.eta_s}
    failure = failure_of(record)
    if failure is not None:
        answer |= body_of(failure)
    return answer


def timings(record: JobRecord) -> dict[str, float | None]:
    """Milliseconds between the server's time stamps; None where it did not come to that."""
    decode_ms = between(record.first_token_ms, record.finished_ms)
    later_tokens = len(record.completion.token_ids) - 1
    return {
        "queue_ms": between(record.created_ms, record.started_ms),
        "prefill_ms": record.prefill_ms,
        "decode_ms": decode_ms,
        "ttft_ms": between(record.created_ms, record.first_token_ms),
        "tokens_per_second": round(later_tokens / decode_ms * 1000, 2) if decode_ms and later_tokens > 0 else None,
    }


def between(start_ms: int | None, end_ms: int | None) -> int | None:
    return None if start_ms is None or end_ms is None else max(0, end_ms - start_ms)


def failure_of(record: JobRecord) -> RequestError | None:
    """Return what a failed job is answered with; None for every other."""
    if record.finish is None or record.finish.reason != "error":
        return None
    message = record.finish.error or "The job failed; the worker's log says why."
    if record.finish.code == "model_changed":  # the same request will find the new model
        return NotReady(message, code="model_changed", retry_after_s=1.0)
    return JobFailed(message, code=record.finish.code)


def cut_short(record: JobRecord) -> RequestError | None:
    """Return the error for a job that did not end by itself; OpenAI's words know no other way to say so."""
    reason = record.finish.reason if record.finish else None
    kept = f"what there is stands at GET /jobs/{record.id}."
    if reason == "deadline":
        timeout_s = (record.deadline_ms - record.created_ms) / 1000
        return DeadlinePassed(f"The answer was not complete within timeout_s, {timeout_s:g} s; {kept}")
    if reason == "cancelled":
        return JobCancelled(f"The job was cancelled; {kept}")
    return failure_of(record)


def describe_chunk(chunk: Chunk, model: Model | None) -> dict[str, Any]:
    """The data of an event `token`."""
    data: dict[str, Any] = {"index": chunk.first_index, "text": chunk.text, "token_ids": chunk.token_ids}
    if chunk.logprobs is not None:
        data["logprobs"] = describe_logprobs(chunk.logprobs, model)
    return data


def prompt_entries(scored: Chunk | Completion, prompt_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return a prompt's tokens as entries like those of drawn ones; none where it was not scored."""
    text = scored.prompt_scores
    return [] if text is None else PromptScores.from_text(text).entries(prompt_ids)


def describe_logprobs(entries: Sequence[dict[str, Any]], model: Model | None) -> list[dict[str, Any]]:
    """Per token its log-probability and the likeliest alternatives, each with its text where the model is known."""
    return [
        {
            **describe_token(entry["token_id"], entry["logprob"], model),
            "top": [describe_token(token_id, logprob, model) for token_id, logprob in entry["top"]],
        }
        for entry in entries
    ]


def describe_token(token_id: int, logprob: float | None, model: Model | None) -> dict[str, Any]:
    token: dict[str, Any] = {"token_id": token_id, "logprob": finite(logprob)}
    if model is not None:
        token["token"] = bytes_of(token_id, model).decode("utf-8", "replace")
    return token


def bytes_of(token_id: int, model: Model) -> bytes:
    """The bytes a token stands for; none for an id that only pads the vocabulary."""
    table = model.tokenizer.bytes_of_tokens
    return table[token_id] if token_id < len(table) else b""


def finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else IMPOSSIBLE
