"""Is our network the network? Logits, greedy tokens and token ids against transformers, on the real weights.

    python -m benchmarks.parity [models/smollm2-135m-instruct]

Prints one row per prompt and exits 1 where a figure misses its limit.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.strings import awkward_strings
from shared.checkpoint import load_export
from shared.generate import generate
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from shared.tokenizer import Tokenizer

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 128, 144, 200, 256, 300, 400, 512, 700, 900, 1_000)
NUM_NEW_TOKENS = 64
LOGIT_LIMIT = 1e-4
NUM_STRINGS = 5_000


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Cut prompts of `LENGTHS` tokens out of prose, code and awkward strings."""
    root = Path(__file__).parent.parent
    texts = [(root / name).read_text() for name in ("LICENSE", "shared/model.py", "pyproject.toml")]
    texts.append("\n".join(awkward_strings(200, seed=1)))
    ids = [tokenizer.encode(text) for text in texts]
    draw = random.Random(0)
    cut = []
    for place, length in enumerate(LENGTHS):
        source = ids[place % len(ids)]
        start = draw.randrange(len(source) - length)
        cut.append(source[start : start + length])
    return cut


@torch.inference_mode()
def compare_prompt(ours: SmolLM2, theirs: Any, prompt_ids: list[int]) -> tuple[float, int]:
    """Return the largest difference of any logit of the prompt, and how many of the greedy tokens agree.

    Theirs are generated with their cache. Ours are read off one pass over the same tokens: as long as each is our
    likeliest after the ones before it, our greedy completion is the same, by induction.
    """
    prompt = torch.tensor([prompt_ids], device=ours.device)
    difference = float((ours(prompt).float() - theirs(prompt).logits.float()).abs().max())
    whole = theirs.generate(
        prompt, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    likeliest = ours(whole[:, :-1])[0, len(prompt_ids) - 1 :].argmax(-1)
    equal = (likeliest == whole[0, len(prompt_ids) :]).cumprod(0)
    return difference, int(equal.sum())


def compare_models(folder: Path, device: torch.device) -> bool:
    from transformers import AutoModelForCausalLM

    ours, tokenizer = load_export(folder, device=device, dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.to(device).eval()
    theirs.generation_config.eos_token_id = None  # compare all the tokens, also past the end
    print(f"{'prompt':>8} {'max logit difference':>22} {'greedy tokens equal':>20}")
    worst, fewest = 0.0, NUM_NEW_TOKENS
    for prompt_ids in prompts(tokenizer):
        difference, equal = compare_prompt(ours, theirs, prompt_ids)
        print(f"{len(prompt_ids):>8} {difference:>22.2e} {equal:>15} of {NUM_NEW_TOKENS}", flush=True)
        worst, fewest = max(worst, difference), min(fewest, equal)
    print(f"worst: {worst:.2e} (limit {LOGIT_LIMIT:.0e}), fewest equal: {fewest} of {NUM_NEW_TOKENS}")
    return worst <= LOGIT_LIMIT and fewest == NUM_NEW_TOKENS


def compare_tokenizers(folder: Path) -> bool:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    strings = awkward_strings(NUM_STRINGS, seed=0)
    ids = ours.encode_batch(strings)
    encoded = sum(
        theirs(text, add_special_tokens=False).input_ids == mine for text, mine in zip(strings, ids, strict=True)
    )
    decoded = sum(
        theirs.decode(mine, skip_special_tokens=skip) == ours.decode(mine, skip_special_tokens=skip)
        for mine in ids
        for skip in (True, False)
    )
    print(
        f"token ids equal: {encoded} of {len(strings)} strings; decoded back equally: {decoded} of {2 * len(strings)}"
    )
    return encoded == len(strings) and decoded == 2 * len(strings)


def capital_of_france(folder: Path) -> bool:
    model, tokenizer = load_export(folder, device=torch.device("cpu"), dtype=torch.float32)
    if not tokenizer.has_chat_template:
        return True
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}]))
    ends = {tokenizer.special_tokens.get("<|im_end|>", -1), tokenizer.end_of_text_id}
    answer = tokenizer.decode(
        list(generate(model, prompt, SamplingParams(temperature=0.0), max_new_tokens=24, end_token_ids=ends))
    )
    print(f"What is the capital of France? {answer!r}")
    return "Paris" in answer


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our network with transformers on real weights.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    started = time.monotonic()
    passed = [
        compare_tokenizers(options.folder),
        capital_of_france(options.folder),
        compare_models(options.folder, torch.device(options.device)),
    ]
    print(f"{'equal' if all(passed) else 'NOT EQUAL'}, {time.monotonic() - started:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
