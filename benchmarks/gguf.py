"""Does llama.cpp say what we say? Token ids and greedy tokens of the GGUF files we write, on the real weights.

    python -m benchmarks.gguf [models/smollm2-135m-instruct]

Greedy tokens are compared by induction: llama.cpp's completion is read by our fp32 network in one pass, and each of its
tokens must be our likeliest after the ones before it. What differs is told with how much worse we rate it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.parity import prompts
from benchmarks.strings import awkward_strings
from shared.checkpoint import half_tensors, load_export
from shared.gguf_export import GGUF_KINDS, write_gguf
from tests.shared.llama_cpp import LlamaCpp

NUM_NEW_TOKENS = 32
NUM_STRINGS = 300
LEAST_AGREEMENT = {"f16": 0.99, "q8_0": 0.95}


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--prompts", type=int, default=20, help="how many, of 1 to 1,000 tokens")
    options = parser.parse_args()
    model, tokenizer = load_export(options.folder, device=torch.device("cpu"), dtype=torch.float32)
    # NUL ends a string for llama.cpp's C interface.
    strings = [text for text in awkward_strings(NUM_STRINGS, seed=1) if "\0" not in text]
    failed = False
    print("| file | MiB | same ids | same greedy tokens | completions equal | worst of the others, nats |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in GGUF_KINDS:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, half_tensors(model), model.config, tokenizer, name="benchmark", kind=kind)
            llama = LlamaCpp(path, context=2_048, threads=1)
            same_ids = sum(llama.encode(text) == tokenizer.encode(text) for text in strings)
            equal = total = completions = 0
            worst = 0.0
            prompt_list = prompts(tokenizer)[: options.prompts]
            for prompt_ids in prompt_list:
                tokens = llama.complete(prompt_ids, NUM_NEW_TOKENS)["tokens"]
                ids = torch.tensor([[*prompt_ids, *tokens]])
                logits = model(ids[:, :-1])[0, len(prompt_ids) - 1 :]
                chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
                behind = logits.amax(-1) - chosen
                equal += int((behind == 0).sum())
                total += len(tokens)
                completions += bool((behind == 0).all())
                worst = max(worst, float(behind.max()))
            failed |= equal / total < LEAST_AGREEMENT[kind] or same_ids < len(strings)
            print(
                f"| {kind} | {path.stat().st_size / 2**20:.1f} | {same_ids} of {len(strings)} | {equal / total:.2%} of "
                f"{total} | {completions} of {len(prompt_list)} | {worst:.3f} |",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
