"""How completions and chat completions differ on the wire: names, choices, deltas, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.api.answer import bytes_of, finite
from service.api.models import Model
from service.queue.job import JobRecord
from shared.stream_decoder import StreamDecoder

Entries = Sequence[dict[str, Any]]
"""A job's log-probabilities as the worker wrote them."""


@dataclass
class Text:
    """Where a choice's text stands, token by token."""

    decoder: StreamDecoder
    length: int = 0

    def push(self, token_id: int) -> int:
        """Take a token; return the characters before it."""
        before = self.length
        self.length += len(self.decoder.push(token_id))
        return before


@dataclass(frozen=True, kw_only=True)
class Shape:
    id_prefix: str
    object: str
    chunk_object: str
    content: Callable[[str], dict[str, Any]]
    """A choice's whole text."""
    delta: Callable[[str], dict[str, Any]]
    first_delta: Callable[[str], dict[str, Any]]
    logprobs: Callable[[Entries | None, Model, Text], dict[str, Any] | None]
    """Arguments: entries, their model, the choice's text before them, which they move on."""


def usage_of(records: Sequence[JobRecord], num_choices: int) -> dict[str, Any]:
    """Tokens of one request; a prompt counts once, however many choices it has."""
    num_prompt = sum(len(record.request.prompt_ids) for record in records[::num_choices])
    num_completion = sum(len(record.completion.token_ids) for record in records)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(record.cached_tokens for record in records[::num_choices])},
    }


def name_of(token_id: int, model: Model) -> str:
    """A token's text; one that is no text alone is named by its bytes, as OpenAI does."""
    raw = bytes_of(token_id, model)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(entries: Entries | None, model: Model, text: Text) -> dict[str, Any] | None:
    if entries is None:
        return None
    return {
        "tokens": [name_of(entry["token_id"], model) for entry in entries],
        "token_logprobs": [finite(entry["logprob"]) for entry in entries],
        "top_logprobs": [likeliest(entry, model) for entry in entries],
        "text_offset": [text.push(entry["token_id"]) for entry in entries],
    }


def likeliest(entry: dict[str, Any], model: Model) -> dict[str, Any] | None:
    """The alternatives of a token and the token itself, as OpenAI does; None for a prompt's first, which has none."""
    if entry["logprob"] is None:
        return None
    pairs = [*entry["top"], (entry["token_id"], entry["logprob"])]
    return {name_of(token_id, model): finite(logprob) for token_id, logprob in pairs}


def joined(prompt: dict[str, Any] | None, drawn: dict[str, Any] | None) -> dict[str, Any] | None:
    """A completion's log-probabilities behind its prompt's, as far as there are any."""
    if prompt is None or drawn is None:
        return drawn if prompt is None else prompt
    return {name: [*prompt[name], *drawn[name]] for name in prompt}


def chat_logprobs(entries: Entries | None, model: Model, text: Text) -> dict[str, Any] | None:  # noqa: ARG001
    if entries is None:
        return None

    def describe(token_id: int, logprob: float) -> dict[str, Any]:
        raw = bytes_of(token_id, model)
        return {"token": name_of(token_id, model), "logprob": finite(logprob), "bytes": list(raw)}

    content = [
        {
            **describe(entry["token_id"], entry["logprob"]),
            "top_logprobs": [describe(token_id, logprob) for token_id, logprob in entry["top"]],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


COMPLETION = Shape(
    id_prefix="cmpl-",
    object="text_completion",
    chunk_object="text_completion",
    content=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    first_delta=lambda text: {"text": text},
    logprobs=completion_logprobs,
)

CHAT = Shape(
    id_prefix="chatcmpl-",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    content=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    delta=lambda text: {"delta": {"content": text} if text else {}},
    first_delta=lambda text: {"delta": {"role": "assistant", "content": text}},
    logprobs=chat_logprobs,
)
