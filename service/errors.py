"""What the service refuses, as one tree; `api/errors.py` turns each leaf into one status and one JSON shape.

RequestError                    base: status, type, code, and the field at fault where there is one
├── MalformedRequest    400     not JSON, wrong shape
├── InvalidApiKey       401     a key is asked for and this one is missing or wrong
├── NotFound            404     no such model, job, run or route
├── MethodNotAllowed    405     the route knows other methods
├── SlowRequest         408     headers or body took too long to arrive
├── DeadlinePassed      408     the job's timeout_s passed before it ended (/v1 only: others answer with the job)
├── IdempotencyConflict 409     the same Idempotency-Key with another body
├── JobCancelled        409     somebody cancelled the job (/v1 only: others answer with the job)
├── BodyTooLarge        413     more bytes than the service reads
├── HeadersTooLarge     431     more bytes of address and headers than the service reads
├── InvalidValue        422     a field whose value cannot be served
├── QueueFull           429     the bounded queue (or this key's share of it) is full; carries retry_after_s
├── JobFailed           500     an accepted job could not be served
├── InternalError       500     a bug of ours; the log has it under the same x-request-id
└── NotReady            503     no live worker, Redis away or out of memory; carries retry_after_s
"""

from __future__ import annotations

from typing import ClassVar

from shared.errors import SmolLMError


class RequestError(SmolLMError):
    """Base of every refusal; the message is one sentence: what, the value, what to do."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str] = "malformed_request"
    is_worth_retrying: ClassVar[bool] = True
    """False tells clients that repeat 408, 409 and 5xx by themselves (OpenAI's do) not to."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code_name = code or self.code
        self.retry_after_s = retry_after_s


class MalformedRequest(RequestError):
    """Not JSON, or not of the shape the route reads."""


class InvalidApiKey(RequestError):
    """A key is asked for and this one is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(RequestError):
    """No such model, job, run or route."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class MethodNotAllowed(RequestError):
    """The route knows other methods."""

    status = 405
    code = "method_not_allowed"


class SlowRequest(RequestError):
    """Headers or body took too long to arrive."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class DeadlinePassed(RequestError):
    """The job's `timeout_s` passed before it ended."""

    status = 408
    type = "timeout_error"
    code = "deadline"
    is_worth_retrying = False


class IdempotencyConflict(RequestError):
    """The same Idempotency-Key came with another body."""

    status = 409
    type = "conflict_error"
    code = "idempotency_conflict"
    is_worth_retrying = False


class JobCancelled(RequestError):
    """Somebody cancelled the job while this client waited for it."""

    status = 409
    type = "conflict_error"
    code = "cancelled"
    is_worth_retrying = False


class BodyTooLarge(RequestError):
    """More bytes than the service reads."""

    status = 413
    code = "body_too_large"


class HeadersTooLarge(RequestError):
    """More bytes of address and headers than the service reads."""

    status = 431
    code = "headers_too_large"


class InvalidValue(RequestError):
    """A field whose value cannot be served."""

    status = 422
    code = "invalid_value"


class QueueFull(RequestError):
    """The bounded queue, or this key's share of it, is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class JobFailed(RequestError):
    """An accepted job could not be served."""

    status = 500
    type = "server_error"
    code = "job_failed"
    is_worth_retrying = False


class InternalError(RequestError):
    """A bug of ours."""

    status = 500
    type = "server_error"
    code = "internal_error"


class NotReady(RequestError):
    """No live worker for the model, or Redis is away or out of memory."""

    status = 503
    type = "unavailable_error"
    code = "not_ready"
