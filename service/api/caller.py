"""Who asks, and what the headers say about how: keys, idempotency, trace, stream or async."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import State

from service.api.state import state_of
from service.api_keys import ANYBODY, ApiKey, find_key
from service.errors import InvalidApiKey, InvalidValue

MAX_IDEMPOTENCY_KEY = 255
MAX_CURSOR_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Caller:
    """One request's headers, understood."""

    api_key: ApiKey
    """Whose jobs these are, and what they may cost."""
    idempotency_key: str | None
    state: State
    """The request's own, which `Boundary` logs."""
    wants_stream: bool
    wants_async: bool

    @property
    def key(self) -> str:
        """Whose jobs these are: the beginning of the key's hash, "" where none is asked for."""
        return self.api_key.id

    @property
    def trace(self) -> str:
        """The traceparent that the request's jobs carry."""
        trace: str = self.state.trace
        return trace

    def note_job(self, job_id: str) -> None:
        self.state.job = job_id


async def identify(request: Request) -> Caller:
    """Check the API key and read the headers. (Not async, it would cost a thread's hand-over per request.)

    Raises:
        InvalidApiKey: keys are asked for, and this one is missing or wrong.
        InvalidValue: the Idempotency-Key is none.
    """
    headers = request.headers
    api_key = _check_key(request, headers.get("authorization", ""))
    idempotency_key = headers.get("idempotency-key")
    if idempotency_key is not None and not (
        0 < len(idempotency_key) <= MAX_IDEMPOTENCY_KEY and idempotency_key.isascii() and idempotency_key.isprintable()
    ):
        raise InvalidValue(
            f"Idempotency-Key must be 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters.", param="Idempotency-Key"
        )
    preferences = {part.strip().partition(";")[0].lower() for part in headers.get("prefer", "").split(",")}
    return Caller(
        api_key=api_key,
        idempotency_key=idempotency_key,
        state=request.state,
        wants_stream="text/event-stream" in headers.get("accept", "").lower(),
        wants_async="respond-async" in preferences,
    )


CallerDep = Annotated[Caller, Depends(identify)]


def _check_key(request: Request, authorization: str) -> ApiKey:
    keys = state_of(request).key_ring.keys
    if not keys:
        return ANYBODY
    scheme, _, presented = authorization.partition(" ")
    found = find_key(keys, presented.strip())
    if found is None or scheme.lower() != "bearer":
        raise InvalidApiKey("The API key is missing or wrong; send `Authorization: Bearer KEY`.")
    request.state.key = found.id
    return found


def read_cursor(request: Request) -> int:
    """Return the index a stream goes on behind: `Last-Event-ID`, which reconnecting browsers add, else `?after=`."""
    for name, value in (
        ("Last-Event-ID", request.headers.get("last-event-id")),
        ("after", request.query_params.get("after")),
    ):
        if value:
            if not (value.isascii() and value.isdecimal() and len(value) <= MAX_CURSOR_DIGITS):
                raise InvalidValue(f"{name} must be the id of an event of this stream, a number from 0.", param=name)
            return int(value)
    return 0
