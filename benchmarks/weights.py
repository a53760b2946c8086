"""What coarser weights cost in quality: perplexity and divergence from fp32 of the compiled network, on held-out text.

    python -m benchmarks.weights [models/smollm2-135m-instruct] [--windows 24]

The text is what stands in this repository and in Python's library: prose, tables and code that no public SmolLM2 was
shown in this form. Windows of 512 tokens, each predicted from its own beginning. KL(fp32 || other) in nats a token.
"""

from __future__ import annotations

import argparse
import math
import statistics as statistics_module
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from service.engine.kernels.decoder import CompiledDecoder
from service.engine.kernels.library import load_library
from service.engine.kv_cache import KVCache, Span
from shared.checkpoint import load_export
from shared.device import choose_num_threads
from shared.model import SmolLM2
from shared.tokenizer import Tokenizer

WINDOW = 512
LIMIT = 0.01
"""Perplexity that int8 weights may add."""


def windows(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    root = Path(__file__).parent.parent
    paths = [*sorted((root / "docs").glob("*.md")), root / "ARCHITECTURE.md", root / "LICENSE"]
    paths += [Path(module.__file__ or "") for module in (textwrap, statistics_module)]
    cut = []
    for path in paths:
        ids = tokenizer.encode(path.read_text())
        cut += [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, WINDOW)]
    return cut[:: max(1, len(cut) // count)][:count]


def compiled(model: SmolLM2, *, is_int8: bool) -> Callable[[list[int]], Tensor]:
    decoder = CompiledDecoder(model, load_library(), is_int8=is_int8)
    cpu = torch.device("cpu")
    cache = KVCache(
        model.config, num_slots=1, max_cached_tokens=WINDOW, dtype=torch.bfloat16, device=cpu, in_blocks=True
    )
    return lambda ids: decoder.scores(cache, ids, [Span(0, 0, len(ids))], range(len(ids)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--windows", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(choose_num_threads(0).value)

    def load(dtype: torch.dtype) -> tuple[SmolLM2, Tokenizer]:
        return load_export(options.model, device=torch.device("cpu"), dtype=dtype)

    exact, tokenizer = load(torch.float32)
    plain = load(torch.bfloat16)[0]
    networks: dict[str, Callable[[list[int]], Tensor]] = {
        "fp32, PyTorch": lambda ids: exact(torch.tensor([ids]))[0],
        "bf16, PyTorch": lambda ids: plain(torch.tensor([ids]))[0].float(),
        "bf16, kernels": compiled(load(torch.bfloat16)[0], is_int8=False),
        "int8, kernels": compiled(load(torch.float32)[0], is_int8=True),
    }
    losses = dict.fromkeys(networks, 0.0)
    divergences = dict.fromkeys(networks, 0.0)
    agreements = dict.fromkeys(networks, 0)
    num_tokens = 0
    with torch.inference_mode():
        for ids in windows(tokenizer, options.windows):
            targets = torch.tensor(ids[1:])
            expected = networks["fp32, PyTorch"](ids)[:-1].log_softmax(-1)
            num_tokens += len(targets)
            for name, network in networks.items():
                logprobs = network(ids)[:-1].log_softmax(-1)
                losses[name] -= float(logprobs.gather(1, targets[:, None]).sum())
                divergences[name] += float((expected.exp() * (expected - logprobs)).sum())
                agreements[name] += int((logprobs.argmax(-1) == expected.argmax(-1)).sum())
    print(f"{num_tokens:,} tokens")
    print("| weights | perplexity | over fp32 | KL, nats a token | same likeliest token |\n|---|---|---|---|---|")
    perplexities = {name: math.exp(loss / num_tokens) for name, loss in losses.items()}
    base = perplexities["fp32, PyTorch"]
    for name, perplexity in perplexities.items():
        print(
            f"| {name} | {perplexity:.4f} | {100 * (perplexity / base - 1):+.3f} % | "
            f"{divergences[name] / num_tokens:.2e} | {100 * agreements[name] / num_tokens:.2f} % |"
        )
    return int(perplexities["int8, kernels"] > (1 + LIMIT) * base)


if __name__ == "__main__":
    sys.exit(main())
