"""Where a run's first weights come from when it does not begin from nothing: a public model or a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from shared.catalog import ModelFolder, read_model_folder
from shared.checkpoint import load_model
from shared.errors import ConfigError
from shared.model import SmolLM2
from shared.pretrained import PUBLIC_MODELS, bring
from shared.tokenizer import Tokenizer

NO_PART_OF_THE_NETWORK = ("bos_token_id", "eos_token_id")


def load_initial_weights(model: SmolLM2, name_or_path: str, tokenizer: Tokenizer, models_dir: Path) -> ModelFolder:
    """Copy weights into a fresh network, as fp32, after making sure that they and the tokenizer belong to it.

    Raises:
        ConfigError: there is no such model, or its network has other sizes.
        TokenizerError: it was trained with another tokenizer.
        WeightsError: its files cannot be read, or brought.
    """
    folder = find_model(name_or_path, models_dir)
    ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(folder.config)
    different = [key for key in ours if ours[key] != theirs[key] and key not in NO_PART_OF_THE_NETWORK]
    if different:
        listed = ", ".join(f"{key} {theirs[key]} (the recipe: {ours[key]})" for key in different)
        raise ConfigError(f"init_from = {name_or_path!r} is another network: {listed}; set [model] to its values")
    trained_with = Tokenizer.from_folder(folder.path)
    if trained_with.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise ConfigError(
            f"init_from = {name_or_path!r} was trained with another tokenizer than the recipe's data: set "
            f'data.tokenizer = "{folder.path}"'
        )
    loaded = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return folder


def find_model(name_or_path: str, models_dir: Path) -> ModelFolder:
    """Return a folder given by path, a model in `models_dir`, or a public one that is brought there."""
    for path in (models_dir / name_or_path, Path(name_or_path)):
        if path.is_dir():
            return read_model_folder(path)
    if name_or_path in PUBLIC_MODELS:
        return bring(name_or_path, models_dir)
    raise ConfigError(
        f"init_from is {name_or_path!r}, which is neither a folder nor a model in {models_dir}; public ones are "
        f"{', '.join(PUBLIC_MODELS)}"
    )
