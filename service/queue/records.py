"""How replies of the scripts become records: the only place that knows the fields of a job's hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.queue.job import Chunk, Completion, Finish, JobRecord, JobRequest, JobState, LeasedJob

ERROR_OF_CODE = {  # where the queue itself gave up; a worker says it in its own sentence
    "worker_lost": "Every worker that took this job stopped answering, so it is not tried again; change the request.",
    "model_changed": "The worker was lost in the middle of the answer and the model was replaced since; send it again.",
}

Entry = tuple[str, list[str]]
"""One entry of a token stream as Lua returns it: id, flat list of fields."""


def read_record(job_id: str, reply: Sequence[Any]) -> JobRecord | None:
    """Return the job that `read.lua` answered with, None where it knew none."""
    if not reply:
        return None
    flat_fields, standing, entries = reply
    fields = _pairs(flat_fields)
    state = JobState(fields["state"])
    position, eta_s = read_place(standing) if standing else (None, None)
    return JobRecord(
        id=job_id,
        state=state,
        request=JobRequest.from_json(fields["request"]),
        key=fields["key"],
        completion=join_chunks(read_chunks(entries)),
        finish=_finish(fields) if state.is_final else None,
        position=position,
        eta_s=eta_s,
        priority=int(fields["class"]),
        attempt=int(fields["attempt"]),
        worker=fields.get("worker"),
        revision=fields.get("revision"),
        cancel_on_disconnect=fields["watched"] == "1",
        created_ms=int(fields["created"]),
        deadline_ms=int(fields["deadline"]),
        started_ms=_optional_int(fields.get("started")),
        first_token_ms=_optional_int(fields.get("first_token")),
        finished_ms=_optional_int(fields.get("finished")),
        prefill_ms=float(fields["prefill_ms"]) if fields.get("prefill_ms") else None,
        cached_tokens=int(fields.get("cached_tokens") or 0),
        trace=fields["trace"] or None,
    )


def read_lease(reply: Sequence[Any]) -> LeasedJob:
    """Return the job that `next.lua` handed out."""
    job_id, attempt, request, trace, entries = reply
    chunks = tuple(chunk for _, chunk in read_chunks(entries))
    return LeasedJob(
        id=job_id,
        attempt=int(attempt),
        request=JobRequest.from_json(request),
        completion_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        chunks=chunks,
        trace=trace or None,
    )


def read_chunks(entries: Sequence[Entry]) -> list[tuple[int, Chunk]]:
    """Return the chunks among entries, each with the number of characters of text before it."""
    chunks = []
    for _, flat_fields in entries:
        fields = _pairs(flat_fields)
        if "c" in fields:
            chunks.append((int(fields["o"]), Chunk.from_json(fields["c"])))
    return chunks


def read_push(message: str) -> tuple[int, Chunk]:
    """Return a published chunk: the characters before it stand in front of its JSON."""
    start = message.index("[")
    return int(message[:start]), Chunk.from_json(message[start:])


def read_place(standing: Sequence[Any]) -> tuple[int, float | None]:
    """Return (position, estimated wait in s) from `place.lua`: the cost in front, at the speed last measured."""
    position, queued, queued_cost, speed = (float(part) for part in standing)
    if position == 0:
        return 0, 0.0
    if speed <= 0 or queued <= 0:
        return int(position), None
    return int(position), round(queued_cost * min(1.0, position / queued) / speed, 3)


def join_chunks(chunks: Sequence[tuple[int, Chunk]]) -> Completion:
    """Return the completion that chunks in order make up."""
    only_chunks = [chunk for _, chunk in chunks]
    logprobs = [entry for chunk in only_chunks for entry in chunk.logprobs or ()]
    return Completion(
        token_ids=tuple(token for chunk in only_chunks for token in chunk.token_ids),
        text="".join(chunk.text for chunk in only_chunks),
        logprobs=tuple(logprobs) if any(chunk.logprobs is not None for chunk in only_chunks) else None,
        prompt_scores=next((chunk.prompt_scores for chunk in only_chunks if chunk.prompt_scores is not None), None),
    )


def _finish(fields: dict[str, str]) -> Finish:
    code = fields.get("code") or None
    return Finish(
        reason=fields["reason"],  # type: ignore[arg-type]  # written from Finish.reason or one of its words in Lua
        stop_sequence=fields.get("stop_sequence") or None,
        error=fields.get("error") or (ERROR_OF_CODE[code] if code else None),
        code=code,
    )


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _optional_int(value: str | None) -> int | None:
    return int(value) if value is not None else None
