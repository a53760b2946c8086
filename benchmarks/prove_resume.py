"""Kill a training 25 times with SIGKILL, go on each time, and compare with the same training left in peace.

    python -m benchmarks.prove_resume [--seed N] [--folder DIR]

20 kills at random moments, among them in saves, evaluations, samplings and start-ups, and one at each of the five
stages' borders; real processes of `python -m trainer train`. What must be equal to the bit: weights and optimizer,
every logged loss, the samples, and the exported file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.files import sha256_file
from tests.trainer.kills import Moment, kill_at
from tests.trainer.small_run import command, weights_sha256
from trainer.config import TrainConfig
from trainer.recipe import load_recipe, to_toml
from trainer.run_folder import RunFolder, append_row, read_rows

STRETCH = 3  # stages of the recipe `smoke`, this many times as long


def proof_recipe() -> TrainConfig:
    """`smoke`, slow enough that a kill can hit the middle of something: steps of some 30 ms, evaluations of 200."""
    smoke = load_recipe("smoke")
    stages = [
        {"name": s.name, "start_step": STRETCH * s.start_step, "end_step": STRETCH * s.end_step, "shares": s.shares}
        for s in smoke.stages
    ]
    settings = {"name": "proof", "num_steps": STRETCH * smoke.num_steps, "stages": stages, "sequence_length": 64}
    settings |= {"evaluate_every": 10, "evaluate_windows": 32, "sample_every": 20, "sample_tokens": 40}
    settings |= {"data.held_out_share": 0.5}  # of ten kilobytes a source: an evaluation that takes a while
    model = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items() if key != "stages"]
    rows = ", ".join(
        f"{{ name = {json.dumps(row['name'])}, start_step = {row['start_step']}, end_step = {row['end_step']}, "
        f"shares = {{ {', '.join(f'{name} = {share}' for name, share in row['shares'].items())} }} }}"  # type: ignore[attr-defined]
        for row in stages
    )
    return load_recipe("smoke", [*overrides, f"stages=[{rows}]", *(f"model.{k}={v}" for k, v in model.items())])


def moments(config: TrainConfig, seed: int) -> list[Moment]:
    """The 25 kills, in the order of the steps they are meant for, so that the run gets to each of them."""
    dice = random.Random(seed)
    last = config.num_steps
    borders = [Moment(what="border", step=stage.end_step) for stage in config.stages]
    in_saves = [Moment(what="save", step=dice.randrange(1, last)) for _ in range(5)]
    in_evaluations = [Moment(what="evaluation", step=dice.randrange(1, last)) for _ in range(4)]
    in_samples = [Moment(what="samples", step=dice.randrange(1, last)) for _ in range(3)]
    anywhere = [Moment(what="anywhere", step=dice.randrange(1, last), delay_s=dice.uniform(0, 0.3)) for _ in range(5)]
    starts = [Moment(what="start-up", step=dice.randrange(1, last), delay_s=dice.uniform(0.2, 5.0)) for _ in range(3)]
    everything = [*borders, *in_saves, *in_evaluations, *in_samples, *anywhere, *starts]
    return sorted(everything, key=lambda moment: moment.step)


def evidence(root: Path, name: str) -> dict[str, str]:
    """What two runs must have in common."""
    folder = RunFolder(root / "runs" / name)
    losses = [
        (row["step"], row["loss"], row["grad_norm"]) for row in read_rows(folder.metrics) if row["kind"] == "train"
    ]
    samples = [(row["step"], row["text"]) for row in read_rows(folder.samples)]
    return {
        "weights and optimizer": weights_sha256(folder),
        "losses of all steps": hash_of(losses),
        "samples": hash_of(samples),
        "exported .pt": sha256_file(root / "models" / name / f"{name}_half.pt"),
    }


def hash_of(rows: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def to_the_end(root: Path, recipe: Path) -> None:
    """Train in one process to the end."""
    process = command(root, "train", str(recipe))
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the run failed:\n{errors}")


def row_of(number: int, moment: Moment, found: dict[str, Any] | None) -> str:
    """One line of the table."""
    meant = f"{moment.what} {f'{moment.delay_s:.1f} s' if moment.what == 'start-up' else f'>= {moment.step}'}"
    if found is None:
        return f"{number:>4}  {meant:<22}  the run ended first"
    whole, half = (" ".join(map(str, found[key])) or "-" for key in ("checkpoints", "half_written"))
    return f"{number:>4}  {meant:<22}{found['trained']:>14}  {whole:<20}{half:<14}{found['last']}"


def main() -> int:
    """Print the table; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--folder", type=Path, help="work there and keep it; a proof that was cut short goes on")
    options = parser.parse_args()
    config = proof_recipe()
    place = options.folder or Path(tempfile.mkdtemp(prefix="prove-resume-"))
    peace, war, done = place / "undisturbed", place / "disturbed", place / "kills.jsonl"
    recipe = place / "proof.toml"
    place.mkdir(parents=True, exist_ok=True)
    recipe.write_text(to_toml(config))
    print(f"{config.num_steps} steps, {len(config.stages)} stages, moments of seed {options.seed}", flush=True)
    to_the_end(peace, recipe)

    print(f"{'kill':>4}  {'meant for':<22}{'steps trained':>14}  {'whole checkpoints':<20}{'half-written':<14}last row")
    kills = read_rows(done)
    for number, moment in enumerate(moments(config, options.seed), start=1):
        if number > len(kills):
            kills.append({"found": kill_at(moment, war, config, str(recipe))})
            append_row(done, kills[-1])
        print(row_of(number, moment, kills[number - 1]["found"]), flush=True)
    to_the_end(war, recipe)

    expected, got = evidence(peace, "proof"), evidence(war, "proof")
    print()
    for what, digest in expected.items():
        print(f"{what:<24}sha256 {digest}  {'equal' if got[what] == digest else f'DIFFERENT: {got[what]}'}")
    num_missed = sum(kill["found"] is None for kill in kills)
    print(f"\n{len(kills) - num_missed} kills, {num_missed} missed")
    if expected != got:
        print(f"kept for a look: {place}")
        return 1
    if options.folder is None:
        shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
