"""One step's attention over slots against plain attention over each sequence by itself."""

from __future__ import annotations

import itertools
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from service.engine.attention import CALL_COST, StepAttention, split
from service.engine.kv_cache import KVCache, Span
from tests.tiny import TINY


def spans_in(draw: random.Random, num_slots: int, longest: int) -> list[Span]:
    """Draw some sequences: many with one new token, a few with several; each anywhere in its slot."""
    spans = []
    for slot in draw.sample(range(num_slots), draw.randint(1, num_slots)):
        count = draw.choice([1, 1, 1, draw.randint(2, 20)])
        spans.append(Span(slot, draw.choice([0, draw.randrange(longest - 20)]), count))
    return sorted(spans, key=lambda span: (span.count > 1, span.slot))


def test_every_sequence_sees_itself_alone() -> None:
    draw = random.Random(0)
    torch.manual_seed(0)
    heads, kv_heads, size = TINY.num_attention_heads, TINY.num_key_value_heads, TINY.head_dim
    for _ in range(40):
        cache = KVCache(TINY, num_slots=8, max_cached_tokens=2_000, dtype=torch.float32, device=torch.device("cpu"))
        past = torch.randn_like(cache.numbers_L2RKPE)
        cache.numbers_L2RKPE.copy_(past)
        spans = spans_in(draw, 8, 200)
        num_tokens = sum(span.count for span in spans)
        queries = torch.randn(1, heads, num_tokens, size)
        keys, values = torch.randn(2, 1, kv_heads, num_tokens, size)
        mixed = StepAttention(cache, spans)(1, queries, keys, values)
        assert mixed.shape == queries.shape
        token = 0
        for span in spans:
            new = slice(token, token + span.count)
            token += span.count
            expected = alone(past[1, :, span.slot], span, queries[:, :, new], keys[:, :, new], values[:, :, new])
            torch.testing.assert_close(mixed[:, :, new], expected)
        assert torch.equal(cache.numbers_L2RKPE[0], past[0])


def alone(past_2KPE: Tensor, span: Span, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    keys, values = (
        torch.cat((past_KPE[:, : span.start].unsqueeze(0), new), dim=2)
        for past_KPE, new in zip(past_2KPE, (keys, values), strict=True)
    )
    visible = torch.ones(span.count, span.end, dtype=torch.bool).tril(span.start)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, enable_gqa=True)


def cost(singles: list[Span], runs: list[slice]) -> int:
    total = 0
    for run in runs:
        spans = singles[run]
        total += CALL_COST + (spans[-1].slot + 1 - spans[0].slot) * max(span.end for span in spans)
    return total


def test_slots_are_divided_into_runs_of_least_cost() -> None:
    draw = random.Random(1)
    for _ in range(50):
        slots = sorted(draw.sample(range(40), draw.randint(1, 7)))
        singles = [Span(slot, draw.choice([5, 100, 700, 2_000]), 1) for slot in slots]
        runs = split(singles)
        assert [place for run in runs for place in range(run.start, run.stop)] == list(range(len(singles)))
        borders = range(2 ** (len(singles) - 1))
        ways = [[0, *(i + 1 for i in range(len(singles) - 1) if border >> i & 1), len(singles)] for border in borders]
        cheapest = min(cost(singles, [slice(a, b) for a, b in itertools.pairwise(way)]) for way in ways)
        assert cost(singles, runs) == cheapest
    assert split([]) == []
