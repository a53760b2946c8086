"""What streams feel while prompts arrive, what shared beginnings, guesses and grammars bring: measured on real weights.

    python -m benchmarks.scheduling [models/smollm2-135m-instruct] [--dtype auto]

Every figure compares two ways of one engine in one process, on the same weights, those of guesses and grammars by turns
for `--rounds`, with the medians. `--cpu-time` counts the seconds of one
thread instead of the wall's: on a machine that others use too, nothing else means anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from service.engine.engine import Engine
from service.engine.host import describe_choices, load_host, warm_up
from service.engine.sequence import Sequence
from shared.catalog import read_model_folder
from shared.device import choose_device, choose_dtype, choose_num_threads
from shared.grammar import Grammar, json_grammar, regex_grammar
from shared.sampling import SamplingParams

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string", "maxLength": 40},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 4},
    },
    "required": ["name", "age", "city", "hobbies"],
    "additionalProperties": False,
}
PATTERN = r"Name: [A-Z][a-z]{2,12}\nAge: [1-9][0-9]\nCity: [A-Z][a-z]{2,12}\nAbout: [A-Za-z ,]{60,120}\."
EXAMPLES = {
    "JSON by schema": '{"name": "Ada Lovelace", "age": 36, "city": "London", "hobbies": ["mathematics"]}',
    "regex": "Name: Ada\nAge: 36\nCity: London\nAbout: She wrote the first program, for a machine nobody ever built.",
}


class Bench:
    """Engines over one model."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self.model, self.network, self.tokenizer = engine.model, engine.network, engine.tokenizer
        self.clock = clock
        self.names = itertools.count()
        self.text = self.tokenizer.encode((Path(__file__).parents[1] / "LICENSE").read_text())

    def engine(self, **values: Any) -> Engine:
        values = {"num_slots": 40, "max_cached_tokens": 32_768, **values}
        engine = Engine(self.model, self.tokenizer, network=self.network, clock=self.clock, **values)
        warm_up(engine)
        return engine

    def sequence(self, prompt_ids: list[int], max_new_tokens: int, **values: Any) -> Sequence:
        values = {"params": SamplingParams(temperature=0.0), "ignore_eos": True, **values}
        return Sequence(id=str(next(self.names)), prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, **values)

    def chat(self, question: str) -> list[int]:
        return self.tokenizer.encode(self.tokenizer.render_chat([{"role": "user", "content": question}]))

    def gaps(self, engine: Engine, num_streams: int, long_prompt: bool) -> tuple[list[float], float]:
        """Seconds between two tokens of a stream, of all streams, and until the long prompt's first token."""
        streams = [self.sequence(self.text[9 * n : 9 * n + 16], 400) for n in range(num_streams)]
        for sequence in streams:
            engine.add(sequence)
        for _ in range(20):
            engine.step()
        newcomer = self.sequence(self.text[:1_500], 1)
        if long_prompt:
            engine.add(newcomer)
        started = last = self.clock()
        gaps: list[float] = []
        first_s = 0.0
        while not first_s if long_prompt else len(gaps) < 60:
            outputs = engine.step()
            now = self.clock()
            gaps.append(now - last)
            last = now
            if any(output.sequence_id == newcomer.id for output in outputs):
                first_s = now - started
        for sequence in [*streams, newcomer]:
            engine.cancel(sequence.id)
        return gaps, first_s

    def answer(self, engine: Engine, sequences: list[Sequence]) -> tuple[float, list[list[int]]]:
        """Run sequences that come together; return the seconds and their tokens."""
        started = self.clock()
        answers: dict[str, list[int]] = {sequence.id: [] for sequence in sequences}
        for sequence in sequences:
            engine.add(sequence)
        while engine.has_work:
            for output in engine.step():
                answers[output.sequence_id] += output.token_ids
        return self.clock() - started, list(answers.values())


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def stalls(bench: Bench, streams: list[int], rounds: int) -> None:
    print("\nTime between two tokens of a stream while a prompt of 1,500 tokens comes in (must: p99 at most 2x)")
    names = f"{'median':>10}{'p99':>10}{'median with':>13}{'p99 with':>10}{'ratio of p99':>14}{'prompt took':>13}"
    print(f"{'streams':>8}{names}")
    for num_streams in streams:
        plain: list[float] = []
        beside: list[float] = []
        engine = bench.engine(speculate=False, share_prefixes=False)
        bench.gaps(engine, num_streams, long_prompt=True)  # the first round waits for the system to clear memory
        for _ in range(rounds):
            plain += bench.gaps(engine, num_streams, long_prompt=False)[0]
            gaps, first_s = bench.gaps(engine, num_streams, long_prompt=True)
            beside += gaps
        figures = [1_000 * figure for figure in (statistics.median(plain), percentile(plain, 0.99))]
        figures += [1_000 * figure for figure in (statistics.median(beside), percentile(beside, 0.99))]
        ratio = percentile(beside, 0.99) / percentile(plain, 0.99)
        print(
            f"{num_streams:>8}{figures[0]:>7.1f} ms{figures[1]:>7.1f} ms{figures[2]:>10.1f} ms{figures[3]:>7.1f} ms"
            f"{ratio:>14.2f}{first_s:>11.2f} s",
            flush=True,
        )


def prefixes(bench: Bench) -> None:
    print("\nA system prompt of 500 tokens before 16 questions that come together, 8 tokens each")
    results = []
    for shared in (False, True):
        engine = bench.engine(share_prefixes=shared)
        asked = [bench.sequence([*bench.text[:500], *bench.text[700 + 9 * n : 709 + 9 * n]], 8) for n in range(16)]
        seconds, answers = bench.answer(engine, asked)
        results.append((seconds, answers))
        totals = engine.statistics
        print(
            f"{'shared' if shared else 'each computed':>16}: {seconds:6.2f} s, prompt tokens computed "
            f"{totals.num_prefill_tokens + 16:,}, copied {totals.num_shared_tokens:,}"
        )
    equal = sum(one == other for one, other in zip(results[0][1], results[1][1], strict=True))
    print(f"ratio {results[0][0] / results[1][0]:.1f}; {equal} of 16 completions equal")


def guesses(bench: Bench, rounds: int) -> None:
    code = "def total(prices):\n    result = 0\n    for price in prices:\n        result += price\n    return result\n"
    cases = {
        "repeat this code": bench.chat(f"Repeat this code exactly:\n```python\n{code * 2}```"),
        "a story": bench.chat("Write a short story about a lighthouse keeper."),
        "license text": bench.text[:600],
        "random ids": [(7919 * n) % 49_000 for n in range(1, 120)],
    }
    print("\nGuesses (prompt lookup): 96 tokens, tokens/s without and with")
    print(
        f"{'':>18}{'streams':>9}{'sampling':>10}{'without':>10}{'with':>10}{'ratio':>8}{'made':>8}{'right':>7}  equal"
    )
    for (name, prompt_ids), streams, temperature in itertools.product(cases.items(), (1, 8), (0.0, 0.8)):

        def run(on: bool, ids: list[int] = prompt_ids, streams: int = streams, heat: float = temperature) -> Run:
            engine = bench.engine(speculate=on, share_prefixes=False)
            params = [SamplingParams(temperature=heat, seed=n) for n in range(streams)]
            asked = [bench.sequence([*ids, n][n > 0 :], 96, params=each) for n, each in enumerate(params)]
            return Run(*bench.answer(engine, asked), engine)

        without, with_guesses = by_turns(rounds, partial(run, False), partial(run, True))
        totals = with_guesses.engine.statistics
        equal = sum(one == other for one, other in zip(without.answers, with_guesses.answers, strict=True))
        print(
            f"{name:>18}{streams:>9}{temperature or 'greedy':>10}{without.speed:>10.1f}{with_guesses.speed:>10.1f}"
            f"{with_guesses.speed / without.speed:>8.2f}{totals.num_drafts:>8}{totals.num_right_drafts:>7}"
            f"  {equal} of {streams}",
            flush=True,
        )


def grammars(bench: Bench, rounds: int) -> None:
    print("\nGrammars beside the same number of tokens without; limit: 5 % of the speed. Every answer must match")
    sources = {"JSON by schema": json_grammar(SCHEMA), "regex": regex_grammar(PATTERN)}
    for name, source in sources.items():
        started = bench.clock()
        grammar = Grammar(source, bench.tokenizer, end_token_ids=(2,))
        made_s = bench.clock() - started
        masks = []
        for token_id in bench.tokenizer.encode(EXAMPLES[name]):
            started = bench.clock()
            grammar.allowed()
            masks.append(bench.clock() - started)
            grammar.push(token_id)
        print(
            f"{name}: grammar made in {1e3 * made_s:.2f} ms; a mask takes {1e6 * statistics.median(masks):.0f} us in "
            f"the median, {1e6 * max(masks):.0f} at most"
        )
    print(
        f"{'':>18}{'streams':>9}{'without':>10}{'with':>10}{'ratio':>8}{'guessing':>10}{'ratio':>8}{'forced':>8}  match"
    )
    for (name, source), streams in itertools.product(sources.items(), (1, 8, 32)):
        prompt_ids = bench.chat("Describe a person.")
        params = [SamplingParams(temperature=0.8, seed=seed) for seed in range(streams)]

        def constrained(speculate: bool, source: str = source, params: list[SamplingParams] = params) -> Run:
            engine = bench.engine(speculate=speculate)
            ends = {"grammar": source, "ignore_eos": False, "end_token_ids": (0, 2)}
            asked = [bench.sequence(prompt_ids, 250, params=each, **ends) for each in params]  # noqa: B023
            return Run(*bench.answer(engine, asked), engine)

        answers = constrained(False).answers

        def plain(answers: list[list[int]] = answers, params: list[SamplingParams] = params) -> Run:
            engine = bench.engine(speculate=False)
            pairs = zip(answers, params, strict=True)
            asked = [bench.sequence(prompt_ids, len(ids), params=each) for ids, each in pairs]  # noqa: B023
            return Run(*bench.answer(engine, asked), engine)

        without, alone, guessing = by_turns(rounds, plain, partial(constrained, False), partial(constrained, True))
        matching = sum(matches(name, bench.tokenizer.decode(ids)) for ids in alone.answers + guessing.answers)
        print(
            f"{name:>18}{streams:>9}{without.speed:>10.1f}{alone.speed:>10.1f}{alone.speed / without.speed:>8.2f}"
            f"{guessing.speed:>10.1f}{guessing.speed / without.speed:>8.2f}"
            f"{guessing.engine.statistics.num_right_drafts:>8}  {matching} of {2 * streams}",
            flush=True,
        )


@dataclass
class Run:
    """How long some sequences took, their tokens, and what computed them."""

    seconds: float
    answers: list[list[int]]
    engine: Engine

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return sum(map(len, self.answers)) / self.seconds


def by_turns(rounds: int, *ways: Callable[[], Run]) -> list[Run]:
    """Run each way so many times, in turn; return each one's run of the median time."""
    runs = [[way() for way in ways] for _ in range(rounds)]
    return [sorted(of_way, key=lambda run: run.seconds)[rounds // 2] for of_way in zip(*runs, strict=True)]


def matches(name: str, text: str) -> bool:
    return bool(re.fullmatch(PATTERN, text)) if name == "regex" else parses(text)


def parses(text: str) -> bool:
    try:
        return bool(set(json.loads(text)) == set(SCHEMA["required"]))
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["stalls", "prefixes", "guesses", "grammars"])
    options = parser.parse_args()
    threads, device = choose_num_threads(0), choose_device("auto")
    num_threads = 1 if options.cpu_time else threads.value
    torch.set_num_threads(num_threads)
    dtype = choose_dtype(device.value, options.dtype, purpose="serve")
    host = load_host(
        read_model_folder(options.folder), device=device.value, dtype=dtype.value, num_slots=2, max_cached_tokens=1_024
    )
    clock = time.process_time if options.cpu_time else time.perf_counter
    bench = Bench(host.engine, clock)
    print(
        f"{num_threads} threads, torch {torch.__version__}, {dtype.value}: {describe_choices(bench.engine())}",
        flush=True,
    )
    parts: dict[str, Callable[[Bench], None]] = {
        "stalls": lambda bench: stalls(bench, options.streams, options.rounds),
        "prefixes": prefixes,
        "guesses": lambda bench: guesses(bench, options.rounds),
        "grammars": lambda bench: grammars(bench, options.rounds),
    }
    for name in options.only:
        parts[name](bench)


if __name__ == "__main__":
    main()
