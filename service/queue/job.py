"""What travels through the queue: a job's request, its state, what a worker leases and what a client reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, get_args

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)


class JobState(StrEnum):
    """Where a job is; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """Everything a worker needs to produce the same completion on any machine: token ids and a resolved seed."""

    model: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: dict[str, Any]
    """The fields of `shared.sampling.SamplingParams`, seed resolved."""
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """How many alternatives to report beside each token's own log-probability; None reports nothing."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the engine takes beside it (`ignore_eos`, `stop_token_ids`, `grammar`, `scores_prompt`), the
    `tokenizer_sha256` of the model's folder whose ids these are, and what only the API reads again, for its answer:
    warnings, the client's own parameters."""

    @property
    def cost(self) -> int:
        """Tokens this job may occupy in a worker: prompt and completion."""
        return len(self.prompt_ids) + self.max_new_tokens

    def to_json(self) -> str:
        return json.dumps(vars(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> JobRequest:
        values = json.loads(text)
        return cls(**{**values, "prompt_ids": tuple(values["prompt_ids"]), "stop": tuple(values["stop"])})


@dataclass(frozen=True, kw_only=True)
class LeasedJob:
    """A job in a worker's hands: valid while its attempt is the newest and its lease is renewed."""

    id: str
    attempt: int
    request: JobRequest
    completion_ids: tuple[int, ...] = ()
    """Tokens an earlier attempt already delivered; this attempt goes on behind them."""
    chunks: tuple[Chunk, ...] = ()
    """The same, as they were delivered: sent again if a restarted Redis lost them."""
    trace: str | None = None
    """The client's W3C traceparent."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens [first_index, first_index + len(token_ids)) of a completion and the text they released.

    Text may be shorter than its tokens (held back while half a character or half a stop string) or longer. Text that
    is left when a completion ends without a further token travels with no token, and only in the last chunk. Where
    the prompt is scored, the last chunk may hold one more of `logprobs` than tokens: the end token's.
    """

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[dict[str, Any], ...] | None = None
    prompt_scores: str | None = None
    """`shared.scores.PromptScores` as text, in a job's first chunk alone, so that they come once, as its tokens do."""

    @property
    def is_empty(self) -> bool:
        return not (self.token_ids or self.text or self.logprobs or self.prompt_scores)

    @property
    def end_index(self) -> int:
        return self.first_index + len(self.token_ids)

    @property
    def cursor(self) -> int:
        """What a reader passes as `after` to go on behind it (the SSE id): its end, one more if it has no token."""
        return self.end_index if self.token_ids else self.end_index + 1

    def to_json(self) -> str:
        values: list[Any] = [self.first_index, self.token_ids, self.text]
        if self.logprobs is not None or self.prompt_scores is not None:
            values.append(self.logprobs)
        if self.prompt_scores is not None:
            values.append(self.prompt_scores)
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Chunk:
        first_index, token_ids, chunk_text, *scores = json.loads(text)
        logprobs, prompt_scores = [*scores, None, None][:2]
        return cls(
            first_index=first_index,
            token_ids=tuple(token_ids),
            text=chunk_text,
            logprobs=None if logprobs is None else tuple(logprobs),
            prompt_scores=prompt_scores,
        )


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How a completion ended."""

    reason: FinishReason
    stop_sequence: str | None = None
    error: str | None = None
    """One sentence for the client, where the reason is "error"."""
    code: str | None = None
    """"worker_lost" or "model_changed", where that is why; None where only the sentence says it."""


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """What the queue takes and how long it keeps it; the fields of `service.settings.Settings` of the same names."""

    max_queued_jobs: int = 256
    max_queued_tokens: int = 400_000
    result_ttl_s: float = 600.0
    lease_ms: int = 4_000
    max_attempts: int = 3


@dataclass(frozen=True, kw_only=True)
class Admission:
    """An accepted job."""

    id: str
    position: int
    """1 is next; 0 means that it is already running or done (an idempotent request met again)."""
    eta_s: float | None
    """Estimated wait; None before the model's speed was measured."""
    is_new: bool


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Everything delivered so far."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[dict[str, Any], ...] | None = None
    prompt_scores: str | None = None


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job as it stands in Redis; times are the server's, in milliseconds since 1970."""

    id: str
    state: JobState
    request: JobRequest
    key: str
    """Whose it is, as `JobQueue.admit` was told."""
    completion: Completion
    finish: Finish | None
    """Set when the state is final."""
    position: int | None
    """1 is next; None unless queued."""
    eta_s: float | None
    priority: int
    attempt: int
    """How many times a worker took it."""
    worker: str | None
    revision: str | None
    """sha256 of the weights that answer it."""
    cancel_on_disconnect: bool
    created_ms: int
    deadline_ms: int
    started_ms: int | None
    first_token_ms: int | None
    finished_ms: int | None
    prefill_ms: float | None
    """As the worker measured it."""
    cached_tokens: int
    """Prompt tokens that the worker had computed for another job already."""
    trace: str | None


@dataclass(frozen=True, kw_only=True)
class QueuedEvent:
    """What a reader is told while a job waits."""

    position: int
    eta_s: float | None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The last thing a reader is told."""

    record: JobRecord


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What a worker says about itself every few seconds."""

    id: str
    models: dict[str, str]
    """Name to revision of the models whose jobs it takes."""
    tokenizers: dict[str, str] = field(default_factory=dict)
    """Name to `ModelFolder.tokenizer_sha256` of the same; empty where an older version says nothing of it."""
    slots: int
    free: int
    device: str
    dtype: str
    draining: bool = False
    age_ms: int = 0
    """Milliseconds since it last said so; filled in when read."""
    details: dict[str, Any] = field(default_factory=dict)
    """Anything more for people: tokens per second, cached tokens, versions."""

    @classmethod
    def from_json(cls, text: str | bytes, *, age_ms: int) -> WorkerInfo:
        """Read what a worker of any version said; what this one does not know is passed over."""
        known = {name: value for name, value in json.loads(text).items() if name in cls.__dataclass_fields__}
        return cls(**{**known, "age_ms": age_ms})


@dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """One model's queue at one instant."""

    queued: int = 0
    queued_cost: int = 0
    running: int = 0
    running_cost: int = 0
    tokens_per_second: float | None = None
    """Measured cost (prompt + max_new_tokens) served per second by all workers; None before the first job ended."""
    workers: int = 0
    """Live workers that take its jobs."""


class Verdict(StrEnum):
    """Redis' answer to a worker's write."""

    OK = "ok"
    FENCED = "fenced"
    """Another attempt holds the job, or it ended: drop the sequence, write nothing more."""
    CANCEL = "cancel"
    """The client is gone or asked to stop, or the deadline passed; the job is closed: drop the sequence."""
    GAP = "gap"
    """Redis lost a write (restart): send again from the index it names."""
