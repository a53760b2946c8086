"""What the recipes' settings are worth: held-out loss at equal tokens, and steps to the original's final loss.

    python -m benchmarks.learning [--steps 500] [--seeds 1 2 3] [--recipes original smollm2 muon] [--set NAME:KEY=VALUE]

Network, tokenizer, batch and data are those of `cpu`, its five stages squeezed into `--steps`; optimizer, schedule and
initialisation are those of each recipe, warmup as the same share of all steps. Each run (recipe, seed) is one line of
`--output`/runs.jsonl; runs that stand there already are not repeated, so it may be stopped at any time. The report goes
to stdout and the plot to `--output`/learning.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trainer.config import Directories, TrainConfig
from trainer.evaluate import evaluate, mean_loss
from trainer.recipe import RECIPES_DIR, apply_override, load_recipe, parse_recipe
from trainer.recipe_data import prepare_data
from trainer.run_folder import append_row, read_rows
from trainer.train import Trainer

LEARNING_FIELDS = (
    "optimizer",
    "learning_rate",
    "min_learning_rate",
    "schedule",
    "decay_share",
    "betas",
    "eps",
    "muon_momentum",
    "weight_decay",
    "decay_embeddings",
    "clip_norm",
    "scale_residual_init",
)
BASELINE = "original"
EVALUATE_EVERY = 20
Rows = Sequence[dict[str, Any]]


def settings_at_cpu_scale(recipe_name: str, *, num_steps: int, seed: int, overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe's way of learning on the network, data and batch of `cpu`."""
    settings = tomllib.loads((RECIPES_DIR / "cpu.toml").read_text(encoding="utf-8"))
    recipe = load_recipe(recipe_name)
    settings |= recipe.model_dump(mode="json", include=set(LEARNING_FIELDS))
    settings["warmup_steps"] = max(1, round(recipe.warmup_steps / recipe.num_steps * num_steps))
    scale = num_steps / settings["num_steps"]
    for stage in settings["stages"]:
        stage["start_step"], stage["end_step"] = round(stage["start_step"] * scale), round(stage["end_step"] * scale)
    settings |= {"name": recipe_name, "num_steps": num_steps, "seed": seed}
    for override in overrides:
        apply_override(settings, override)
    return parse_recipe(settings, recipe_name)


def learn(config: TrainConfig) -> dict[str, Any]:
    """Train once and return the held-out losses on the way: {"curve": [{"step", "loss", SOURCE...}]}."""
    data = prepare_data(config.data, Directories())
    trainer = Trainer(config, data)
    curve: list[dict[str, float]] = []
    started = time.perf_counter()
    training_s = 0.0
    while trainer.step < config.num_steps:
        before = time.perf_counter()
        trainer.train_step()
        training_s += time.perf_counter() - before
        if trainer.step % EVALUATE_EVERY and trainer.step != config.num_steps:
            continue
        assert trainer.is_healthy(), f"{config.name}: the loss is not a number at step {trainer.step}"
        results = evaluate(
            trainer.model,
            data.token_files,
            sequence_length=config.sequence_length,
            max_windows=config.evaluate_windows,
            rows_per_pass=config.micro_batch_size,
            dtype=trainer.dtype,
        )
        assert results is not None, "nothing asks it to stop"
        sources = {source: result.loss for source, result in results.items()}
        curve.append({"step": trainer.step, "loss": mean_loss(results), **sources})
        logging.info("%s seed %d step %d: %.4f", config.name, config.seed, trainer.step, curve[-1]["loss"])
    return {"curve": curve, "training_s": training_s, "wall_s": time.perf_counter() - started}


def steps_to_reach(curve: Rows, loss: float) -> float:
    """The first step whose held-out loss is at most `loss`, on the straight line between evaluations; inf: never."""
    previous: dict[str, Any] | None = None
    for point in curve:
        if point["loss"] <= loss:
            if previous is None:
                return float(point["step"])
            share = (previous["loss"] - loss) / (previous["loss"] - point["loss"])
            return float(previous["step"] + share * (point["step"] - previous["step"]))
        previous = point
    return float("inf")


def report(runs: Rows, recipes: Sequence[str]) -> str:
    """The table: final held-out loss per source, mean and range over seeds, and steps to the baseline's final loss."""
    final_of_baseline = {run["seed"]: run["curve"][-1]["loss"] for run in runs if run["recipe"] == BASELINE}
    sources = [key for key in runs[0]["curve"][-1] if key not in ("step", "loss")]
    lines = [
        f"| settings | {' | '.join(sources)} | mean of sources | steps to `{BASELINE}`'s final loss | share |",
        "|---|" + "---|" * (len(sources) + 3),
    ]
    for recipe in recipes:
        chosen = [run for run in runs if run["recipe"] == recipe and run["seed"] in final_of_baseline]
        if not chosen:
            continue
        cells = [mean_and_range([run["curve"][-1][key] for run in chosen]) for key in [*sources, "loss"]]
        reached = [steps_to_reach(run["curve"], final_of_baseline[run["seed"]]) for run in chosen]
        num_steps = chosen[0]["curve"][-1]["step"]
        steps = mean_and_range(reached, digits=0)
        share = mean_and_range([100 * value / num_steps for value in reached], digits=0)
        lines.append(f"| `{recipe}` | {' | '.join(cells)} | {steps} | {share} % |")
    return "\n".join(lines)


def mean_and_range(values: Sequence[float], *, digits: int = 3) -> str:
    """3.141 (3.100-3.200)"""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def draw(runs: Rows, recipes: Sequence[str], path: Path) -> None:
    """One panel per source and one for their mean: each seed's curve, and the baseline's final loss."""
    panels = ["loss", *(key for key in runs[0]["curve"][-1] if key not in ("step", "loss"))]
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for color, recipe in enumerate(recipes):
            for number, run in enumerate(run for run in runs if run["recipe"] == recipe):
                curve = run["curve"]
                axes.plot(
                    [point["step"] for point in curve],
                    [point[panel] for point in curve],
                    color=f"C{color}",
                    linewidth=1,
                    alpha=0.8,
                    label=recipe if number == 0 else None,
                )
        ends = [run["curve"][-1][panel] for run in runs if run["recipe"] == BASELINE]
        if ends:
            axes.axhline(statistics.fmean(ends), color="C0", linestyle=":", linewidth=1)
        axes.set_title("mean of sources" if panel == "loss" else panel, fontsize="medium")
        axes.set_xlabel("step")
        axes.set_ylabel("held-out loss, nats per token" if index == 0 else "")
        axes.set_ylim(top=min(7.0, max(point[panel] for run in runs for point in run["curve"])))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipes", nargs="+", default=[BASELINE, "smollm2", "muon"])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as this process may use")
    parser.add_argument("--most-runs", type=int, default=1_000_000, help="stop after so many new ones")
    parser.add_argument("--output", type=Path, default=Path("build/learning"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "runs.jsonl"
    wanted = [(recipe, seed) for seed in options.seeds for recipe in options.recipes]
    done = {(run["recipe"], run["seed"]) for run in read_rows(results)}
    for recipe, seed in [pair for pair in wanted if pair not in done][: options.most_runs]:
        overrides = [f"num_threads={options.threads}", *options.overrides]
        config = settings_at_cpu_scale(recipe, num_steps=options.steps, seed=seed, overrides=overrides)
        append_row(results, {"recipe": recipe, "seed": seed, **learn(config)})
    runs = [run for run in read_rows(results) if (run["recipe"], run["seed"]) in wanted]
    print(report(runs, options.recipes))
    draw(runs, options.recipes, options.output / "learning.png")
    print(json.dumps({"plot": str(options.output / "learning.png")}))


if __name__ == "__main__":
    main()
