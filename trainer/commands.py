"""What each command of `python -m trainer` does. Each takes the parsed options and returns lines for stdout."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from typing import Any

import torch

from shared.errors import ConfigError
from shared.model import SmolLM2
from shared.tokenizer import refuse_lone_surrogates
from trainer import report
from trainer.config import NAME_PATTERN, NAME_RULE, Directories, PromptSection, TrainConfig
from trainer.corpus.files import check_leads_somewhere
from trainer.evaluate import evaluate as evaluate_model
from trainer.export import export_details, export_model
from trainer.finished import already_finished
from trainer.hardware import Hardware
from trainer.memory import memory_errors
from trainer.plan import describe_needs, describe_trial
from trainer.plan import plan as make_plan
from trainer.plot import plot_run
from trainer.prepare import PreparedData
from trainer.processes import Processes
from trainer.recipe import load_recipe
from trainer.recipe_data import load_data, prepare_data
from trainer.run import Run
from trainer.run_folder import RunFolder
from trainer.run_log import RunLog
from trainer.sample import sample_texts
from trainer.state import Checkpoints
from trainer.token_file import verify_tokens
from trainer.train import load_weights, network_shape
from trainer.trial import try_step

Options = argparse.Namespace
logger = logging.getLogger("trainer")


def recipe(options: Options) -> list[str]:  # noqa: ARG001
    """Name the recipe that suits this machine."""
    if torch.cuda.is_available():
        sys.stderr.write(f"original, because this machine has {torch.cuda.get_device_name()}\n")
        return ["original"]
    sys.stderr.write("cpu, because PyTorch sees no CUDA GPU here\n")
    return ["cpu"]


def prepare(options: Options) -> list[str]:
    """Bring the text and turn it into tokens."""
    show_messages()
    config = load_recipe(options.recipe, options.overrides)
    tokens = prepare_data(config.data, Directories()).token_files.values()
    train, held_out = (sum(len(getattr(file, part)) for file in tokens) for part in ("train", "held_out"))
    return [f"{train:,} tokens to train on and {held_out:,} held out, of {len(tokens)} sources"]


def plan(options: Options) -> list[str]:
    """Say what a training would do with the data there is."""
    show_messages()
    config = load_recipe(options.recipe, options.overrides)
    data = prepare_data(config.data, Directories())
    described = describe_plan(config, data)  # refuses, before any work, what cannot be right
    trial = try_step(config, data)
    return [described, describe_trial(trial.step_s, trial.peak_bytes, config.num_steps)]


def train(options: Options) -> list[str]:
    """Prepare, plan, train or resume, plot, export."""
    config = load_recipe(options.recipe, options.overrides)
    for source, patterns in config.data.files.items():  # before a run of that name is compared with the recipe
        check_leads_somewhere(source, patterns)
    directories = Directories()
    if options.dry_run:
        show_messages()
        described = describe_plan(config, prepare_data(config.data, directories))
        return [described, "time:    not measured; `python -m trainer plan` does", "dry run: nothing was trained"]
    folder = RunFolder(directories.runs_dir / checked_name(config.name if options.run is None else options.run))
    processes = Processes.join(config.device)
    if processes.is_leader:
        lead(config, folder, directories, processes, accept_changes=options.accept_changes)
    else:
        from trainer.follower import follow

        logging.getLogger("trainer").setLevel(logging.ERROR)
        data = processes.in_turn(lambda: prepare_data(config.data, directories))
        if processes.local_rank == 0:  # one look at each machine's disk
            verify_tokens(data.token_files)
        follow(config, data, folder, processes)
    processes.leave()
    return []


def lead(
    config: TrainConfig, folder: RunFolder, directories: Directories, processes: Processes, *, accept_changes: bool
) -> None:
    """Be the process that decides, logs and saves; usually the only one."""
    with folder.locked():
        changes = folder.open(config, accept_changes=accept_changes)
        with RunLog(folder.training_log) as log, memory_errors():
            if changes:
                log.say(f"the recipe has changed since the last checkpoint: {', '.join(changes)}")
            data = processes.in_turn(lambda: prepare_data(config.data, directories))
            if processes.is_alone and (
                done := already_finished(folder, config, data_hash=data.data_hash, models_dir=directories.models_dir)
            ):
                log.say(done)
                return
            log.say(describe_plan(config, data))
            verify_tokens(data.token_files)
            run = Run(config, data, folder, models_dir=directories.models_dir, log=log, processes=processes)
            run.to_the_end()


def evaluate(options: Options) -> list[str]:
    """Measure a checkpoint's held-out loss."""
    config, data, model, state = open_checkpoint(options)
    hardware = Hardware.choose(config)
    results = evaluate_model(
        model.to(hardware.device),
        data.token_files,
        sequence_length=config.sequence_length,
        max_windows=config.evaluate_windows,
        rows_per_pass=config.micro_batch_size,
        dtype=hardware.dtype,
        mask_documents=config.mask_documents,
    )
    assert results is not None, "nothing asks it to stop"
    return [report.evaluation_table(state["step"], results, {})]


def sample(options: Options) -> list[str]:
    """Let a checkpoint continue prompts."""
    prompts = [asked_prompt(text) for text in options.prompt or ()]
    if options.tokens is not None and options.tokens < 1:
        raise ConfigError(f"--tokens is {options.tokens}; it must be above 0")
    config, data, model, state = open_checkpoint(options)
    temperature = config.sample_temperature if options.temperature is None else options.temperature
    rows = sample_texts(
        model.to(Hardware.choose(config).device),
        data.tokenizer,
        prompts or config.prompts,
        step=state["step"],
        max_new_tokens=options.tokens or config.sample_tokens,
        trained_length=config.sequence_length,
        temperature=temperature,
        seed=config.seed if options.seed is None else options.seed,
    )
    assert rows is not None, "nothing asks it to stop"
    return [report.samples_text(state["step"], rows)]


def asked_prompt(text: str) -> PromptSection:
    """Check a prompt of the command line.

    Raises:
        ConfigError: it is empty.
        GenerationError: it is no Unicode text.
    """
    if not text:
        raise ConfigError("--prompt is empty; give a text to continue, or leave it out for the recipe's prompts")
    refuse_lone_surrogates(text)
    return PromptSection(text=text)


def plot(options: Options) -> list[str]:
    """Draw a run's plots from its metrics."""
    folder = RunFolder(Directories().runs_dir / checked_name(options.run))
    folder.read_recipe()
    return [str(path) for path in plot_run(folder)]


def export(options: Options) -> list[str]:
    """Write a checkpoint as an export."""
    config, data, model, state = open_checkpoint(options)
    directories = Directories()
    folder = RunFolder(directories.runs_dir / options.run)
    name = checked_name(options.name if options.name is not None else config.export_name or folder.name)
    exported = export_model(
        directories.models_dir / name,
        model.to(Hardware.choose(config).device),
        data.tokenizer,
        data.token_files,
        trained_length=config.sequence_length,
        details=export_details(folder, config, state),
        gguf_kinds=options.gguf,
    )
    assert exported is not None, "nothing asks it to stop"
    return [exported.summary()]


def open_checkpoint(options: Options) -> tuple[TrainConfig, PreparedData, SmolLM2, dict[str, Any]]:
    """Return a run's recipe, its data, and the network of the checkpoint that was asked for, on the CPU.

    Raises:
        ConfigError: no such run, its data is no longer what it was trained on, or its recipe not the checkpoint's.
        WeightsError: no such checkpoint, or it is damaged.
    """
    show_messages()
    directories = Directories()
    folder = RunFolder(directories.runs_dir / checked_name(options.run))
    config = folder.read_recipe()
    checkpoints = Checkpoints(folder.checkpoints, keep=config.keep_checkpoints)
    state = checkpoints.load(checkpoints.choose(options.checkpoint))
    data = load_data(config.data, directories)
    if data.tokenizer.sha256 != state["tokenizer_sha256"]:
        raise ConfigError(f"run {folder.name!r} was trained with another tokenizer than the one in data/; restore it")
    model = SmolLM2(network_shape(config, data.tokenizer))
    load_weights(model, state["model"])
    return config, data, model, state


def describe_plan(config: TrainConfig, data: PreparedData) -> str:
    """The plan as text; refuses what cannot be right."""
    needs = describe_needs(network_shape(config, data.tokenizer), keep_checkpoints=config.keep_checkpoints)
    return f"{make_plan(config, data)}\n\n{needs}"


def checked_name(name: str) -> str:
    """Refuse a run or export name that is a path: it would lead out of its folder."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"{name!r} is no name; {NAME_RULE}")
    return name


def show_messages() -> None:
    """Let the commands that write no training.log speak on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
