"""Which network computes a model, and why: the compiled kernels where they can, else PyTorch."""

from __future__ import annotations

from typing import Literal

import torch

from service.engine.kernels.build import KernelsUnavailable, usable_levels
from service.engine.kernels.decoder import CompiledDecoder, unknown_shape
from service.engine.kernels.library import Library, load_library
from service.engine.network import Network, TorchNetwork
from service.engine.packing import can_pack, pack_linears
from service.engine.static_steps import StaticNetwork
from shared.catalog import ModelFolder
from shared.checkpoint import load_model
from shared.config import ModelConfig
from shared.device import Choice, choose_dtype
from shared.errors import ConfigError
from shared.model import SmolLM2

Weights = Literal["dtype", "int8"]


def choose_serving_dtype(device: torch.device, requested: str, *, kernels: str = "auto") -> Choice[torch.dtype]:
    """Choose the dtype of the weights: where the CPU itself has no bfloat16, the compiled kernels may still have it.

    They read half of what PyTorch reads in float32.

    Raises:
        ConfigError: see `choose_dtype`.
    """
    choice = choose_dtype(device, requested, purpose="serve")
    if requested != "auto" or device.type != "cpu" or choice.value == torch.bfloat16:
        return choice
    try:
        library = load_allowed(kernels)
    except KernelsUnavailable as error:
        return Choice(choice.value, f"{choice.reason}, and {error}")
    return Choice(torch.bfloat16, f"{choice.reason}, but the compiled kernels for {library.level} compute in it")


def check_kernels(kernels: str) -> None:
    """Refuse a level asked for by name that is not to be had: who names one wants no other network.

    Raises:
        ConfigError: it says which there are.
    """
    if kernels in ("auto", "off"):
        return
    usable = [level.name for level in usable_levels()]
    if kernels not in usable:
        raise ConfigError(f"kernels is {kernels!r}, but this CPU has no such level; use auto, off, {', '.join(usable)}")
    try:
        load_library(kernels)
    except KernelsUnavailable as error:
        raise ConfigError(f"kernels is {kernels!r}, but {error}; use auto or off") from error


def load_allowed(kernels: str) -> Library:
    """Load the kernels that the settings allow: "auto", "off" or a level.

    Raises:
        KernelsUnavailable: none; the sentence says why.
    """
    if kernels == "off":
        raise KernelsUnavailable("the kernels are off in the settings")
    return load_library(kernels)


def load_network(
    folder: ModelFolder, *, device: torch.device, dtype: torch.dtype, weights: Weights = "dtype", kernels: str = "auto"
) -> tuple[SmolLM2, Choice[Network]]:
    """Load a folder's weights for serving; the choice says why what computes them does.

    The model is for its configuration and its cache's dtype: the kernels take its matrices away.

    Raises:
        WeightsError: what is wrong with the folder.
        ConfigError: int8 weights, where there are no kernels to multiply them.
    """
    try:
        library = library_for(folder.config, device=device, dtype=dtype, weights=weights, kernels=kernels)
    except KernelsUnavailable as error:
        if weights == "int8":
            raise ConfigError(f"weights is 'int8', which needs the compiled kernels: {error}") from error
        model = load_model(folder, device=device, dtype=dtype)
        if device.type == "cuda" and kernels != "off":
            return model, Choice(StaticNetwork(model), f"PyTorch in CUDA graphs, as {error}")
        name = "PyTorch without CUDA graphs (off in the settings)" if device.type == "cuda" else "PyTorch"
        if can_pack(device, dtype):
            pack_linears(model)
            name = "PyTorch with packed weights"
        return model, Choice(TorchNetwork(model), f"{name}, as {error}")
    model = load_model(folder, device=device, dtype=None)  # packed, and so rounded once, from what the file says
    compiled = CompiledDecoder(model, library, is_int8=weights == "int8")
    return model, Choice(compiled, f"compiled kernels for {library.level}, {compiled.description}")


def library_for(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, weights: Weights, kernels: str
) -> Library:
    """Return the kernels that compute such a model.

    Raises:
        KernelsUnavailable: none do; the sentence says why.
    """
    if device.type != "cpu":
        raise KernelsUnavailable(f"the kernels are for CPUs, not {device.type}")
    if dtype != torch.bfloat16 and weights != "int8":
        raise KernelsUnavailable(f"the kernels compute in bfloat16, not {str(dtype).removeprefix('torch.')}")
    if (reason := unknown_shape(config)) is not None:
        raise KernelsUnavailable(reason)
    return load_allowed(kernels)
