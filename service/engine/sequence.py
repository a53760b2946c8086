"""A job's tokens in the engine: what was given, what was drawn so far, and how much of it the cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from service.engine.drafting import Drafter
from service.engine.stopping import Released, Stopping
from shared.grammar import Grammar
from shared.sampling import SamplingParams, SamplingRow, require
from shared.scores import PromptScores
from shared.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "error"]


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One request while the engine works on it. The first block is the caller's, the second the engine's."""

    id: str
    prompt_ids: Ids[int]
    params: SamplingParams
    max_new_tokens: int
    """The engine lowers it to what the model's context and the cache leave."""
    stop: Ids[str] = ()
    logprobs: int | None = None
    """How many likeliest tokens to report beside each drawn one's log-probability; None reports nothing."""
    scores_prompt: bool = False
    """Whether to report the same of the prompt's tokens, and of the end token that ends the completion."""
    completion_ids: list[int] = field(default_factory=list)
    """What an earlier attempt already delivered: the engine goes on behind it."""
    end_token_ids: Ids[int] = ()
    """The model's own; `ignore_eos` passes them over."""
    ignore_eos: bool = False
    stop_token_ids: Ids[int] = ()
    """The request's own: they end the completion as well, and are not part of it."""
    grammar: str | None = None
    """What the completion must be, as `shared.grammar` writes it."""

    slot: int | None = None
    num_cached: int = 0
    """Tokens, from the first on, whose keys and values stand in the slot."""
    num_shared: int = 0
    """How many of them were copied from another sequence's."""
    is_following: bool = False
    """Whether it waits for another sequence that is computing the same beginning."""
    prompt_scores: list[PromptScores] | None = field(init=False, default=None)
    """Those of the pieces of the prompt computed so far, until the first output takes them along; None: not wanted."""
    stopping: Stopping = field(init=False)
    rules: Grammar | None = field(init=False, default=None)
    """The grammar, standing behind the completion so far."""
    drafter: Drafter | None = field(init=False, default=None)
    row: SamplingRow = field(init=False)
    started_s: float | None = None
    """Of a monotonic clock: when its first chunk was computed; `first_token_s` when a token was first drawn here."""
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.completion_ids = list(self.completion_ids)
        if self.scores_prompt and not self.completion_ids:  # else they were delivered with the first token
            self.prompt_scores = []
        self.row = SamplingRow(self.params, self.prompt_ids, self.completion_ids)

    def check_ids(self, vocab_size: int) -> None:
        """Refuse ids beside the prompt's that the model does not have.

        Raises:
            GenerationError: it names the id.
        """
        self.params.check_ids(vocab_size)
        for what, token_ids in (("an end token", self.end_token_ids), ("a stop token", self.stop_token_ids)):
            for token_id in token_ids:
                require(0 <= token_id < vocab_size, what, token_id, f"from 0 to {vocab_size - 1}")

    def prepare(self, tokenizer: Tokenizer) -> Released:
        """Stand behind what an earlier attempt delivered, with its text; return what the last of that brought.

        Raises:
            GenerationError: the grammar is wrong.
        """
        ends = [*(() if self.ignore_eos else self.end_token_ids), *self.stop_token_ids]
        self.rules = None if self.grammar is None else Grammar(self.grammar, tokenizer, end_token_ids=ends)
        self.row.end_token_ids, self.row.constraint = ends, self.rules
        self.stopping = Stopping(
            tokenizer.stream_decoder(),
            stop=self.stop,
            end_token_ids=ends,
            max_new_tokens=self.max_new_tokens,
            min_tokens=self.params.min_tokens,
            grammar=self.rules,
        )
        released = self.stopping.start()
        for token_id in self.completion_ids:
            if released.ended is None:
                released = self.stopping.push(token_id)
        return released

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_missing(self) -> int:
        """Tokens to compute before the next one can be drawn: 1 while decoding."""
        return self.num_tokens - self.num_cached

    @property
    def cost(self) -> int:
        """Tokens it may come to occupy in the cache."""
        return len(self.prompt_ids) + self.max_new_tokens

    def tokens(self, start: int, count: int) -> list[int]:
        """Return `count` ids of prompt and completion from `start` on."""
        border = len(self.prompt_ids)
        if start >= border:
            return self.completion_ids[start - border : start - border + count]
        ids = list(self.prompt_ids[start : start + count])
        return ids + self.completion_ids[: count - len(ids)]

    @property
    def num_top(self) -> int:
        """Likeliest tokens reported beside a log-probability."""
        return self.logprobs or 0

    def take_prompt_scores(self) -> PromptScores | None:
        """Return the prompt's scores, once."""
        parts, self.prompt_scores = self.prompt_scores, None
        return None if parts is None else PromptScores.join(parts, self.num_top)

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds until the first token drawn here, and from there to the last; prompt tokens that were copied."""
        if self.started_s is None or self.first_token_s is None or self.last_token_s is None:
            return {}
        return {
            "prefill_ms": round(1000 * (self.first_token_s - self.started_s), 3),
            "decode_ms": round(1000 * (self.last_token_s - self.first_token_s), 3),
            "cached_tokens": min(self.num_shared, len(self.prompt_ids)),
        }


class Output(NamedTuple):
    """What one step brought one sequence: usually one token, none where it ended without a further one."""

    sequence_id: str
    first_index: int
    """Place of the first of `token_ids` in the completion."""
    token_ids: tuple[int, ...]
    text: str
    """What became certain: shorter than the tokens' own text while half a character or stop string is held back."""
    logprobs: tuple[dict[str, Any], ...] | None = None
    """One per token: {"token_id", "logprob", "top": [[token id, logprob], ...]}; where the prompt is scored, one more
    for the end token."""
    prompt_scores: PromptScores | None = None
    """Of the whole prompt, where wanted; a sequence's first output has them, whatever else it brings."""
    finish_reason: FinishReason | None = None
    stop_sequence: str | None = None
    error: str | None = None
    """One sentence, with the finish reason "error"."""
    timings: Mapping[str, float] = MappingProxyType({})
    """Filled in with the finish reason."""
