"""Tokens per second of the engine and of transformers' `generate`, on the same weights in one run.

    python -m benchmarks.engine [models/smollm2-135m-instruct] [--streams 1 8 32] [--tokens 64]

Greedy, end tokens ignored, prompts of 16 tokens, both in the arithmetic the engine chose. The figure is decoded tokens
over wall time, prompts included. Memory is the process' resident set before transformers is loaded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from service.engine.host import Host, load_host
from service.engine.sequence import Sequence
from shared.catalog import read_model_folder
from shared.device import choose_device, choose_dtype, choose_num_threads
from shared.sampling import SamplingParams

PROMPT_TOKENS = 16


def prompts(num_streams: int, vocab_size: int) -> list[list[int]]:
    """Different prompts, so that nothing is shared between streams."""
    generator = torch.Generator().manual_seed(num_streams)
    drawn: Tensor = torch.randint(0, vocab_size, (num_streams, PROMPT_TOKENS), generator=generator)
    return [row.tolist() for row in drawn]


def engine_speed(host: Host, num_streams: int, num_tokens: int) -> float:
    """Return decoded tokens per second of all streams together."""
    engine = host.engine
    started = time.perf_counter()
    for number, prompt_ids in enumerate(prompts(num_streams, host.folder.config.vocab_size)):
        engine.add(
            Sequence(
                id=str(number),
                prompt_ids=prompt_ids,
                params=SamplingParams(temperature=0.0),
                max_new_tokens=num_tokens,
                ignore_eos=True,
            )
        )
    num_drawn = 0
    while engine.has_work:
        num_drawn += sum(len(output.token_ids) for output in engine.step())
    assert num_drawn == num_streams * num_tokens, num_drawn
    return num_drawn / (time.perf_counter() - started)


def transformers_speed(path: Path, dtype: torch.dtype, num_streams: list[int], num_tokens: int) -> dict[int, float]:
    """The same work for the reference implementation."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)  # in eval mode already
    speeds = {}
    for streams in num_streams:
        ids = torch.tensor(prompts(streams, model.config.vocab_size))
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, **settings)
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **settings)
        speeds[streams] = streams * num_tokens / (time.perf_counter() - started)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    threads, device = choose_num_threads(0), choose_device("auto")
    torch.set_num_threads(threads.value)
    dtype = choose_dtype(device.value, "auto", purpose="serve")
    print(f"{threads.value} threads; {device.value}: {device.reason}; {dtype.value}: {dtype.reason}")
    started = time.perf_counter()
    host = load_host(
        read_model_folder(options.model), device=device.value, dtype=dtype.value, num_slots=32, max_cached_tokens=16_384
    )
    print(f"loaded in {time.perf_counter() - started:.1f} s")
    ours = {streams: engine_speed(host, streams, options.tokens) for streams in options.streams}
    print(f"resident memory {psutil.Process().memory_info().rss / 2**20:,.0f} MiB")
    theirs = transformers_speed(options.model, dtype.value, options.streams, options.tokens)
    print(f"{'streams':>8}{'engine':>12}{'transformers':>15}{'ratio':>8}   tokens/s")
    for streams in options.streams:
        ratio = ours[streams] / theirs[streams]
        print(f"{streams:>8}{ours[streams]:>12.1f}{theirs[streams]:>15.1f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
