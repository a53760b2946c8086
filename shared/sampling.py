"""From the scores of the next token to one token: masks, bias, penalties, temperature, filters, one draw per row.

The meaning of every parameter is that of transformers' logits processors and vLLM. The draw is a function of
(seed, index of the token) alone: a row gives the same token in any batch, on any worker, after any restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shared.device_drawing import choose_on_device
from shared.drawing import Bits, Candidates, Draw, Scores, check_numbers, draw_all
from shared.errors import GenerationError
from shared.score_changes import allowed_ids, change_scores
from shared.uniform import uniform

GREEDY_BELOW = 1e-5
"""Temperatures under this leave one token in any case, and would divide by zero in fp32. vLLM's limit."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. The defaults draw from the model's own distribution."""

    temperature: float = 1.0
    """0 is greedy: always the likeliest token; so is anything below `GREEDY_BELOW`."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach p; 1 is off."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive scores of tokens seen in prompt or completion, multiplies negative ones; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the score of every token seen in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's score once for each time it stands in the completion."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the scores of these token ids; -100 as good as bans one."""
    min_tokens: int = 0
    """Tokens before which nothing ends the completion: end tokens are barred, stop strings are passed over."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(0.0 <= self.temperature < math.inf, "temperature", self.temperature, "a number of 0 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1 (off)")
        require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 (off) to 1")
        require(0.0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, "from -2 to 2")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, "from -2 to 2")
        require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 (off) or more")
        require(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to 2**64 - 1")
        # JSON knows no whole numbers as names: what travelled through the queue comes back with texts.
        object.__setattr__(self, "logit_bias", {int(token): bias for token, bias in self.logit_bias.items()})
        for token_id, bias in self.logit_bias.items():
            require(-100.0 <= bias <= 100.0, f"logit_bias of token {token_id}", bias, "from -100 to 100")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check_ids(self, vocab_size: int) -> None:
        """Refuse a bias on a token that the model does not have.

        Raises:
            GenerationError: it names the id.
        """
        for token_id in self.logit_bias:
            require(0 <= token_id < vocab_size, "a token id of logit_bias", token_id, f"from 0 to {vocab_size - 1}")


def require(holds: bool, name: str, value: float, expected: str) -> None:
    if not holds:
        raise GenerationError(f"{name} is {value}; it must be {expected}")


class Constraint(Protocol):
    """What may come next where not every token may: a grammar, say."""

    def allowed(self) -> Bits:
        """Return which ids may come next; those beyond may not."""


@dataclass(slots=True)
class SamplingRow:
    """One sequence at the moment its next token is drawn."""

    params: SamplingParams
    prompt_ids: Sequence[int] = ()
    completion_ids: Sequence[int] = field(default_factory=list)
    end_token_ids: Sequence[int] = ()
    """What ends the completion, and so is barred from the first `min_tokens` tokens."""
    constraint: Constraint | None = None

    @property
    def index(self) -> int:
        """Place in the completion of the token to be drawn."""
        return len(self.completion_ids)

    @property
    def must_go_on(self) -> bool:
        """Whether the completion may not end yet."""
        return self.index < self.params.min_tokens and bool(self.end_token_ids)

    @property
    def changes_scores(self) -> bool:
        """Whether the token is drawn from other scores than the model's own."""
        return self.params.has_penalties or bool(self.params.logit_bias)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn; log-probabilities are the model's own, before penalties and temperature."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(
    logits_BV: Tensor,
    rows: Sequence[SamplingRow],
    *,
    places: Sequence[int] | None = None,
    logprobs: Sequence[int | None] | None = None,
    draw: Draw | None = None,
) -> list[SampledToken]:
    """Draw one token per row.

    Args:
        logits_BV: scores (B, V) of any float dtype, on any device. Not changed.
        rows: what each token is drawn for.
        places: per row, where its scores stand among the B; one after another unless given.
        logprobs: per row, how many likeliest tokens to report beside the drawn one's log-probability; None for none.
        draw: a faster `draw_all`, for scores that are not on a GPU: that draws by itself.

    Raises:
        WeightsError: the scores are not numbers, which only damaged weights give.
    """
    places = range(len(logits_BV)) if places is None else places
    assert logits_BV.dim() == 2 and len(places) == len(rows), (logits_BV.shape, places, len(rows))
    if not rows:
        return []
    if logits_BV.device.type == "cuda":
        token_ids = choose_on_device(logits_BV, rows, places)
    else:
        token_ids = choose_on_cpu(logits_BV, rows, places, draw or draw_all)
    if logprobs is None or all(count is None for count in logprobs):
        return [SampledToken(token_id) for token_id in token_ids]
    return with_logprobs(logits_BV, token_ids, logprobs, places)


def choose_on_cpu(logits_BV: Tensor, rows: Sequence[SamplingRow], places: Sequence[int], draw: Draw) -> list[int]:
    """Choose each row's token. Scores are copied where a request changes them, and nowhere else."""
    token_ids = [-1] * len(rows)
    drawn: dict[int, Candidates] = {}  # by number of the row
    for number, (place, row) in enumerate(zip(places, rows, strict=True)):
        candidates = candidates_of(floats(logits_BV[place]), row)
        if row.params.is_greedy:
            token_ids[number] = greedy(candidates.barred())
        else:
            drawn[number] = candidates
    params = [rows[number].params for number in drawn]
    quantiles = [uniform(rows[number].params.seed, rows[number].index) for number in drawn]
    for number, token_id in zip(drawn, draw([*drawn.values()], params, quantiles), strict=True):
        token_ids[number] = token_id
    return token_ids


def floats(logits_V: Tensor) -> Scores:
    """See one row's scores as fp32, copied only where they are not.

    What torch copies of this length it shares between threads, and then they spin for a while, waiting for more, on the
    cores that the next step needs.
    """
    numbers: Scores = logits_V.detach().float().cpu().numpy()
    return numbers


def candidates_of(scores_V: Scores, row: SamplingRow) -> Candidates:
    """Return what a row's token is drawn from."""
    if row.changes_scores:
        scores_V = scores_V.copy()
        change_scores(scores_V, row)
    return Candidates(scores_V, allowed_ids(row, len(scores_V)))


def greedy(scores_V: Scores) -> int:
    """Return the likeliest token, the first of equals.

    NumPy's search is 15 times as fast as torch's in bfloat16, and a row at a time, which stays in the cache, 3 times as
    fast as all at once.
    """
    best = int(scores_V.argmax())  # NaN counts as largest
    check_numbers(bool(np.isfinite(scores_V[best])))
    return best


def with_logprobs(
    logits_BV: Tensor, token_ids: Sequence[int], counts: Sequence[int | None], places: Sequence[int]
) -> list[SampledToken]:
    """Attach log-probabilities of the raw scores to the rows that ask for them."""
    tokens = [SampledToken(token_id) for token_id in token_ids]
    asked = [number for number, count in enumerate(counts) if count is not None]
    most = max(counts[number] or 0 for number in asked)
    rated = log_probabilities(
        logits_BV[[places[number] for number in asked]], [token_ids[number] for number in asked], most
    )
    for number, logprob, best_ids, best_values in zip(asked, *(part.tolist() for part in rated), strict=True):
        count = counts[number] or 0
        tokens[number] = SampledToken(
            token_ids[number], logprob, tuple(zip(best_ids[:count], best_values[:count], strict=True))
        )
    return tokens


def log_probabilities(logits_BV: Tensor, token_ids: Sequence[int], num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's log-probability of its token (B), and its likeliest: their ids (B, K), their values (B, K).

    In fp32, of the raw scores; K is `num_top`, or V where that is less. A token that is the likeliest has the very
    number that stands there for it.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float(), dim=-1)
    best = logprobs_BV.topk(min(num_top, logits_BV.shape[1]), dim=-1)
    chosen_B = logprobs_BV.gather(1, torch.tensor(token_ids, device=logits_BV.device).unsqueeze(1)).squeeze(1)
    return chosen_B, best.indices, best.values
