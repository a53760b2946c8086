"""The loop around the updates: logging, evaluation, samples, checkpoints, stopping, rolling back, finishing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from shared.device import peak_flops
from shared.errors import ConfigError
from shared.files import check_target
from shared.model import SmolLM2
from trainer import report
from trainer.config import TrainConfig
from trainer.evaluate import evaluate, mean_loss
from trainer.export import export_details, export_model
from trainer.metrics import MFU_FORMULA, Clock, Metrics, SharesDrawn, flops_per_token
from trainer.optimizer import describe_groups
from trainer.plan import bytes_of_checkpoints
from trainer.plot import plot_run
from trainer.prepare import PreparedData
from trainer.processes import Command, Processes
from trainer.progress import Pace
from trainer.run_folder import RunFolder
from trainer.run_log import PLAIN_PROGRESS_EVERY_S, RunLog
from trainer.sample import sample_texts
from trainer.saver import Saver
from trainer.signals import StopRequest
from trainer.state import Best, Checkpoints, check_free_space
from trainer.track import Tracker
from trainer.train import StepResult, Trainer

logger = logging.getLogger("trainer")


class Run:
    """One recipe trained into one folder, from wherever it was left."""

    def __init__(
        self,
        config: TrainConfig,
        data: PreparedData,
        folder: RunFolder,
        *,
        models_dir: Path,
        log: RunLog,
        processes: Processes | None = None,
    ) -> None:
        """Open the run and restore its newest whole checkpoint, if it has one.

        Args:
            processes: those that train it together; this one leads, the others `follow`.

        Raises:
            ConfigError: the folder holds a run of another recipe or of other data.
            WeightsError: every checkpoint is damaged.
            StorageError: the disk refuses, or has no room for the checkpoints, or the export could not be written.
        """
        self.config, self.data, self.folder, self.log = config, data, folder, log
        self.export_folder = models_dir / (config.export_name or folder.name)
        check_target(self.export_folder)
        self.stages = config.curriculum_stages()
        self.processes = processes or Processes()
        self.trainer = Trainer(config, data, self.processes)
        self.peak = peak_flops(self.trainer.device, self.trainer.dtype)
        self.checkpoints = Checkpoints(folder.checkpoints, keep=config.keep_checkpoints)
        self.checkpoints.clear_half_written()
        self.saver = Saver(self.checkpoints)
        self.sick_at: int | None = None
        if not self.restore_newest():
            needed = bytes_of_checkpoints(self.trainer.model_config, keep_checkpoints=config.keep_checkpoints)
            check_free_space(folder.path, needed)
        self.first_step = self.saved_step = self.logged_step = self.trainer.step
        self.shares_drawn = SharesDrawn(self.trainer.batches.source_names)
        tracker = Tracker(config.track, run=folder.name, settings=config.model_dump(mode="json", exclude_none=True))
        self.metrics = Metrics(folder, resume_step=self.trainer.step, tracker=tracker)
        self.clock = Clock()
        self.pace = Pace()

    @property
    def step(self) -> int:
        """Updates done."""
        return self.trainer.step

    def restore_newest(self) -> bool:
        """Take over the newest whole checkpoint, in every process; False where there is none."""
        state = self.checkpoints.load_newest(keep_shards=self.trainer.is_sharded)
        self.processes.tell(Command.RESTORE, state["step"] if state else 0)
        self.trainer.start_afresh()
        if state is None:
            return False
        self.trainer.restore(state)
        return True

    def to_the_end(self) -> Literal["finished", "stopped"]:
        """Train until the last step, or until a signal asks to stop; then export.

        Raises:
            ConfigError: the loss is not a number, twice at the same place.
            WeightsError: weights that FP16 cannot hold.
            StorageError: the disk refused; the checkpoints so far are whole.
        """
        with StopRequest() as stop:
            self.introduce()
            self.record_run("running")
            try:
                while True:
                    self.saver.check()
                    self.observe(lambda: stop.requested)
                    stopping = stop.requested  # read once: a signal from here on counts after the next update
                    # Where a save is under way it is the last: to do its few steps again costs less than another.
                    if self.owes_save() or (stopping and not self.saver.is_busy):
                        self.save()
                    if stopping or self.step == self.config.num_steps:
                        break
                    self.advance(stop)
                if self.step == self.config.num_steps and self.finish(lambda: stop.requested):
                    return "finished"
                with self.log.alive("finishing the checkpoint"):
                    self.saver.wait()
                self.record_run("stopped")
                self.log.say(report.stopped(self.step, self.saved_step, self.config.num_steps))
                return "stopped"
            finally:
                self.close()

    def close(self) -> None:
        """Let go of files and threads; a save under way is finished first."""
        self.saver.close()
        self.metrics.close()
        with contextlib.suppress(RuntimeError):  # the others may be gone already
            self.processes.tell(Command.END)

    def advance(self, stop: StopRequest) -> None:
        """Do one update. Where anything looks at its result, make sure first that it is a result."""
        if self.processes.tell(Command.STEP):
            stop.ask()
        compiles = self.step == self.first_step and self.trainer.hardware.compile.value
        # Processes that share a step cannot give it up one by one.
        with self.log.alive("compiling the network, once per start") if compiles else contextlib.nullcontext():
            result = self.trainer.train_step(lambda: self.gives_up(stop))
        if result is None:
            return
        self.pace.note(self.step, total_s=self.clock.total_s, training_s=self.clock.training_s)
        self.shares_drawn.add(result.source_tokens_S)
        is_logged = self.step == 1 or self.is_due(self.config.log_every)  # the first tells a person that it runs
        if self.step == self.first_step + 1 and not is_logged:  # the same, and no row an undisturbed run would not have
            self.show_life()
        if not (is_logged or self.owes_evaluation() or self.owes_samples() or self.owes_save() or stop.requested):
            return
        if not self.trainer.is_healthy():
            self.roll_back()
        elif is_logged:
            self.record_step(result)

    def gives_up(self, stop: StopRequest) -> bool:
        """Between the passes of a step: break a long silence, and say whether to leave the step undone."""
        if self.log.silent_s >= PLAIN_PROGRESS_EVERY_S:
            self.show_life()
        return stop.is_urgent and self.processes.is_alone

    def show_life(self) -> None:
        """Say how far and how fast, between two rows."""
        rate, left = self.pace.steps_per_second(), self.pace.time_left(self.config.num_steps)
        speed = None if rate is None else rate * self.config.tokens_per_step
        self.log.progress(report.sign_of_life(self.step, self.config.num_steps, tokens_per_second=speed, eta_s=left))

    # What is due

    def ended_stage(self) -> int | None:
        """The index of the stage whose last update has just been done."""
        return next((index for index, stage in enumerate(self.stages) if stage.end_step == self.step), None)

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps is due now; it always is at the end of a stage."""
        return self.step % every == 0 or self.ended_stage() is not None

    def owes_evaluation(self) -> bool:
        return self.is_due(self.config.evaluate_every) and self.step not in self.metrics.evaluated_steps

    def owes_samples(self) -> bool:
        is_last = self.step == self.config.num_steps
        due = self.step > 0 and (is_last or self.step % self.config.sample_every == 0)
        return bool(self.config.prompts) and due and self.step not in self.metrics.sampled_steps

    def owes_save(self) -> bool:
        """Whether to save now; what falls due while the save before is still being written waits until it is done."""
        is_last = self.step == self.config.num_steps
        is_overdue = self.step // self.config.save_every > self.saved_step // self.config.save_every
        return self.step > self.saved_step and (is_last or (is_overdue and not self.saver.is_busy))

    # What is done around a step

    def record_step(self, result: StepResult) -> None:
        """Write the train row of this step: the only place that waits for the device to tell numbers."""
        losses_S = result.source_losses_S.tolist()
        tokens_per_second = (self.step - self.logged_step) * self.config.tokens_per_step / self.clock.lap()
        self.logged_step = self.step
        flops = flops_per_token(self.trainer.model_config, self.config.sequence_length) * tokens_per_second
        row = {
            "step": self.step,
            "stage": next(stage.name for stage in self.stages if self.step <= stage.end_step),
            "loss": result.loss.item(),
            "learning_rate": result.learning_rate,
            "tokens_per_second": tokens_per_second,
            "mfu": flops / self.peak.value if self.peak.value else None,
            "grad_norm": result.grad_norm.item(),
            "source_loss": {
                source: losses_S[index] / int(result.source_tokens_S[index])
                for index, source in enumerate(self.trainer.batches.source_names)
                if result.source_tokens_S[index]
            },
            "source_share": self.shares_drawn.take(),
            "tokens": self.step * self.config.tokens_per_step,
        }
        self.metrics.train(row)
        eta_s = self.pace.time_left(self.config.num_steps)
        lines = report.ProgressLines(row, num_steps=self.config.num_steps, eta_s=eta_s)
        self.log.progress(lines.plain(), lines.live)

    def observe(self, should_stop: Callable[[], bool]) -> None:
        """Evaluate and sample where this step owes it; what a signal cuts short the resumed run owes again."""
        if self.owes_evaluation() and not should_stop():
            with self.clock.apart("evaluation"), self.log.alive("measuring the held-out loss"):
                self.evaluate(should_stop)
        if self.owes_samples() and not should_stop():
            with self.clock.apart("samples"), self.log.alive("writing samples"):
                self.sample(should_stop)

    def evaluate(self, should_stop: Callable[[], bool]) -> None:
        """Measure held-out loss per source, say what it means, keep the checkpoint if it is the best so far."""
        results = evaluate(
            self.whole_model(),
            self.data.token_files,
            sequence_length=self.config.sequence_length,
            max_windows=self.config.evaluate_windows,
            rows_per_pass=self.config.micro_batch_size,
            dtype=self.trainer.dtype,
            mask_documents=self.config.mask_documents,
            should_stop=should_stop,
        )
        if results is None:
            return
        earlier = self.metrics.of_kind("evaluation")
        gaps = self.train_gaps({source: result.loss for source, result in results.items()}, earlier)
        self.metrics.evaluation(self.step, {source: result.as_row() for source, result in results.items()}, gaps)
        self.log.say(report.evaluation_table(self.step, results, gaps))
        for alarm in report.overfit_alarms(results, gaps, earlier, largest_gap=self.config.overfit_gap):
            logger.warning(alarm)
        if (ended := self.ended_stage()) is not None:
            stage = self.stages[ended]
            rows = self.metrics.of_kind("train", after=stage.start_step, through=stage.end_step)
            evaluations = self.metrics.of_kind("evaluation", after=stage.start_step - 1, through=stage.end_step)
            self.log.say(report.stage_summary(ended + 1, stage, rows, evaluations))
        best = self.saver.best
        if self.step > 0 and results and (best is None or mean_loss(results) < best.loss):
            self.save()
            self.saver.mark_best(Best(self.step, mean_loss(results)))

    def train_gaps(self, held_out: dict[str, float], earlier: list[dict[str, Any]]) -> dict[str, float]:
        """Held-out minus train loss per source, the latter averaged over the rows since the evaluation before."""
        rows = self.metrics.of_kind("train", after=earlier[-1]["step"] if earlier else 0)
        gaps = {}
        for source, loss in held_out.items():
            losses = [row["source_loss"][source] for row in rows if source in row["source_loss"]]
            if losses:
                gaps[source] = loss - sum(losses) / len(losses)
        return gaps

    def sample(self, should_stop: Callable[[], bool]) -> None:
        """Continue the recipe's prompts and record the texts."""
        rows = sample_texts(
            self.whole_model(),
            self.data.tokenizer,
            self.config.prompts,
            step=self.step,
            max_new_tokens=self.config.sample_tokens,
            trained_length=self.config.sequence_length,
            temperature=self.config.sample_temperature,
            seed=self.config.seed,
            should_stop=should_stop,
        )
        if rows is not None:
            self.metrics.samples(self.step, rows)
            self.log.say(report.samples_text(self.step, rows))

    def save(self) -> None:
        """Begin a checkpoint, unless this step has one. What is no number is never saved."""
        if self.step == self.saved_step:
            return
        if not self.trainer.is_healthy():  # a signal may have come after the last look
            self.roll_back()
            return
        with self.clock.apart("saves"):
            if self.trainer.is_sharded:
                self.saver.wait()
                self.checkpoints.save(self.trainer.state(), self.write_shards)
            else:
                self.saver.save(self.trainer.state())
        self.saved_step = self.step

    def write_shards(self, folder: Path) -> None:
        """Let every process write its part of a checkpoint; training waits for it."""
        self.processes.tell(Command.SAVE_SHARDS)
        self.processes.share_text(str(folder.absolute()))
        self.trainer.write_shards(folder)

    def whole_model(self) -> SmolLM2:
        """The network with all its weights, for what the leader does alone."""
        if self.trainer.is_sharded:
            self.processes.tell(Command.GATHER)
        return self.trainer.whole_model()

    def roll_back(self) -> None:
        """After a loss that is no number: go back to the last good state and try again, once.

        Raises:
            ConfigError: it happened a second time without getting further.
        """
        sick = self.step
        self.saver.wait()
        self.restore_newest()
        self.saver.best = self.checkpoints.best()
        self.saved_step = self.logged_step = self.step
        self.metrics.rewind(self.step)
        self.pace = Pace()
        self.record_run("running")
        if self.sick_at is not None and sick <= self.sick_at:
            raise ConfigError(
                f"the loss is not a number by step {sick}, twice from step {self.step} on; lower learning_rate "
                f"({self.config.learning_rate:g}) or raise warmup_steps ({self.config.warmup_steps}) and train under "
                "another name with --run NAME"
            )
        self.sick_at = sick
        logger.warning("the loss is not a number by step %d; rolled back to step %d to try again", sick, self.step)

    # Beginning and end

    def introduce(self) -> None:
        """Say what is about to happen and why it happens so."""
        shape = self.trainer.model_config
        verb = "resuming" if self.step else "training"
        self.log.say(
            f"{verb} run {self.folder.name!r} at step {self.step}/{self.config.num_steps}\n"
            f"  model      {shape.num_parameters:,} parameters, vocabulary {shape.vocab_size:,}\n"
            f"{self.trainer.hardware.description()}\n"
            f"  optimizer  {describe_groups(self.trainer.optimizer)}\n"
            f"  step       {self.config.gradient_accumulation_steps} x {self.config.micro_batch_size} rows of "
            f"{self.config.sequence_length} tokens\n"
            f"  MFU        {MFU_FORMULA}; peak {self.peak.reason}"
        )

    def record_run(self, state: str) -> None:
        """Write a row about the run itself, at the step that a resume would start from."""
        stages = [stage.model_dump(mode="json") for stage in self.config.stages]
        self.metrics.run(state, at_step=self.saved_step, num_steps=self.config.num_steps, stages=stages)

    def finish(self, should_stop: Callable[[], bool]) -> bool:
        """Plots, the export with its check, and the account of the time; False where `should_stop` came between."""
        with self.clock.apart("plots"), self.log.alive("drawing the plots"):
            plots = plot_run(self.folder)
        with self.clock.apart("export"), self.log.alive("writing and checking the export"):
            export = export_model(
                self.export_folder,
                self.whole_model(),
                self.data.tokenizer,
                self.data.token_files,
                trained_length=self.config.sequence_length,
                details=export_details(self.folder, self.config, self.trainer.state()),
                should_stop=should_stop,
            )
        if export is None:
            return False
        with self.clock.apart("saves"):
            self.saver.wait()
        self.log.say(f"plots in {plots[0].parent}: {', '.join(path.name for path in plots)}\n{export.summary()}")
        self.log.say(
            report.time_summary(
                total_s=self.clock.total_s,
                training_s=self.clock.training_s,
                apart_s=self.clock.apart_s,
                num_tokens=(self.step - self.first_step) * self.config.tokens_per_step,
            )
        )
        self.record_run("finished")
        return True
