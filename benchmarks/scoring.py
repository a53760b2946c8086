"""What the scores of a prompt cost: tokens per second of the engine with and without them, and of transformers.

    python -m benchmarks.scoring [models/smollm2-135m-instruct] [--prompts 4] [--tokens 1000] [--rounds 3]

Prompts are cut from the repository's own files, one after the other, best of some rounds. transformers computes the
same text in one pass and keeps rows times vocabulary, as its `log_softmax` needs. The difference is that of the
log-probabilities from transformers' in fp32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.engine.engine import Engine
from service.engine.host import load_host
from service.engine.networks import choose_serving_dtype
from service.engine.sequence import Sequence
from shared.catalog import read_model_folder
from shared.device import choose_device, choose_num_threads
from shared.sampling import SamplingParams

Scores = list[np.ndarray[Any, Any]]


def prompts(encode: Callable[[str], list[int]], count: int, length: int) -> list[list[int]]:
    root = Path(__file__).parent.parent
    ids = encode("".join(path.read_text() for path in sorted((root / "shared").glob("*.py"))))
    return [ids[start : start + length] for start in range(0, count * length, length)]


def engine_scores(engine: Engine, asked: list[list[int]], num_top: int | None) -> Scores:
    """Compute the prompts, with scores or (None) without."""
    found: Scores = []
    for prompt_ids in asked:
        engine.forget_statistics()  # nothing is to be copied
        params, scores = SamplingParams(temperature=0.0), num_top is not None
        sequence = Sequence(
            id="one", prompt_ids=prompt_ids, params=params, max_new_tokens=1, logprobs=num_top, scores_prompt=scores
        )
        engine.add(sequence)
        while engine.has_work:
            for output in engine.step():
                if output.prompt_scores is not None:
                    found.append(output.prompt_scores.logprobs_T)
    return found


def transformers_scores(model: Any, asked: list[list[int]]) -> Scores:
    found: Scores = []
    for prompt_ids in asked:
        ids = torch.tensor([prompt_ids])
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, 1:, None]).squeeze(1).numpy())
    return found


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(choose_num_threads(0).value)
    device = choose_device("auto").value
    dtype = choose_serving_dtype(device, "auto").value
    host = load_host(
        read_model_folder(options.model), device=device, dtype=dtype, num_slots=8, max_cached_tokens=16_384
    )
    asked = prompts(host.engine.tokenizer.encode, options.prompts, options.tokens)
    num_tokens = sum(len(ids) for ids in asked)
    engine_scores(host.engine, asked, None)
    kinds: dict[str, Callable[[], Scores]] = {
        "engine, no scores": lambda: engine_scores(host.engine, asked, None),
        "engine, 1 alternative": lambda: engine_scores(host.engine, asked, 1),
        "engine, 20 alternatives": lambda: engine_scores(host.engine, asked, 20),
    }
    rows: dict[str, tuple[float, Scores]] = {}

    def measure(name: str, compute: Callable[[], Scores]) -> None:
        times = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            scores = compute()
            times.append(time.perf_counter() - started)
        rows[name] = num_tokens / min(times), scores

    for name, compute in kinds.items():
        measure(name, compute)
    for number in (dtype, torch.float32):
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=number)
        measure(f"transformers, {str(number).removeprefix('torch.')}", lambda: transformers_scores(model, asked))  # noqa: B023
    exact = np.concatenate(rows["transformers, float32"][1])
    for name, (speed, scores) in rows.items():
        told = f"{np.abs(np.concatenate(scores) - exact).mean():.4f}" if scores else "-"
        print(f"{name:<26}{speed:>10,.0f} tokens/s   mean difference {told}")


if __name__ == "__main__":
    main()
