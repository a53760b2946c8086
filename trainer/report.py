"""The sentences and small tables of training.log and the console, from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.curriculum import Stage
from trainer.evaluate import HeldOut
from trainer.progress import duration


@dataclass(frozen=True)
class ProgressLines:
    """One train row as a line of the log and as a line of a terminal."""

    row: Mapping[str, Any]
    num_steps: int
    eta_s: float | None
    """None while nothing but the first step is known, which also compiles."""

    def plain(self) -> str:
        """Where it is, how it learns and from what, how fast."""
        row, num_steps = self.row, self.num_steps
        sources = ", ".join(f"{source} {numbers}" for source, numbers in source_figures(row).items())
        return (
            f"step {row['step']:>{len(str(num_steps))}}/{num_steps} {row['step'] / num_steps:4.0%} | {row['stage']} | "
            f"loss {row['loss']:.3f} ({sources}) | lr {row['learning_rate']:.2e} | |g| {row['grad_norm']:.2f} | "
            f"{row['tokens_per_second']:,.0f} tok/s | MFU {mfu_text(row)} | ETA {self.time_left()}"
        )

    def time_left(self) -> str:
        return "--:--" if self.eta_s is None else duration(self.eta_s)

    def live(self, width: int) -> str:
        """The same within `width` columns: what matters least leaves first where it is narrow."""
        row, share = self.row, self.row["step"] / self.num_steps
        sources = " · ".join(f"{source} {numbers}" for source, numbers in source_figures(row).items())
        parts = [  # text, and when it leaves: the largest number first, 0 never
            (progress_bar(share), 4),
            (f"{share:4.0%}", 0),
            (f"{row['step']:,}/{self.num_steps:,}", 2),
            (row["stage"], 5),
            (f"loss {row['loss']:.3f}", 0),
            (sources, 3),
            (f"lr {row['learning_rate']:.1e}", 6),
            (f"{row['tokens_per_second']:,.0f} tok/s", 1),
            (f"MFU {mfu_text(row)}", 7),
            (f"{self.time_left()} left", 0),
        ]
        for staying in range(7, -1, -1):
            line = "  ".join(text for text, leaves in parts if leaves <= staying)
            if len(line) < width:
                break
        return line[: max(0, width - 1)]


def sign_of_life(step: int, num_steps: int, *, tokens_per_second: float | None, eta_s: float | None) -> str:
    """A line between two logged steps that are far apart."""
    if tokens_per_second is None or eta_s is None:
        return f"step {step}/{num_steps} done, the next one is under way"
    return f"step {step}/{num_steps} {step / num_steps:.0%} | {tokens_per_second:,.0f} tok/s | ETA {duration(eta_s)}"


BAR_CELLS = 16


def progress_bar(share: float) -> str:
    """A bar of `BAR_CELLS` characters, in half cells."""
    halves = round(2 * BAR_CELLS * min(1.0, share))
    done = "━" * (halves // 2) + "╸" * (halves % 2)
    return done.ljust(BAR_CELLS, "─")


def source_figures(row: Mapping[str, Any]) -> dict[str, str]:
    """Each source's loss of this step and its share of the tokens since the row before."""
    figures = {}
    for source, share in row["source_share"].items():
        loss = row["source_loss"].get(source)
        figures[source] = f"{share:.0%}" if loss is None else f"{loss:.2f} {share:.0%}"
    return figures


def mfu_text(row: Mapping[str, Any]) -> str:
    return "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"


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
    """What a stage did, from its logged steps: one line over all, one per source."""
    lines = [f"=== stage {number} ({stage.name}), steps {stage.start_step}-{stage.end_step}"]
    if rows:
        mean = sum(row["loss"] for row in rows) / len(rows)
        speed = sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2]
        lines.append(
            f"  train loss: first {rows[0]['loss']:.4f}, mean {mean:.4f}, last {rows[-1]['loss']:.4f} "
            f"({len(rows)} logged steps); median {speed:,.0f} tok/s"
        )
    before, after = (evaluations[0]["held_out"], evaluations[-1]["held_out"]) if evaluations else ({}, {})
    drawn = mean_shares(rows)
    for source in dict.fromkeys([*stage.shares, *after]):
        parts = [f"share {stage.shares.get(source, 0.0):.0%}"]
        if source in drawn:
            parts[0] += f", drawn {drawn[source]:.1%}"
        losses = [row["source_loss"][source] for row in rows if source in row["source_loss"]]
        if losses:
            parts.append(f"train loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        if source in after:
            earlier = f"{before[source]['loss']:.4f} -> " if source in before else ""
            bits = f"{after[source]['bits_per_byte']:.3f} bits per byte"
            parts.append(f"held-out loss {earlier}{after[source]['loss']:.4f} ({bits})")
        lines.append(f"  {source:<12} {'; '.join(parts)}")
    return "\n".join(lines)


def mean_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each source's share of the tokens behind some rows; each row stands for the steps since the one before."""
    steps = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)], strict=False)]
    steps[:1] = steps[1:2] or steps[:1]  # the first row's own beginning is not among the rows
    totals: dict[str, float] = {}
    for row, count in zip(rows, steps, strict=True):
        for source, share in row.get("source_share", {}).items():
            totals[source] = totals.get(source, 0.0) + share * count
    whole = sum(totals.values())
    return {source: total / whole for source, total in totals.items()} if whole else {}


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
    if not num_tokens:
        return f"wall time {duration(total_s)}: {apart}; no step was left to train"
    return (
        f"wall time {duration(total_s)}: training {duration(training_s)}, {apart}; {num_tokens:,} tokens, "
        f"{num_tokens / training_s:,.0f} tok/s while training, {num_tokens / total_s:,.0f} tok/s over all of it"
    )


def stopped(step: int, saved_step: int, num_steps: int) -> str:
    """Say where a stopped run stands, and from where it will go on."""
    if saved_step == step:
        return f"stopped at step {step}/{num_steps} and saved; the same command goes on from here"
    return f"stopped at step {step}/{num_steps}; step {saved_step} is saved; the same command goes on from there"
