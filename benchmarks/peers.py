"""One engine in a process of its own, asked by `benchmarks.serve` over lines of JSON.

Each line {"streams": S, "prompt": P, "tokens": N} is answered by {"seconds": wall time of S greedy completions of N
tokens after prompts of P, all sent at once}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shared.device import choose_num_threads

Run = Callable[[list[list[int]], int], None]
MOST_STREAMS = 64
MOST_TOKENS = 576
"""Of prompt and completion of one stream."""
LLAMA_KINDS = ("F16", "BF16", "Q8_0")
NAMES = (
    "ours",
    "ours int8",
    *(f"llama.cpp {kind}" for kind in LLAMA_KINDS),
    *(f"llama.cpp wheel {kind}" for kind in LLAMA_KINDS),
    "vLLM bf16",
    "transformers bf16",
)
"""As the tables name them. `LLAMA_SERVER` is a llama-server built for this CPU, `VLLM_PYTHON` a Python with vLLM."""


def why_absent(name: str) -> str | None:
    """Say why a peer cannot run here and how to get it; None where it can."""
    if name.startswith("llama.cpp") and importlib.util.find_spec("gguf") is None:
        return "needs `pip install gguf`"
    if name.startswith("llama.cpp wheel"):
        return None if importlib.util.find_spec("xllamacpp") else "needs `pip install xllamacpp`"
    wanted = {"llama.cpp": ("LLAMA_SERVER", "a llama-server built here"), "vLLM": ("VLLM_PYTHON", "a Python with vLLM")}
    for peer, (variable, what) in wanted.items():
        if name.startswith(peer):
            path = os.environ.get(variable)
            if not path:
                return f"{variable} does not name {what}"
            return None if os.access(path, os.X_OK) else f"{variable} is {path!r}, which cannot be run"
    if name.startswith("transformers") and importlib.util.find_spec("transformers") is None:
        return "needs `pip install transformers`"
    return None


def interpreter(name: str) -> str:
    """The Python that has a peer."""
    return os.environ["VLLM_PYTHON"] if name.startswith("vLLM") else sys.executable


def prompts(num_streams: int, length: int, seed: int) -> list[list[int]]:
    """Different prompts every time, so that nothing is shared between streams or found in a cache."""
    draw = random.Random(seed)
    return [[draw.randrange(100, 49_000) for _ in range(length)] for _ in range(num_streams)]


def ours(folder: Path, weights: str) -> tuple[Run, str]:
    from service.engine.host import load_host
    from service.engine.sequence import Sequence
    from shared.catalog import read_model_folder
    from shared.sampling import SamplingParams

    host = load_host(
        read_model_folder(folder),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        weights="int8" if weights == "int8" else "dtype",
        num_slots=MOST_STREAMS,
        max_cached_tokens=MOST_STREAMS * MOST_TOKENS,
        speculate=False,
        share_prefixes=False,
    )

    def run(requests: list[list[int]], num_tokens: int) -> None:
        for number, prompt_ids in enumerate(requests):
            host.engine.add(
                Sequence(
                    id=str(number),
                    prompt_ids=prompt_ids,
                    params=SamplingParams(temperature=0.0),
                    max_new_tokens=num_tokens,
                    ignore_eos=True,
                )
            )
        drawn = 0
        while host.engine.has_work:
            drawn += sum(len(output.token_ids) for output in host.engine.step())
        assert drawn == len(requests) * num_tokens, drawn

    return run, type(host.engine.network).__name__


def llama_server(folder: Path, name: str) -> tuple[Run, str]:
    from benchmarks.llama_cpp import llama_cpp

    return llama_cpp(
        folder,
        name.rsplit(maxsplit=1)[-1],
        None if "wheel" in name else os.environ["LLAMA_SERVER"],
        num_slots=MOST_STREAMS,
        slot_length=MOST_TOKENS,
        num_threads=choose_num_threads(0).value,
    )


def vllm(folder: Path) -> tuple[Run, str]:
    """vLLM's engine without its server, under the Python that has it."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams, __version__  # type: ignore[import-not-found]

    engine = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=MOST_TOKENS,
        max_num_seqs=MOST_STREAMS,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def run(requests: list[list[int]], num_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt_ids} for prompt_ids in requests]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)

    return run, f"vLLM {__version__}"


def transformers(folder: Path) -> tuple[Run, str]:
    from transformers import AutoModelForCausalLM, __version__

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None

    def run(requests: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(requests)
        with torch.inference_mode():
            model.generate(
                ids,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                attention_mask=torch.ones_like(ids),
            )

    return run, f"transformers {__version__}"


def load(name: str, folder: Path) -> tuple[Run, str]:
    if name.startswith("ours"):
        return ours(folder, name.removeprefix("ours").strip())
    if name.startswith("llama.cpp"):
        return llama_server(folder, name)
    if name.startswith("vLLM"):
        return vllm(folder)
    return transformers(folder)


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(choose_num_threads(0).value)
    started = time.perf_counter()
    run, description = load(name, folder)
    print(json.dumps({"description": description, "load_s": time.perf_counter() - started}), flush=True)
    for seed, line in enumerate(sys.stdin):
        asked = json.loads(line)
        requests = prompts(asked["streams"], asked["prompt"], seed)
        started = time.perf_counter()
        run(requests, asked["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
