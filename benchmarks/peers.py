"""One engine in a process of its own, asked by `benchmarks.serve` over lines of JSON: ours, llama.cpp, transformers.

Each line {"streams": S, "prompt": P, "tokens": N} is answered by {"seconds": wall time of S greedy completions of N
tokens after prompts of P, all sent at once}.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shared.catalog import read_model_folder
from shared.checkpoint import load_export
from shared.device import choose_num_threads

Run = Callable[[list[list[int]], int], None]
MOST_STREAMS = 64
MOST_TOKENS = 1_024
NAMES = ("ours", "ours int8", "llama.cpp F16", "llama.cpp BF16", "llama.cpp Q8_0", "transformers bf16")


def prompts(num_streams: int, length: int, seed: int) -> list[list[int]]:
    """Different prompts every time, so that nothing is shared between streams or found in a cache."""
    draw = random.Random(seed)
    return [[draw.randrange(100, 49_000) for _ in range(length)] for _ in range(num_streams)]


def ours(folder: Path, weights: str) -> tuple[Run, str]:
    from service.engine.host import load_host
    from service.engine.sequence import Sequence
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


def llama_cpp(folder: Path, kind: str) -> tuple[Run, str]:
    """llama.cpp's own server in this process, its slots filled by concurrent requests."""
    import gguf
    import xllamacpp

    from shared.gguf_export import add_sizes, add_tokenizer, gguf_name, gguf_tensor

    model, tokenizer = load_export(folder, device=torch.device("cpu"), dtype=torch.float32)
    path = Path(tempfile.mkdtemp()) / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, model.config)
    add_tokenizer(writer, tokenizer, model.config, end_token_id=None)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values, dtype = gguf_tensor(name, tensor, model.config, "q8_0" if kind == "Q8_0" else "f16")
        if kind == "BF16" and values.ndim == 2:
            dtype = gguf.GGMLQuantizationType.BF16
            values = gguf.quants.quantize(gguf.quants.dequantize(values, gguf.GGMLQuantizationType.F16), dtype)
        writer.add_tensor(gguf_name(name), values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del model
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = MOST_STREAMS * MOST_TOKENS, MOST_STREAMS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = choose_num_threads(0).value
    params.n_gpu_layers, params.warmup, params.port, params.verbosity = 0, True, 0, -1
    server = xllamacpp.Server(params)
    shutil.rmtree(path.parent)  # it is loaded: what is mapped stays until the process ends
    url = server.listening_address + "/completion"

    def complete(prompt_ids: list[int], num_tokens: int) -> None:
        body = {
            "prompt": prompt_ids,
            "n_predict": num_tokens,
            "temperature": 0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "ignore_eos": True,
        }
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            answer: Any = json.load(response)
        assert answer["tokens_predicted"] == num_tokens, answer["tokens_predicted"]

    pool = ThreadPoolExecutor(MOST_STREAMS)

    def run(requests: list[list[int]], num_tokens: int) -> None:
        list(pool.map(lambda prompt_ids: complete(prompt_ids, num_tokens), requests))

    run.server = server  # type: ignore[attr-defined]  # lives as long as the closure
    return run, xllamacpp.get_system_info().strip()


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
        return llama_cpp(folder, name.removeprefix("llama.cpp").strip())
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
