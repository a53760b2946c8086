"""The sentences and small tables of training.log and the console, from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.curriculum import Stage
from trainer.evaluate import HeldOut
from trainer.progress import duration


def progress_line(row: Mapping[str, Any], *, num_steps: int, eta_s: float) -> str:
    """One step for the console: where it is, how it learns, how fast."""
    sources = " ".join(f"{source} {loss:.2f}" for source, loss in row["source_loss"].items())
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return (
        f"step {row['step']:>{len(str(num_steps))}}/{num_steps} {row['step'] / num_steps:4.0%} | {row['stage']} | "
        f"loss {row['loss']:.3f} ({sources}) | lr {row['learning_rate']:.2e} | |g| {row['grad_norm']:.2f} | "
        f"{row['tokens_per_second']:,.0f} tok/s | MFU {mfu} | ETA {duration(eta_s)}"
    )


def evaluation_table(step: int, results: Mapping[str, HeldOut], gaps: Mapping[str, float]) -> str:
    """Held-out figures per source."""
    lines = [f"held-out text at step {step}:"]
    for source, result in results.items():
        gap = f", {gaps[source]:+.3f} against training" if source in gaps else ""
        lines.append(
            f"  {source:<12} loss {result.loss:.4f}  perplexity {result.perplexity:>10,.1f}  "
            f"bits per byte {result.bits_per_byte:.4f}{gap}"
        )
    return "\n".join(lines)


def stage_summary(
    number: int, stage: Stage, rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    """What a stage did, from its logged steps."""
    shares = ", ".join(f"{source} {share:.0%}" for source, share in stage.shares.items())
    lines = [f"=== stage {number} ({stage.name}), steps {stage.start_step}-{stage.end_step}, {shares}"]
    if rows:
        mean = sum(row["loss"] for row in rows) / len(rows)
        lines.append(
            f"  train loss: first {rows[0]['loss']:.4f}, mean {mean:.4f}, last {rows[-1]['loss']:.4f} "
            f"({len(rows)} logged steps)"
        )
        for source in stage.shares:
            losses = [row["source_loss"][source] for row in rows if source in row["source_loss"]]
            if losses:
                lines.append(f"  {source:<12} train loss: first {losses[0]:.4f}, last {losses[-1]:.4f}")
    if evaluations:
        before, after = evaluations[0]["held_out"], evaluations[-1]["held_out"]
        for source, numbers in after.items():
            earlier = f"{before[source]['loss']:.4f} -> " if source in before else ""
            lines.append(f"  {source:<12} held-out loss: {earlier}{numbers['loss']:.4f}")
    return "\n".join(lines)


def overfit_alarms(
    results: Mapping[str, HeldOut],
    gaps: Mapping[str, float],
    earlier: Sequence[Mapping[str, Any]],
    *,
    largest_gap: float,
) -> list[str]:
    """One sentence per source whose held-out loss rises while training's falls far below it.

    Args:
        earlier: evaluation rows before this one.
        largest_gap: nats by which held-out loss may exceed train loss.
    """
    alarms = []
    for source, result in results.items():
        seen = [(row["held_out"][source]["loss"], row["step"]) for row in earlier if source in row["held_out"]]
        if not seen or gaps.get(source, 0.0) <= largest_gap:
            continue
        best, step = min(seen)
        if result.loss > best:
            alarms.append(
                f"over-fit alarm: {source}'s held-out loss {result.loss:.3f} is {gaps[source]:.2f} above its train "
                f"loss and has risen since step {step} ({best:.3f}); more text, fewer steps or more weight decay helps"
            )
    return alarms


def samples_text(step: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """Samples as a person reads them."""
    lines = [f"samples at step {step}:"]
    for row in rows:
        text = (row["prompt"] + row["text"]).strip("\n").replace("\n", "\n  | ")
        lines.append(f"  [{row['source'] or 'any'}]\n  | {text}")
    return "\n".join(lines)


def time_summary(*, total_s: float, training_s: float, apart_s: Mapping[str, float], num_tokens: int) -> str:
    """Where the wall time of this process went, and the speed over all of it."""
    apart = ", ".join(f"{what} {duration(seconds)}" for what, seconds in apart_s.items()) or "nothing else"
    return (
        f"wall time {duration(total_s)}: training {duration(training_s)}, {apart}; {num_tokens:,} tokens, "
        f"{num_tokens / training_s:,.0f} tok/s while training, {num_tokens / total_s:,.0f} tok/s over all of it"
    )
