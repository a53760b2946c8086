"""Steps of fixed shapes are the oracle's, whatever a step holds: here each is run as it would be captured on a GPU."""

from __future__ import annotations

import dataclasses
import logging
import random
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.oracle import Cases, EagerPace, check_against_oracle
from service.engine.engine import Engine
from service.engine.host import warm_up
from service.engine.kv_cache import KVCache, Span
from service.engine.network import TorchNetwork
from service.engine.static_steps import Compute, StaticNetwork, doubling
from shared.model import SmolLM2
from tests.tiny import TINY, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


class LikeGraphs:
    """Repeats steps into the tensors of their first run; as they share memory, each run spoils what others left."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []

    def __call__(self, compute: Compute) -> Compute:
        result_NV = compute()
        self.results.append(result_NV)

        def replay() -> Tensor:
            scores_NV = compute()
            for other in self.results:
                other.fill_(torch.nan)
            return result_NV.copy_(scores_NV)

        return replay


def long_model() -> SmolLM2:
    """Knows more positions than the smallest step looks at."""
    model = SmolLM2(dataclasses.replace(TINY, max_position_embeddings=600))
    model.initialize(0)
    return model.eval()


def test_sizes_double_up_to_the_last() -> None:
    assert doubling(1, 6) == [1, 2, 4, 6]
    assert doubling(256, 1_024) == [256, 512, 1_024]
    assert doubling(256, 100) == [100]


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_are_the_oracles(seed: int) -> None:
    draw, model, tokenizer = random.Random(seed), long_model(), tiny_tokenizer()
    cases_of = Cases(draw, model, tokenizer, (1, 2, 10, 40))
    cases = [cases_of.case(550) for _ in range(12)]
    engine = Engine(
        model,
        tokenizer,
        num_slots=5,
        max_cached_tokens=2_048,
        network=StaticNetwork(model, LikeGraphs),
        prefill_chunk=24,
    )
    warm_up(engine)
    engine.pace = engine.scheduler.pace = EagerPace(fixed_s=0.01, each_s=0.001)
    check_against_oracle(draw, engine, cases)


def test_engines_may_share_a_network_as_each_has_steps_of_its_own_cache() -> None:
    draw, model, tokenizer = random.Random(4), tiny_model(), tiny_tokenizer()
    network, cases_of = StaticNetwork(model, LikeGraphs), Cases(draw, model, tokenizer, (10,))
    engines = [Engine(model, tokenizer, num_slots=n, max_cached_tokens=1_024, network=network) for n in (3, 4)]
    for engine in engines:
        warm_up(engine)
    for engine in (*engines, *engines):
        check_against_oracle(draw, engine, [cases_of.case(100) for _ in range(4)])


def test_steps_go_with_their_engine_as_a_graph_holds_much_memory() -> None:
    def keeping_the_result(compute: Compute) -> Compute:  # as a graph does
        scores_NV: Tensor = compute()
        return lambda: scores_NV

    model = tiny_model()
    network = StaticNetwork(model, lambda: keeping_the_result)
    engine = Engine(model, tiny_tokenizer(), num_slots=2, max_cached_tokens=512, network=network)
    network.prepare(engine.cache)
    cache, steps = ref(engine.cache), ref(network.steps_of[engine.cache])
    assert steps() is not None
    del engine
    assert cache() is None and steps() is None


def test_a_step_computes_what_the_plain_network_does_and_touches_no_other_slot() -> None:
    model = tiny_model()
    plain, static = TorchNetwork(model), StaticNetwork(model, LikeGraphs)
    caches = []
    for network in (plain, static):
        cache = KVCache(
            model.config,
            num_slots=3,
            max_cached_tokens=3 * model.config.max_position_embeddings,
            dtype=torch.float32,
            device=model.device,
            spare_slots=network.spare_slots,
        )
        network.prepare(cache)
        caches.append(cache)
    steps = [
        ([5, 6, 7], [Span(1, 0, 3)], [2]),
        ([8, 9, 10], [Span(1, 3, 1), Span(2, 0, 2)], [0, 2]),
        ([11, 12, 13], [Span(2, 2, 1), Span(1, 4, 2)], [0, 1, 2]),
        ([14, 15, 16, 17, 18], [Span(0, 0, 5)], [4]),  # larger than any static step
        ([19], [Span(0, 5, 1)], [0]),
    ]
    with torch.inference_mode():
        for token_ids, spans, places in steps:
            expected_BV, found_BV = (
                network.scores(cache, token_ids, spans, places)
                for network, cache in zip((plain, static), caches, strict=True)
            )
            assert torch.allclose(expected_BV, found_BV, atol=1e-5)
    expected, found = (cache.numbers_L2RKPE[:, :, :3] for cache in caches)
    assert torch.allclose(expected, found, atol=1e-5) and caches[1].numbers_L2RKPE.shape[2] == 4


def test_a_step_stays_on_its_device_as_a_graph_must() -> None:
    class OnMetaAlone(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Tensors of the device "meta" have no numbers, so that what would wait for some raises."""

        def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for each in tree_leaves((args, kwargs, result)):
                assert not isinstance(each, Tensor) or each.device.type == "meta", function
            return result

    def watched(compute: Compute) -> Compute:
        with OnMetaAlone():  # type: ignore[no-untyped-call]
            scores_NV = compute()
        return lambda: scores_NV

    model = long_model().to("meta")
    network = StaticNetwork(model, lambda: watched)
    engine = Engine(model, tiny_tokenizer(), num_slots=3, max_cached_tokens=1_000, network=network)
    network.prepare(engine.cache)
    assert [*network.steps_of[engine.cache].by_size] == [(rows, size) for rows in (3, 2, 1) for size in (600, 512, 256)]


def test_where_steps_cannot_be_captured_every_operation_is_launched_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(_: Compute) -> Compute:
        raise RuntimeError("operation not permitted when stream is capturing")

    draw, model, tokenizer = random.Random(9), tiny_model(), tiny_tokenizer()
    engine = Engine(
        model,
        tokenizer,
        num_slots=4,
        max_cached_tokens=1_024,
        network=StaticNetwork(model, lambda: fails),
        prefill_chunk=24,
    )
    with caplog.at_level(logging.WARNING):
        warm_up(engine)
    assert "steps cannot be captured" in caplog.text and "not permitted" in caplog.text
    check_against_oracle(draw, engine, [Cases(draw, model, tokenizer, (1, 2)).case(100)])
