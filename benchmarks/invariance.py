"""How far the same request gives the same tokens: alone, batched, resumed, with shared beginnings, with guesses.

    python -m benchmarks.invariance [models/smollm2-135m-instruct] [--weights int8] [--requests 24] [--tokens 48]

In fp32 a batch changes sums in the last bit only, and a draw sees that about never (`benchmarks.oracle`). In 16 bits it
shows now and then, unless every product adds up each row in the same order whatever stands beside it. Each line runs
the same requests, half greedy and half sampled, another way and compares with each of them alone: how many completions
are equal, and how often a completion leaves the other, per 1,000 tokens before that. Exits 1 if any does.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.oracle import EagerPace
from service.engine.engine import Engine
from service.engine.host import load_host
from service.engine.networks import choose_serving_dtype
from service.engine.sequence import Sequence
from shared.catalog import read_model_folder
from shared.device import choose_device, choose_num_threads
from shared.sampling import SamplingParams

Answers = list[list[int]]


class Requests:
    """The same prompts for every way of running them."""

    def __init__(self, engine: Engine, *, num_requests: int, num_tokens: int) -> None:
        self.model, self.network, self.tokenizer = engine.model, engine.network, engine.tokenizer
        self.num_tokens = num_tokens
        draw = random.Random(0)
        text = self.tokenizer.encode("\n".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))))
        self.prompts = []
        for _ in range(num_requests):
            start, length = draw.randrange(len(text) - 400), draw.randint(8, 300)
            self.prompts.append(text[start : start + length])

    def engine(self, **values: Any) -> Engine:
        settings = {"num_slots": 32, "max_cached_tokens": 16_384, "speculate": False, "share_prefixes": False}
        engine = Engine(self.model, self.tokenizer, network=self.network, **{**settings, **values})
        self.network.prepare(engine.cache)  # on a GPU: steps as they are served
        return engine

    def sequence(self, place: int, completion_ids: list[int], prompt_ids: list[int] | None = None) -> Sequence:
        return Sequence(
            id=str(place),
            prompt_ids=self.prompts[place] if prompt_ids is None else prompt_ids,
            params=SamplingParams(temperature=0.8 * (place % 2), top_p=0.95, seed=place),
            max_new_tokens=self.num_tokens,
            completion_ids=completion_ids,
        )

    def run(self, engine: Engine, *, at_once: int, resumed: Answers | None = None) -> Answers:
        """Answer all requests, at most so many at a time, each behind what an earlier attempt delivered."""
        answers = [list(ids) for ids in resumed] if resumed else [[] for _ in self.prompts]
        todo = list(range(len(self.prompts)))
        while todo or engine.has_work:
            while todo and len(engine.sequences) < at_once:
                place = todo.pop(0)
                engine.add(self.sequence(place, answers[place]))
            for output in engine.step():
                answers[int(output.sequence_id)] += output.token_ids
        return answers


@dataclass
class Comparison:
    """Tokens compared and completions that were not equal, of all lines."""

    num_tokens: int = 0
    num_different: int = 0

    def line(self, name: str, expected: Answers, found: Answers, *, known: int, seconds: float) -> None:
        """Print one line; the first `known` tokens of each were given."""
        equal, before = 0, 0
        for one, other in zip(expected, found, strict=True):
            same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
            equal += one == other
            before += same - known
        self.num_tokens += before
        self.num_different += len(expected) - equal
        rate = 1_000 * (len(expected) - equal) / max(1, before)
        print(f"{name:<44}{equal:>5} of {len(expected)}{rate:>12.2f}{seconds:>10.1f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", choices=["dtype", "int8"], default="dtype")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batches", action="store_true", help="only the ways in batches: many tokens in less time")
    options = parser.parse_args()
    threads, device = choose_num_threads(0), choose_device("auto")
    torch.set_num_threads(threads.value)
    dtype = choose_serving_dtype(device.value, options.dtype)
    host = load_host(
        read_model_folder(options.folder),
        device=device.value,
        dtype=dtype.value,
        weights=options.weights,
        num_slots=1,
        max_cached_tokens=1_024,
    )
    computed_by = getattr(host.engine.network, "description", "PyTorch")
    print(f"{threads.value} threads, torch {torch.__version__}, {device.value}, {dtype.value}: {computed_by}")
    requests = Requests(host.engine, num_requests=options.requests, num_tokens=options.tokens)
    alone = requests.run(requests.engine(), at_once=1)
    half = options.tokens // 2
    comparison = Comparison()
    print(f"{'against each request alone':<44}{'equal':>11}{'per 1,000':>12}{'took':>10}")
    guessing = requests.engine(speculate=True)
    guessing.pace = guessing.scheduler.pace = EagerPace(fixed_s=0.01, each_s=0.001)
    shared = requests.engine(share_prefixes=True)
    requests.run(shared, at_once=1)  # afterwards the last ones' prompts stand in its slots
    ways: list[tuple[str, Engine, int, int]] = [
        ("alone again", requests.engine(), 1, 0),
        ("prompts in pieces of 24 tokens", requests.engine(prefill_chunk=24), 1, 0),
        ("resumed in the middle, alone", requests.engine(), 1, half),
        ("8 at a time", requests.engine(busy_prefill_chunk=24), 8, 0),
        ("all at once", requests.engine(busy_prefill_chunk=24), 32, 0),
        ("all at once, resumed in the middle", requests.engine(busy_prefill_chunk=24), 32, half),
        ("alone, prompts met before", shared, 1, 0),
        ("alone, with guesses", guessing, 1, 0),
    ]
    for name, engine, at_once, known in ways:
        if options.batches and at_once == 1:
            continue
        started = time.perf_counter()
        found = requests.run(engine, at_once=at_once, resumed=[ids[:known] for ids in alone] if known else None)
        comparison.line(name, alone, found, known=known, seconds=time.perf_counter() - started)
    print(f"{comparison.num_tokens:,} tokens compared, {comparison.num_different} completions different")
    return int(comparison.num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
