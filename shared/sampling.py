"""From the scores of the next token to one token: masks, bias, penalties, temperature, filters, one draw per row.

The meaning of every parameter is that of transformers' logits processors and vLLM. The draw is a function of
(seed, index of the token) alone: a row gives the same token in any batch, on any worker, after any restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import GenerationError, WeightsError
from shared.uniform import uniform

GREEDY_BELOW = 1e-5
"""Temperatures under this leave one token in any case, and would divide by zero in fp32. vLLM's limit."""

BITS_OF_ONE = 0x3F80_0000
BUCKET_SHIFT = 19
"""Drops all but 4 bits of a float's mantissa: 16 buckets for each halving of the weight."""

BLOCK = 256
"""Weights are summed in blocks of this many: only the block that holds the quantile is walked one by one."""


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

    def allowed(self) -> NDArray[np.bool_]:
        """Return which of the first ids may come next; ids beyond may not."""


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
    def changes_scores(self) -> bool:
        """Whether the token is drawn from other scores than the model's own."""
        params = self.params
        return (
            params.has_penalties
            or bool(params.logit_bias)
            or self.constraint is not None
            or self.index < params.min_tokens
        )

    @property
    def is_plain(self) -> bool:
        """Whether the token is the likeliest by the model's own scores."""
        return self.params.is_greedy and not self.changes_scores


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn; log-probabilities are the model's own, before penalties and temperature."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


Scores = NDArray[np.float32]

Draw = Callable[[Sequence[Scores], Sequence[SamplingParams], Sequence[float]], list[int]]
"""Draws a token from each row's scores (V,), by its parameters, with a number in [0, 1). Changes nothing."""


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
        draw: a faster `draw_all`.

    Raises:
        WeightsError: the scores are not numbers, which only damaged weights give.
    """
    places = range(len(logits_BV)) if places is None else places
    assert logits_BV.dim() == 2 and len(places) == len(rows), (logits_BV.shape, places, len(rows))
    if not rows:
        return []
    token_ids = [0] * len(rows)
    plain = [number for number, row in enumerate(rows) if row.is_plain]
    others = [number for number, row in enumerate(rows) if not row.is_plain]
    for number, token_id in zip(plain, likeliest(logits_BV, [places[number] for number in plain]), strict=True):
        token_ids[number] = token_id
    scores = read_scores(logits_BV, [places[number] for number in others])
    chosen = choose(scores, [rows[number] for number in others], draw or draw_all)
    for number, token_id in zip(others, chosen, strict=True):
        token_ids[number] = token_id
    if logprobs is None or all(count is None for count in logprobs):
        return [SampledToken(token_id) for token_id in token_ids]
    return with_logprobs(logits_BV, token_ids, logprobs, places)


def read_scores(logits_BV: Tensor, places: Sequence[int]) -> list[Scores]:
    """Return rows as fp32 vectors on the CPU, in the caller's own memory where they are so: from a GPU in one copy."""
    if logits_BV.device.type == "cpu":
        return [floats(logits_BV[place]) for place in places]
    return list(logits_BV[list(places)].to("cpu", torch.float32).numpy()) if places else []


def floats(logits_V: Tensor) -> Scores:
    """See one row's scores on a CPU as fp32, copied only where they are not.

    What torch copies of this length it shares between threads, and then they spin for a while, waiting for more, on the
    cores that the next step needs.
    """
    numbers: Scores = logits_V.detach().float().numpy()
    return numbers


def likeliest(logits_BV: Tensor, places: Sequence[int]) -> list[int]:
    """Return the likeliest token of each row named, the first of equals.

    On a GPU the ids alone leave the device. On a CPU NumPy's search is 15 times as fast as torch's in bfloat16, and a
    row at a time, which stays in the cache, 3 times as fast as all at once.
    """
    if not places:
        return []
    if logits_BV.device.type == "cpu":
        return [greedy(floats(logits_BV[place])) for place in places]
    best = (logits_BV if [*places] == [*range(len(logits_BV))] else logits_BV[[*places]]).max(dim=-1)
    ids = best.indices.masked_fill(~best.values.isfinite(), -1).tolist()
    check_numbers(min(ids) >= 0)
    return ids


def check_numbers(are_numbers: bool) -> None:
    if not are_numbers:
        raise WeightsError("the model's scores are not numbers; its weights are damaged, export or download them again")


def choose(scores: Sequence[Scores], rows: Sequence[SamplingRow], draw: Draw) -> list[int]:
    """Choose each row's token."""
    scores = [adjusted(scores_V, row) for scores_V, row in zip(scores, rows, strict=True)]
    token_ids = [greedy(scores_V) if row.params.is_greedy else -1 for scores_V, row in zip(scores, rows, strict=True)]
    drawn = [number for number, row in enumerate(rows) if not row.params.is_greedy]
    params = [rows[number].params for number in drawn]
    quantiles = [uniform(rows[number].params.seed, rows[number].index) for number in drawn]
    for number, token_id in zip(drawn, draw([scores[number] for number in drawn], params, quantiles), strict=True):
        token_ids[number] = token_id
    return token_ids


def adjusted(scores_V: Scores, row: SamplingRow) -> Scores:
    """Return the scores that a row's token is drawn from."""
    if row.changes_scores:
        scores_V = scores_V.copy()
        bar_tokens(scores_V, row)
        apply_bias(scores_V, row.params.logit_bias)
        apply_penalties(scores_V, row)
    return scores_V


def greedy(scores_V: Scores) -> int:
    """Return the likeliest token, the first of equals."""
    best = int(scores_V.argmax())  # NaN counts as largest
    check_numbers(bool(np.isfinite(scores_V[best])))
    return best


def draw_all(scores: Sequence[Scores], params: Sequence[SamplingParams], quantiles: Sequence[float]) -> list[int]:
    """Draw from each row: `draw_from_scores`."""
    return [draw_from_scores(*each) for each in zip(scores, params, quantiles, strict=True)]


def draw_from_scores(scores_V: Scores, params: SamplingParams, u: float) -> int:
    """Draw the token at quantile `u` of the distribution that scores and parameters give.

    NumPy on one thread: these vectors are too short to gain from torch's threads, which cost most on a busy machine.
    """
    best = scores_V.max()
    check_numbers(bool(np.isfinite(best)))
    powers_V = scores_V - best  # now no temperature, however small, overflows
    powers_V /= np.float32(params.temperature)
    return draw(np.exp(powers_V, out=powers_V), params, u)


def bar_tokens(scores_V: Scores, row: SamplingRow) -> None:
    """Give no chance to what the constraint forbids, and to what would end the completion before `min_tokens`."""
    if row.constraint is not None:
        allowed = row.constraint.allowed()[: len(scores_V)]
        scores_V[: len(allowed)][~allowed] = -np.inf
        scores_V[len(allowed) :] = -np.inf
    if row.index < row.params.min_tokens and len(row.end_token_ids):
        ends = np.asarray(row.end_token_ids, dtype=np.int64)
        before = scores_V[ends]
        scores_V[ends] = -np.inf
        if row.constraint is not None and not np.isfinite(scores_V.max()):
            scores_V[ends] = before  # nothing but the end is left to the constraint, which is the stricter of the two


def apply_bias(scores_V: Scores, logit_bias: Mapping[int, float]) -> None:
    if logit_bias:
        scores_V[np.fromiter(logit_bias, np.int64)] += np.fromiter(logit_bias.values(), np.float32)


def apply_penalties(scores_V: Scores, row: SamplingRow) -> None:
    """Change the scores by repetition, then frequency and presence penalties.

    Repetition (Keskar et al. 2019, arXiv 1909.05858, section 4.1) looks at prompt and completion, the other two at the
    completion alone, as vLLM and OpenAI define them.
    """
    params = row.params
    completion = np.asarray(row.completion_ids, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate((np.asarray(row.prompt_ids, dtype=np.int64), completion)))
        scores = scores_V[seen]
        penalty = np.float32(params.repetition_penalty)
        scores_V[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(completion, return_counts=True)
        scores_V[ids] -= params.presence_penalty + params.frequency_penalty * counts


def draw(weights_V: Scores, params: SamplingParams, u: float) -> int:
    """Filter one row by top-k, then top-p, then min-p, and return the token at quantile `u` of what is left.

    Args:
        weights_V: probabilities over the likeliest token's, which is exactly 1.
    """
    kept = survivors(weights_V, params)
    if kept is None:
        return quantile(weights_V, u)
    return int(kept[quantile(weights_V[kept], u)])


def survivors(weights_V: Scores, params: SamplingParams) -> NDArray[np.intp] | None:
    """Return the ids that top-k, top-p and min-p leave, in a fixed order; None where all stay."""
    size = len(weights_V)
    kept: NDArray[np.intp] | None = None
    if 0 < params.top_k < size:
        smallest = np.partition(weights_V, size - params.top_k)[size - params.top_k]
        kept = np.flatnonzero(weights_V >= smallest)  # ties with the k-th stay, as in transformers
    if params.top_p < 1.0:
        kept = nucleus(weights_V, kept, params.top_p)
    if params.min_p > 0.0:
        floor = np.float32(params.min_p)
        kept = np.flatnonzero(weights_V >= floor) if kept is None else kept[weights_V[kept] >= floor]
    return kept


def nucleus(weights_V: Scores, ids: NDArray[np.intp] | None, top_p: float) -> NDArray[np.intp]:
    """Return the fewest of `ids` (None: of all) whose weights reach `top_p` of their sum. Holtzman et al. 2019.

    A token stays while those before it have not reached `top_p`, so at least one does (arXiv 1904.09751). Sorting a
    whole vocabulary takes milliseconds; instead tokens are counted into buckets by weight, and only the bucket in
    which the sum is reached is sorted.
    """
    weights = weights_V if ids is None else weights_V[ids]
    total = float(weights.sum(dtype=np.float64))
    needed = top_p * total
    # All tokens below this floor together weigh less than 1 - top_p, so the nucleus lies above it: most go here.
    possible = np.flatnonzero(weights >= np.float32((1.0 - top_p) * total / len(weights)))
    ids, weights = possible if ids is None else ids[possible], weights[possible]
    # The bits of a positive float are ordered as the number is: exponent and 4 bits of mantissa, largest first.
    buckets = (BITS_OF_ONE >> BUCKET_SHIFT) - (weights.view(np.int32) >> BUCKET_SHIFT)
    reached = np.cumsum(np.bincount(buckets, weights=weights))
    border = int(np.searchsorted(reached, needed, side="left"))
    inside, candidates = ids[buckets < border], ids[buckets == border]
    candidates = candidates[np.argsort(-weights_V[candidates], kind="stable")]
    before = np.cumsum(weights_V[candidates], dtype=np.float64) + (reached[border - 1] if border else 0.0)
    count = int(np.searchsorted(before, needed, side="left")) + 1
    return np.concatenate((inside, candidates[:count]))


def quantile(weights: Scores, u: float) -> int:
    """Return the place at which the running sum of the weights passes `u` of the whole, for `u` in [0, 1)."""
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    target = u * blocks[-1]
    block = min(int(np.searchsorted(blocks, target, side="right")), len(blocks) - 1)
    start = block * BLOCK
    cumulative = np.cumsum(weights[start : start + BLOCK], dtype=np.float64) + (blocks[block - 1] if block else 0.0)
    return start + min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)


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
