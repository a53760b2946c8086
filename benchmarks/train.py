"""Tokens per second of training: this trainer, Hugging Face's network in a usual loop, and the original's plain loop.

    python -m benchmarks.train [--rows 4] [--accumulate 1 8] [--rounds 3] [--seconds 12]

All in one process on the same machine, threads, arithmetic and tokens: recipe `original` (135M, rows of 128). Each
contender does whole updates (forward, backward, clipping where it has any, optimizer); the contenders take turns,
`--rounds` times, and each one's best round counts, so that a passing disturbance hits nobody's figure. Compilation is
timed apart. First the floor: 6 x parameters x tokens over the rate of this machine's matrix products at these sizes.

- this trainer: `trainer.train.Trainer.train_step`, everything automatic;
- Hugging Face: `LlamaForCausalLM` with its own loss, autocast, fused AdamW, clipping: what `transformers.Trainer` runs;
- plain: a loop as the original's: autocast, loss over all logits, `.item()` per micro-batch, AdamW as torch chooses.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.config import ModelConfig
from shared.model import SmolLM2
from trainer.config import Directories, TrainConfig
from trainer.metrics import flops_per_token
from trainer.prepare import PreparedData
from trainer.recipe import load_recipe
from trainer.recipe_data import prepare_data
from trainer.train import Trainer

Update = Callable[[int], None]
"""Does the update of one step."""


def matmul_seconds(shape: ModelConfig, num_tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the least time of all matrix products of one forward and backward pass: each size measured, its best."""
    kv_size = shape.num_key_value_heads * shape.head_dim
    layers, hidden, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    sizes = [(hidden, hidden, 2 * layers), (hidden, kv_size, 2 * layers), (hidden, inner, 2 * layers)]
    sizes += [(inner, hidden, layers), (hidden, shape.vocab_size, 1)]
    total = 0.0
    for num_inputs, num_outputs, count in sizes:
        x, w, g = (
            torch.randn(size, dtype=dtype, device=device)
            for size in ((num_tokens, num_inputs), (num_outputs, num_inputs), (num_tokens, num_outputs))
        )
        for left, right in ((x, w.t()), (g, w), (g.t(), x)):
            total += count * min(timed(functools.partial(torch.mm, left, right)) for _ in range(8))
    return total


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def micro_batches(trainer: Trainer, config: TrainConfig, step: int) -> list[tuple[Tensor, Tensor]]:
    """The step's rows as the recipe splits them."""
    batch = trainer.batches.batch_at(step)
    inputs, targets = (
        torch.from_numpy(array).contiguous().to(trainer.device) for array in (batch.inputs_BT, batch.targets_BT)
    )
    return list(
        zip(torch.split(inputs, config.micro_batch_size), torch.split(targets, config.micro_batch_size), strict=True)
    )


def hugging_face(trainer: Trainer, config: TrainConfig) -> Update:
    """The reference network in the loop that `transformers.Trainer` runs, without its bookkeeping."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in trainer.model_config.to_hf().items() if key != "torch_dtype"}
    make: Any = LlamaForCausalLM
    model: Any = make(LlamaConfig(**settings)).to(trainer.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def update(step: int) -> None:
        parts = micro_batches(trainer, config, step)
        for inputs, targets in parts:
            with torch.autocast(trainer.device.type, dtype=trainer.dtype):
                # shift_labels: the targets are the next tokens already
                loss = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def plain(trainer: Trainer, config: TrainConfig) -> Update:
    """A loop as in the original's train.py."""
    model = SmolLM2(trainer.model_config).to(trainer.device)
    model.initialize(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def update(step: int) -> None:
        parts = micro_batches(trainer, config, step)
        logged = 0.0
        for inputs, targets in parts:
            with torch.autocast(trainer.device.type, dtype=trainer.dtype):
                logits = model(inputs)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
            logged += loss.item()
        optimizer.step()
        optimizer.zero_grad()

    return update


def ours(trainer: Trainer) -> Update:
    """This trainer's update, whatever its own step number."""

    def update(step: int) -> None:
        trainer.step = step
        trainer.train_step()

    return update


def speed(update: Update, tokens_per_step: int, *, seconds: float) -> float:
    """Tokens per second over whole updates for at least `seconds`."""
    started = time.perf_counter()
    step = 0
    while (spent := time.perf_counter() - started) < seconds or step < 2:
        update(step)
        step += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return step * tokens_per_step / spent


def compare(config: TrainConfig, data: PreparedData, *, rounds: int, seconds: float) -> None:
    """Print the table of one way to split a step."""
    trainer = Trainer(config, data)
    hardware = trainer.hardware
    print(
        f"\n{config.gradient_accumulation_steps} x {config.micro_batch_size} rows of {config.sequence_length} per step"
    )
    print(hardware.description(), flush=True)
    contenders = {
        "this trainer": ours(trainer),
        "Hugging Face": hugging_face(trainer, config),
        "plain loop": plain(trainer, config),
    }
    for name, update in contenders.items():
        print(f"  first update of {name}: {timed(functools.partial(update, 0)):.1f} s", flush=True)
    num_tokens = hardware.micro_batch.value * config.sequence_length
    matmul_s = matmul_seconds(trainer.model_config, num_tokens, trainer.dtype, trainer.device)
    floor = num_tokens / matmul_s
    rate = flops_per_token(trainer.model_config, 0) * floor
    print(f"  floor: {floor:,.0f} tokens/s, the matrix products alone at {rate / 1e12:.2f} TFLOP/s", flush=True)
    best = dict.fromkeys(contenders, 0.0)
    for _ in range(rounds):
        for name, update in contenders.items():
            best[name] = max(best[name], speed(update, config.tokens_per_step, seconds=seconds))
    print("\n| contender | tokens/s | against Hugging Face | share of the floor |\n|---|---|---|---|")
    for name, value in best.items():
        print(f"| {name} | {value:,.0f} | {value / best['Hugging Face']:.2f} x | {value / floor:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    data = prepare_data(load_recipe("original").data, Directories())
    for accumulate in options.accumulate:
        split = [f"micro_batch_size={options.rows}", f"gradient_accumulation_steps={accumulate}"]
        config = load_recipe("original", [*split, *options.overrides])
        compare(config, data, rounds=options.rounds, seconds=options.seconds)


if __name__ == "__main__":
    main()
