"""Is every answer of the engine the plain loop's? A thousand random requests against `shared/generate.py`, in fp32.

    python -m benchmarks.oracle [--requests 1000] [--words 200] [--real 40] [models/smollm2-135m-instruct]

Prompts of 1 to 1,500 tokens, greedy and sampled, every sampling parameter, stop strings, end tokens, grammars; each
engine with other slots, memory, pieces of prompts, guesses and shared beginnings. Every request runs alone, then all of
them in batches in random order, each from a random index on, as after the loss of a worker. Tokens, the text with
each token, places and endings must be the plain loop's. Exits 1 at the first difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.engine.engine import Engine
from service.engine.pace import Pace
from service.engine.sequence import Output, Sequence
from shared.checkpoint import load_export
from shared.config import ModelConfig
from shared.generate import generate
from shared.grammar import ANY_OBJECT, Grammar, json_grammar, regex_grammar
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from shared.tokenizer import Tokenizer

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1_600,
)


@dataclass(frozen=True)
class Scale:
    """What requests to a model of one size may cost: the plain loop computes the whole prefix for every token."""

    new_tokens: tuple[int, ...]
    prefill_chunks: tuple[int, ...]
    busy_prefill_chunks: tuple[int | None, ...]


CHEAP = Scale((1, 2, 10, 40, 40, 150), (1, 7, 64, 512), (None, 1, 5, 64))
COSTLY = Scale((1, 4, 10), (24, 100, 512), (None, 24, 64))
"""A step of the real weights for every single token of a long prompt would take hours and show nothing more."""
GRAMMARS = (
    regex_grammar("[a-z ]{2,20}"),
    regex_grammar("Question: [0-9]{1,3} (yes|no)"),
    json_grammar(ANY_OBJECT),
    json_grammar({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}),
)


@dataclass
class Case:
    """A request and what the oracle answers it."""

    values: dict[str, Any]
    token_ids: list[int]
    pieces: list[str]
    """Text released with each token; one more entry where the end brought text without a token."""
    ended: tuple[str, str | None]

    def from_index(self, index: int, name: str) -> Sequence:
        return Sequence(id=name, completion_ids=self.token_ids[:index], **self.values)

    @property
    def last_index(self) -> int:
        """The last index from which something is left to do."""
        return max(0, len(self.token_ids) - (len(self.pieces) == len(self.token_ids)))


class EagerPace(Pace):
    """Guesses as much as possible, so that guesses are tried where they would not pay."""

    def num_drafts_worth(self, num_decoding: int, acceptance: float, most: int, position: int = 0) -> int:  # noqa: ARG002
        return most


class Cases:
    """Random requests to one model; some begin like earlier ones."""

    def __init__(self, draw: random.Random, model: SmolLM2, tokenizer: Tokenizer, new_tokens: tuple[int, ...]) -> None:
        self.draw = draw
        self.model = model
        self.tokenizer = tokenizer
        self.new_tokens = new_tokens
        self.beginnings: list[list[int]] = []

    def prompt(self, longest: int) -> list[int]:
        draw, vocab_size = self.draw, self.tokenizer.vocab_size
        length = draw.choice([1, 2, 7, 30, longest, draw.randint(1, longest)])
        ids: list[int] = []
        if self.beginnings and draw.random() < 0.4:
            whole = draw.choice(self.beginnings[-20:])  # an engine here meets 20 requests
            ids = whole[: draw.randint(1, len(whole))][:length]
        if draw.random() < 0.3:  # repeats itself, so that guesses are right now and then
            pattern = [draw.randrange(vocab_size) for _ in range(draw.randint(1, 9))]
            ids = (ids + pattern * (length // len(pattern)))[:length]
        ids += [draw.randrange(vocab_size) for _ in range(length - len(ids))]
        self.beginnings.append(ids)
        return ids

    def case(self, longest_prompt: int) -> Case:
        draw, vocab_size = self.draw, self.tokenizer.vocab_size
        prompt_ids = self.prompt(longest_prompt)
        max_new_tokens = draw.choice(self.new_tokens)
        params = SamplingParams(
            temperature=draw.choice([0.0, 0.0, 0.7, 1.5]),
            top_k=draw.choice([0, 5]),
            top_p=draw.choice([1.0, 0.9]),
            min_p=draw.choice([0.0, 0.02]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
            presence_penalty=draw.choice([0.0, 0.0, 0.5]),
            frequency_penalty=draw.choice([0.0, 0.0, -0.3]),
            logit_bias={draw.randrange(vocab_size): draw.uniform(-5, 5) for _ in range(draw.choice([0, 0, 0, 3]))},
            min_tokens=draw.choice([0, 0, 0, 3]),
            seed=draw.randrange(2**64),
        )
        values: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "params": params,
            "max_new_tokens": max_new_tokens,
            "end_token_ids": tuple(draw.sample(range(vocab_size), draw.choice([0, vocab_size // 34]))),
            "ignore_eos": draw.random() < 0.2,
            "stop_token_ids": tuple(draw.sample(range(vocab_size), draw.choice([0, 0, vocab_size // 100]))),
            "grammar": draw.choice(GRAMMARS) if draw.random() < 0.2 else None,
            "logprobs": draw.choice([None, None, 0, 2]),
        }
        ends = [*(() if values["ignore_eos"] else values["end_token_ids"]), *values["stop_token_ids"]]
        grammar = self.grammar(values["grammar"], ends)
        token_ids = list(
            generate(self.model, prompt_ids, params, max_new_tokens=max_new_tokens, end_token_ids=ends, grammar=grammar)
        )
        text = self.tokenizer.decode(token_ids)
        stop: tuple[str, ...] = ()
        if len(text) > 2 and draw.random() < 0.4:
            start = draw.randrange(len(text) - 1)
            stop = (text[start : start + draw.randint(1, 4)], "never seen")
        room = min(max_new_tokens, self.model.config.max_position_embeddings - len(prompt_ids))
        is_whole = self.is_whole(values["grammar"], ends, token_ids)
        return Case(
            {**values, "stop": stop},
            *expected_end(self.tokenizer, token_ids, stop, room, min_tokens=params.min_tokens, is_whole=is_whole),
        )

    def grammar(self, source: str | None, ends: list[int]) -> Grammar | None:
        return None if source is None else Grammar(source, self.tokenizer, end_token_ids=ends)

    def is_whole(self, source: str | None, ends: list[int], token_ids: list[int]) -> bool:
        """Whether the grammar ended the completion: nothing can follow the last token."""
        grammar = self.grammar(source, ends)
        return grammar is not None and not all(grammar.push(token_id) for token_id in token_ids)


def expected_end(
    tokenizer: Tokenizer,
    token_ids: list[int],
    stop: tuple[str, ...],
    room: int,
    *,
    min_tokens: int = 0,
    is_whole: bool = False,
) -> tuple[list[int], list[str], tuple[str, str | None]]:
    """Cut the oracle's tokens at the first stop string, looking at the text of every prefix.

    An end token flushes half a character as U+FFFD, and that may complete a stop string as well.
    """
    decoder = tokenizer.stream_decoder()
    seen = ""
    free = 0  # characters of the first `min_tokens` tokens, where no stop string counts
    pieces: list[str] = []
    for count, token_id in enumerate(token_ids, start=1):
        is_last = count == room or (is_whole and count == len(token_ids))
        seen += decoder.push(token_id)
        if count <= min_tokens:
            free = len(seen)
        if is_last:
            seen += decoder.flush()
        counted = seen[free:]
        shown = len("".join(pieces))
        if (cut := first_stop(counted, stop)) is not None:
            return token_ids[:count], [*pieces, seen[shown : free + cut[0]]], ("stop", cut[1])
        held = max((n for string in stop for n in range(len(string)) if counted.endswith(string[:n])), default=0)
        pieces.append(seen[shown : len(seen) if is_last else len(seen) - held])
    if is_whole or len(token_ids) == room:
        return token_ids, pieces, ("stop" if is_whole else "length", None)
    whole, shown = seen + decoder.flush(), len("".join(pieces))
    if (cut := first_stop(whole[free:], stop)) is not None:
        return token_ids, [*pieces, whole[shown : free + cut[0]]], ("stop", cut[1])
    return token_ids, [*pieces, whole[shown:]], ("stop", None)


def first_stop(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Return where the stop string that is complete first begins, of several at one place the longest, and which."""
    found = [(text.index(string) + len(string), -len(string), string) for string in stop if string in text]
    return None if not found else (min(found)[0] + min(found)[1], min(found)[2])


def random_engine(draw: random.Random, model: SmolLM2, tokenizer: Tokenizer, scale: Scale = CHEAP) -> Engine:
    engine = Engine(
        model,
        tokenizer,
        num_slots=draw.choice([1, 2, 5, 9]),
        max_cached_tokens=model.config.max_position_embeddings + draw.choice([0, 100, 1_000]),
        prefill_chunk=draw.choice(scale.prefill_chunks),
        busy_prefill_chunk=draw.choice(scale.busy_prefill_chunks),
        speculate=draw.random() < 0.7,
        share_prefixes=draw.random() < 0.7,
    )
    if draw.random() < 0.6:
        engine.pace = engine.scheduler.pace = EagerPace(fixed_s=0.01, each_s=0.001)
    return engine


def check_against_oracle(draw: random.Random, engine: Engine, cases: list[Case], *, resume: bool = True) -> None:
    """Add the cases in any order at any time, each from any index on; every output must be the oracle's."""
    todo = []
    for place, case in enumerate(cases):
        index = draw.choice([0, draw.randint(0, case.last_index)]) if resume else 0
        todo.append((case, index, str(place)))
    draw.shuffle(todo)
    by_name = {name: (case, index) for case, index, name in todo}
    outputs: dict[str, list[Output]] = defaultdict(list)
    while todo or engine.has_work:
        while todo and (not engine.has_work or draw.random() < 0.3):
            case, index, name = todo.pop()
            engine.add(case.from_index(index, name))
        for output in engine.step():
            outputs[output.sequence_id].append(output)
    for name, (case, index) in by_name.items():
        ids = [token_id for output in outputs[name] for token_id in output.token_ids]
        assert ids == case.token_ids[index:], (ids, case.token_ids[index:], case.values)
        assert [output.text for output in outputs[name]] == case.pieces[index:], case.values
        ends = [(output.finish_reason, output.stop_sequence) for output in outputs[name]]
        assert ends == [(None, None)] * (len(ends) - 1) + [case.ended], (ends, case.ended, case.values)
        places = [output.first_index for output in outputs[name]]
        assert places == list(range(index, index + len(places)))
        logprobs = [entry["token_id"] for output in outputs[name] for entry in output.logprobs or ()]
        assert logprobs == ([] if case.values["logprobs"] is None else ids)
    assert not engine.cache.reserved


def small_model(vocab_size: int = SMALL.vocab_size) -> SmolLM2:
    model = SmolLM2(dataclasses.replace(SMALL, vocab_size=vocab_size))
    model.initialize(5)
    if vocab_size > SMALL.vocab_size:
        # As steep as a trained model's scores. Among 49,152 nearly equal tokens a draw falls on the border between two
        # once in thousands of times, where fp32 sums in another order, as PyTorch takes them, decide.
        with torch.no_grad():
            model.model.norm.weight.mul_(30)
    return model.eval()


def small_tokenizer() -> Tokenizer:
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))] + ["日本語 Größe 🙂 👩‍👩‍👧"]
    return Tokenizer.train(texts, vocab_size=SMALL.vocab_size)


def compare(
    model: SmolLM2, tokenizer: Tokenizer, num_requests: int, name: str, *, scale: Scale = CHEAP, seed: int = 99
) -> None:
    """Compare in groups of 20: each request alone, then three times together in other engines."""
    draw, started = random.Random(seed), time.monotonic()
    cases_of = Cases(draw, model, tokenizer, scale.new_tokens)
    totals: dict[str, int] = defaultdict(int)
    for done in range(0, num_requests, 20):
        cases = [cases_of.case(draw.randint(31, 1_500)) for _ in range(min(20, num_requests - done))]
        alone = random_engine(draw, model, tokenizer, scale)
        for case in cases:
            check_against_oracle(draw, alone, [case], resume=False)
        together = [random_engine(draw, model, tokenizer, scale) for _ in range(3)]
        for engine in together:
            check_against_oracle(draw, engine, cases)
        totals["requests"] += len(cases)
        totals["prompt tokens"] += sum(len(case.values["prompt_ids"]) for case in cases)
        totals["tokens"] += sum(len(case.token_ids) for case in cases)
        for engine in (alone, *together):
            totals["compared"] += engine.statistics.num_drawn_tokens
            totals["copied"] += engine.statistics.num_shared_tokens
            totals["guesses"] += engine.statistics.num_drafts
            totals["right"] += engine.statistics.num_right_drafts
        print(f"{name}: {describe(totals)}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{name}: equal alone, batched and resumed")


def describe(totals: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in totals.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--requests", type=int, default=1_000, help="to a model of 0.1 million numbers")
    parser.add_argument("--words", type=int, default=200, help="to a small model with the folder's tokenizer")
    parser.add_argument("--real", type=int, default=40, help="to the real weights")
    parser.add_argument("--seed", type=int, default=99)
    options = parser.parse_args()
    threads, seed = torch.get_num_threads(), options.seed
    try:
        torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
        if options.requests:
            compare(small_model(), small_tokenizer(), options.requests, "small model", seed=seed)
        if options.words:
            tokenizer = Tokenizer.from_folder(options.folder)
            compare(small_model(tokenizer.vocab_size), tokenizer, options.words, "its tokenizer", seed=seed)
        torch.set_num_threads(threads)
        if options.real:
            model, tokenizer = load_export(options.folder, device=torch.device("cpu"), dtype=torch.float32)
            model.config = dataclasses.replace(model.config, max_position_embeddings=1_600)
            compare(model, tokenizer, options.real, options.folder.name, scale=COSTLY, seed=seed)
    except AssertionError as error:
        print(f"NOT EQUAL: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
