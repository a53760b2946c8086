"""Inputs nobody would think of, against real processes. `make fuzz-api`.

    python -m benchmarks.fuzz_api [equal schema] [--count N] [--seconds S] [--seed S] [--results FILE]

    equal     random prompts and parameters: the blocking answer, the stream and the plain generation loop must agree
              in every token and character, and in the bits of the prompt's scores where they are asked for  100,000
    schema    schemathesis on /openapi.json, valid and invalid requests: no 5xx, nothing undescribed        1,800 s

`--results` keeps the count of `equal` in a file, so that it can be made in pieces.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from service.engine.kv_cache import KVCache, Span
from service.engine.networks import load_network
from shared.catalog import read_model_folder
from shared.generate import generate
from shared.sampling import SamplingParams
from shared.tokenizer import Tokenizer
from tests.e2e.client import Connection, ConnectionLost, Event
from tests.e2e.cluster import Cluster, steady_dtype
from tests.tiny import tiny_tokenizer, write_tiny_export

CPU = torch.device("cpu")
NUM_CLIENTS = 12
GROUP = 16
"""Prompts of one request, the most that /v1/completions takes; one of them is asked for by /generate too."""
NUM_WANTED = 100_000
LONG_SLEEP_S = 4.0
"""The service waits for a silent client for longer."""
SCHEMA_S = 1_800.0
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)
PIECES = (
    *("First Citizen:", "hear me", " ", "\n", "\t\r\n", "\u0000", "\u0085\u2028\u2029", "\ufeff", "\\ud800", '"', "\\"),
    *(
        "🙂",
        "👩‍👩‍👧",
        "日本語",
        "naïve",
        "e\u0301",
        "\u202e",
        "\U0010ffff",
        "ß" * 7,
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_start|>",
    ),
    *("data: x\n\n", "event: done", "[DONE]", "{}", "null", "12 + 30 =", "def add(", "%s%n", "'; --"),
)
STOPS = ("e", " the", "\n", "🙂", "ing ", "日本", "Cit", ".", "al", "\u0000")


T = TypeVar("T")


@dataclass
class Outcome:
    """Of `equal`."""

    inputs: int = 0
    tokens: int = 0
    scored: int = 0
    """With the scores of the prompt."""
    stopped: int = 0
    """That ended by a stop string or an end token."""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


@contextmanager
def tiny_service(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the URL of an API process with a worker process, and the folder of the model they serve."""
    folder = write_tiny_export(root / "models").path
    run = root / "runs" / "first"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    cluster = Cluster(root, models_dir=root / "models", default_model="tiny", max_queued_jobs=1_000)
    try:
        cluster.start_worker()
        url = cluster.start_api()
        cluster.wait_until_ready(0)  # /ready tells of a worker for the default model
        yield url, folder
    finally:
        cluster.stop()


def draw_body(draw: random.Random) -> dict[str, Any]:
    """Return a request that can be served."""
    parts = [draw.choice(PIECES) for _ in range(draw.randint(1, 6))]
    parts += [chr(draw.choice((draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)))) for _ in range(3)]
    body: dict[str, Any] = {"prompt": "".join(draw.sample(parts, len(parts)))}
    body["max_new_tokens"] = draw.choice((1, 2, 3, 5, 8))
    body["seed"] = draw.randrange(2**63)
    body["temperature"] = draw.choice((0, 1e-6, 0.3, 0.7, 1, 1.5, 10))
    optional = {
        "top_k": draw.choice((0, 1, 5, 100)),
        "top_p": draw.choice((1e-9, 0.5, 0.95, 1)),
        "min_p": draw.choice((0, 0.05, 1)),
        "repetition_penalty": draw.choice((0.5, 1.3, 10)),
        "presence_penalty": draw.uniform(-2, 2),
        "frequency_penalty": draw.uniform(-2, 2),
        "logit_bias": {str(draw.randrange(512)): draw.uniform(-100, 100) for _ in range(draw.randint(0, 3))},
        "stop": draw.sample(STOPS, draw.randint(0, 3)),
        "ignore_eos": draw.random() < 0.5,
    }
    return body | {name: value for name, value in optional.items() if draw.random() < 0.3}


class Reference:
    """The plain loop over a folder's weights, in the arithmetic of the worker: the whole prefix anew for every token.

    The kernels compute a row to the same bits whatever is beside it, so one token that differs is a fault. PyTorch's
    sums depend on how many rows there are, which changes a draw once in some thousands.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        described = read_model_folder(folder)
        self.end = tuple(described.end_token_ids)
        self.model, network = load_network(described, device=CPU, dtype=dtype)
        self.network = network.value
        config, blocks = self.model.config, self.network.wants_blocks
        longest = config.max_position_embeddings
        self.cache = KVCache(config, num_slots=1, max_cached_tokens=longest, dtype=dtype, device=CPU, in_blocks=blocks)

    def scores(self, ids: list[int]) -> Tensor:
        return self.network.scores(self.cache, ids, [Span(0, 0, len(ids))], [len(ids) - 1])

    def rate(self, ids: list[int]) -> list[float | None]:
        """Return the log-probability of each token given those before it, None of the first."""
        with torch.inference_mode():
            logits_TV = self.network.scores(self.cache, ids, [Span(0, 0, len(ids))], range(len(ids)))
            logprobs_TV = logits_TV[:-1].float().log_softmax(-1)
        return [None, *logprobs_TV.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()]

    def complete(self, body: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], str]:
        """What comes of a request: tokens, and their text before the first stop string that is complete."""
        names = set(SamplingParams.__dataclass_fields__) & body.keys()
        sampling = {"temperature": 0.7, "top_p": 0.95} | {name: body[name] for name in names}
        ids: list[int] = []
        stops = body.get("stop", [])
        for token_id in generate(
            self.model,
            tokenizer.encode(body["prompt"]),
            SamplingParams(**sampling),
            max_new_tokens=body["max_new_tokens"],
            end_token_ids=() if body.get("ignore_eos") else self.end,
            scores=self.scores,
        ):
            ids.append(token_id)
            text = tokenizer.decode(ids)
            ends = [(place + len(stop), -len(stop)) for stop in stops if (place := text.find(stop)) >= 0]
            if ends:
                finish, length = min(ends)
                return ids, text[: finish + length]
        return ids, tokenizer.decode(ids)


async def fuzz_equal(
    url: str, reference: Reference, outcome: Outcome, *, count: int, seed: int, limit_s: float
) -> None:
    """Ask until `count` inputs were compared, or the time is over."""
    give_up_at = time.monotonic() + limit_s
    groups = iter(range(outcome.inputs // GROUP, -(-count // GROUP)))

    async def ask() -> None:
        for number in groups:
            group = draw_group(random.Random(seed * 1_000_003 + number))
            expected = []
            for body in group.bodies:
                expected.append(reference.complete(body, tiny_tokenizer()))
                await asyncio.sleep(0)
            right: list[Any] = [
                [together(group, reference, *each) for each in zip(group.bodies, expected, strict=True)]
            ]
            right = [*right * 2, [expected[number % GROUP]] * 3]
            told = [*await ask_together(url, group), await ask_alone(url, group.bodies[number % GROUP])]
            if told != right:
                outcome.faults.append(json.dumps({"bodies": group.bodies, "told": told, "expected": right}))
            outcome.inputs += GROUP
            outcome.scored += GROUP * (group.num_top is not None)
            outcome.tokens += sum(len(ids) for ids, _ in expected)
            outcome.stopped += sum(len(ids) < group.bodies[0]["max_new_tokens"] for ids, _ in expected)
            if time.monotonic() > give_up_at or len(outcome.faults) > 20:
                return

    started = time.monotonic()
    await asyncio.gather(*(ask() for _ in range(NUM_CLIENTS)))
    outcome.seconds += time.monotonic() - started


@dataclass(frozen=True)
class Group:
    """Requests that differ in prompt and seed alone; the seeds follow each other, as /v1 gives them."""

    bodies: list[dict[str, Any]]
    num_top: int | None
    """Alternatives to ask for beside the scores of prompt and completion; None: no scores."""
    is_prompt_alone: bool
    """Whether /v1 is asked for no token behind the prompt."""


def draw_group(draw: random.Random) -> Group:
    common = draw_body(draw)
    prompts = [draw_body(draw)["prompt"] for _ in range(GROUP)]
    bodies = [
        common | {"prompt": prompt, "seed": (common["seed"] + place) % 2**63} for place, prompt in enumerate(prompts)
    ]
    num_top = draw.choice((0, 1, 5, 20)) if draw.random() < 0.2 else None
    return Group(bodies, num_top, is_prompt_alone=num_top is not None and draw.random() < 0.5)


def together(group: Group, reference: Reference, body: dict[str, Any], completed: tuple[list[int], str]) -> list[Any]:
    """What /v1 must tell of one request: its text, and the scores of what stands in it."""
    ids, text = completed
    if group.num_top is None:
        return [text, None]
    drawn, text = ([], "") if group.is_prompt_alone else (ids, text)
    return [body["prompt"] + text, reference.rate([*tiny_tokenizer().encode(body["prompt"]), *drawn])]


async def ask_twice(url: str, path: str, body: dict[str, Any]) -> tuple[Any, list[Event]]:
    """Return the blocking answer and the events of the stream, each on a connection of its own."""

    async def whole(connection: Connection) -> Any:
        return (await connection.ask("POST", path, body)).json()

    async def streamed(connection: Connection) -> list[Event]:
        await connection.begin("POST", path, body | {"stream": True})
        return [event async for event in connection.events()]

    return await unless_stopped(url, whole), await unless_stopped(url, streamed)


async def unless_stopped(url: str, ask: Callable[[Connection], Awaitable[T]]) -> T:
    """Ask; again if this process slept (SIGSTOP, for others who measure) for so long that the service hung up."""
    while True:
        started = time.monotonic()
        try:
            async with Connection(url) as connection:
                return await ask(connection)
        except ConnectionLost:
            if time.monotonic() - started < LONG_SLEEP_S:
                raise


async def ask_together(url: str, group: Group) -> list[Any]:
    """Return what /v1/completions answers whole, and what it streams: of each prompt the text and its scores."""
    body = {"temperature": 0.7, "top_p": 0.95, **group.bodies[0], "prompt": [one["prompt"] for one in group.bodies]}
    body["max_tokens"] = body.pop("max_new_tokens")
    if group.num_top is not None:
        body |= {"echo": True, "logprobs": group.num_top} | ({"max_tokens": 0} if group.is_prompt_alone else {})
    answer, events = await ask_twice(url, "/v1/completions", body)
    end_names = () if body.get("ignore_eos") else ("<|endoftext|>", "<|im_end|>")
    whole = gather(answer.get("choices", []), end_names)
    parts = [choice for event in events if event.data != "[DONE]" for choice in event.data.get("choices", [])]
    streamed = gather(parts, end_names)
    return [whole, streamed]


def gather(choices: Iterable[dict[str, Any]], end_names: Sequence[str]) -> list[Any]:
    """Put the pieces of each choice together: text, and log-probabilities, None without any.

    The entry of an end token that ended the text is checked to be there and left out: the plain loop does not tell it.
    """
    told: list[Any] = [["", None] for _ in range(GROUP)]
    names: list[list[str]] = [[] for _ in range(GROUP)]
    for choice in choices:
        place, logprobs = choice["index"], choice["logprobs"]
        told[place][0] += choice["text"]
        if logprobs is not None:
            told[place][1] = (told[place][1] or []) + logprobs["token_logprobs"]
            names[place] += logprobs["tokens"]
        if choice["finish_reason"] == "stop" and names[place] and names[place][-1] in end_names:
            assert told[place][1].pop() <= 0
    return told


async def ask_alone(url: str, body: dict[str, Any]) -> list[Any]:
    """Return (tokens, text) as /generate answers whole, as it streams them, and as the stream's end says."""
    answer, events = await ask_twice(url, "/generate", body)
    told = [event.data for event in events if event.name == "token"]
    streamed = ([token_id for data in told for token_id in data["token_ids"]], "".join(data["text"] for data in told))
    whole, done = ((said.get("token_ids"), said.get("text")) for said in (answer, events[-1].data))
    return [whole, streamed, done]


def run_schemathesis(
    url: str, *, seconds: float, max_examples: int, seed: int, checks: str = CHECKS
) -> tuple[int, str]:
    """Return schemathesis' exit code and what it printed."""
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    command += [f"{url}/openapi.json", "--mode", "all", "--phases", "examples,coverage,fuzzing", "--checks", checks]
    command += ["--max-time", str(round(seconds)), "--max-examples", str(max_examples), "--seed", str(seed)]
    command += ["--continue-on-failure", "--no-color", "--warnings", "off", "--request-timeout", "60"]
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=os.environ, check=False)
    return done.returncode, done.stdout + done.stderr


async def statuses(url: str) -> Counter[int]:
    """How often the API answered with each status since it started."""
    async with Connection(url) as connection:
        text = (await connection.ask("GET", "/metrics")).body.decode()
    found: Counter[int] = Counter()
    for status, value in re.findall(r'^api_requests_total\{.*status="(\d+)"\} (\S+)$', text, re.MULTILINE):
        found[int(status)] += round(float(value))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["equal", "schema"], choices=["equal", "schema"])
    parser.add_argument("--count", type=int, default=NUM_WANTED)
    parser.add_argument(
        "--seconds", type=float, default=SCHEMA_S, help="of schema; equal ends when its count is reached"
    )
    parser.add_argument("--limit-s", type=float, default=86_400.0, help="of equal")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    is_good = True
    with tempfile.TemporaryDirectory() as directory, tiny_service(Path(directory)) as (url, folder):
        if "equal" in options.parts:
            reference = Reference(folder, getattr(torch, steady_dtype()))
            kept = options.results is not None and options.results.exists()
            outcome = Outcome(**json.loads(options.results.read_text())) if kept else Outcome()
            asyncio.run(
                fuzz_equal(url, reference, outcome, count=options.count, seed=options.seed, limit_s=options.limit_s)
            )
            if options.results is not None:
                options.results.write_text(json.dumps(asdict(outcome)))
            print(
                f"equal: {outcome.inputs:,} inputs, {outcome.tokens:,} tokens, {outcome.stopped:,} stopped early, "
                f"{outcome.scored:,} with scores, "
                f"{len(outcome.faults)} differ, {outcome.seconds:.0f} s"
            )
            for fault in outcome.faults[:5]:
                print(f"  {fault[:1_000]}")
            is_good &= not outcome.faults
        if "schema" in options.parts:
            code, text = run_schemathesis(url, seconds=options.seconds, max_examples=1_000, seed=options.seed)
            print(text[text.find("= FAILURES") :] if code else text[text.find("= SUMMARY") :])
            is_good &= code == 0
        print("answers by status:", dict(sorted(asyncio.run(statuses(url)).items())))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
