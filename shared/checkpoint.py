"""Weights on disk: the only place that writes them. Exports, their manifest, and reading them back.

An export is one folder that transformers, vLLM and our service load: the FP16 `.pt`, the same numbers as safetensors,
`config.json`, `generation_config.json`, the tokenizer and a `manifest.json` with every file's sha256. It appears as a
whole or not at all. Nothing here ever unpickles code: every `.pt` is read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shared.catalog import (
    SAFETENSORS_NAME,
    ModelFolder,
    find_weights,
    listed_file,
    pt_name,
    read_json,
    read_model_folder,
)
from shared.config import ModelConfig
from shared.errors import WeightsError
from shared.files import atomic_folder, sha256_file, storage_errors, write_atomically
from shared.gguf_export import GgufKind, write_gguf
from shared.hashed_file import hashed_file
from shared.model import SmolLM2, rope_tables
from shared.tokenizer import Tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ONE_SAVES = threading.Lock()
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel"}


def write_export(
    folder: Path,
    model: SmolLM2,
    tokenizer: Tokenizer,
    *,
    trained_length: int | None,
    trained_here: bool = True,
    end_token_ids: Sequence[int] | None = None,
    generation_settings: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
    gguf_kinds: Sequence[GgufKind] = (),
) -> dict[str, Any]:
    """Write one export, replacing the folder as a whole, and return its manifest.

    Args:
        trained_length: tokens per training sequence; positions beyond it were never learnt. None where unknown.
        trained_here: whether our trainer made the weights; such a model is preferred as the default.
        end_token_ids: tokens that end a completion; the end of text unless given.
        generation_settings: further entries of `generation_config.json`, such as a default temperature.
        details: further entries of the manifest: step, data hash, recipe, source.
        gguf_kinds: GGUF files to write besides, for llama.cpp: `NAME-F16.gguf`, `NAME-Q8_0.gguf`.

    Raises:
        WeightsError: a weight is not finite, or beyond what 16 bits hold.
        TokenizerError: the tokenizer is not the model's.
        StorageError: the disk refused.
    """
    tokenizer.check_fits(model.config)
    end_token_ids = list(end_token_ids or [tokenizer.end_of_text_id])
    tensors = half_tensors(model)
    absolute_max = max(float(tensor.abs().max()) for tensor in tensors.values())
    eos_token_id = end_token_ids[0] if len(end_token_ids) == 1 else end_token_ids
    generation: dict[str, Any] = {"bos_token_id": model.config.bos_token_id, "eos_token_id": eos_token_id}
    generation["pad_token_id"] = end_token_ids[0]
    generation.update(generation_settings or {})
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    with atomic_folder(folder) as target:
        save_tensors(target / pt_name(folder.name, model.config), with_tied_head(tensors, model.config))
        with storage_errors(target):
            safetensors.torch.save_file(tensors, target / SAFETENSORS_NAME, metadata={"format": "pt"})
            (target / SAFETENSORS_NAME).chmod(0o644)  # the library writes 0600; another user's service must read it
        write_json(target / "config.json", model.config.to_hf())
        write_json(target / "generation_config.json", generation)
        tokenizer.save(target)
        for kind in gguf_kinds:
            path = target / f"{folder.name}-{kind.upper()}.gguf"
            write_gguf(
                path, tensors, model.config, tokenizer, name=folder.name, kind=kind, end_token_id=end_token_ids[0]
            )
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(target.iterdir())
        }
        manifest = {
            **(details or {}),
            "format": 1,
            "created_at": created_at,
            "trained_here": trained_here,
            "trained_length": trained_length,
            "parameters": model.config.num_parameters,
            "dtype": "float16",
            "largest_weight": absolute_max,
            "tokenizer_sha256": tokenizer.sha256,
            "files": files,
        }
        write_json(target / "manifest.json", manifest)
    return manifest


def half_tensors(model: SmolLM2) -> dict[str, Tensor]:
    """Return the weights in FP16 on the CPU under Hugging Face's names, a tied embedding once.

    Raises:
        WeightsError: a weight is not finite, or beyond what 16 bits hold.
    """
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied head is named once, as the embedding
        half = parameter.detach().to("cpu", torch.float16, copy=True).contiguous()
        if not torch.isfinite(half).all():
            largest = float(parameter.detach().abs().max())
            raise WeightsError(
                f"{name} holds {largest:g}, which 16 bits cannot (65,504 at most); the training diverged"
            )
        tensors[name] = half
    return tensors


def with_tied_head(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Name the head too, so that a strict `load_state_dict` accepts the file; torch.save stores shared memory once."""
    return {**tensors, HEAD: tensors[EMBEDDING]} if config.tie_word_embeddings else tensors


def save_tensors(path: Path, payload: dict[str, Any], *, crc32: bool = True) -> str:
    """Write a dictionary of tensors and plain values whole or not at all; `load_tensors` reads it.

    Args:
        crc32: write the sums that `unzip` asks for. Where the returned sha256 is compared anyway they only cost time:
            1.3 s of the 135M network's checkpoint.

    Returns:
        The file's sha256 as 64 hex digits.

    Raises:
        StorageError: the disk refused.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with hashed_file(temporary) as file:
                try:
                    with crc32_written(crc32):
                        torch.save(payload, cast("IO[bytes]", file))  # it only writes and flushes
                except RuntimeError as error:  # torch's zip writer covers up what the disk said
                    raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
                digest = file.finish()
            temporary.replace(path)
            return digest
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def crc32_written(wanted: bool) -> Iterator[None]:
    """Save with or without sums; PyTorch has one switch for all threads, so one of them saves at a time."""
    with ONE_SAVES:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(wanted)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read what `save_tensors` wrote, memory-mapped, running no code from it.

    Raises:
        WeightsError: the file is missing, corrupt, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing; export or copy the weights there")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} cannot be read ({reason}); copy or export it again") from error
    if not isinstance(payload, dict):
        raise WeightsError(f"{path} holds a {type(payload).__name__}, not a dictionary of tensors; export it again")
    return payload


def load_model(folder: ModelFolder, *, device: torch.device, dtype: torch.dtype | None) -> SmolLM2:
    """Load weights to serve: no gradients, evaluation mode, one copy in memory.

    Without a dtype they stay what they are, mapped from the file: for who makes copies and drops the model.

    Raises:
        WeightsError: the file is corrupt, is no longer the one described, or has other names or shapes.
    """
    listed = listed_file(folder.manifest, folder.weights)
    if listed and sha256_file(folder.weights) != listed.sha256:
        raise WeightsError(f"{folder.weights} is not what its manifest describes; copy or export it again")
    return model_from_tensors(read_weights(folder.weights), folder.config, folder.weights, device=device, dtype=dtype)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weights file, memory-mapped: safetensors or `.pt`."""
    if path.suffix == ".pt":
        return load_tensors(path)
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); copy or export it again") from error


def model_from_tensors(
    tensors: Mapping[str, Tensor], config: ModelConfig, origin: Path, *, device: torch.device, dtype: torch.dtype | None
) -> SmolLM2:
    """Build the network around copies of `tensors`, named as Hugging Face names them; around them, without a dtype.

    Raises:
        WeightsError: names or shapes are not this network's; `origin` is named in the sentence.
    """
    with WithoutDrawing():
        model = SmolLM2(config)
    wanted = dict(model.named_parameters())
    check_names(set(tensors), set(wanted), origin)
    check_tie(tensors, config, origin)
    parameters = {}
    for name, parameter in wanted.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            found, expected = tuple(tensor.shape), tuple(parameter.shape)
            raise WeightsError(f"{origin} has {name} as {tensor.dtype} {found}; config.json asks for {expected}")
        # A copy even where nothing changes: a file overwritten in place must not change a model that serves.
        numbers = tensor.to(device) if dtype is None else tensor.to(device, dtype, copy=True)
        parameters[name] = nn.Parameter(numbers, requires_grad=False)
    model.load_state_dict(parameters, assign=True, strict=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.rope = rope_tables(config, device)
    return model.requires_grad_(False).eval()


class WithoutDrawing(TorchFunctionMode):
    """Leave out the random numbers that torch's layers begin with: nothing reads them here.

    Memory that is never written is never taken. The device "meta" would do too, but makes torch import its compiler,
    which costs 1.6 s.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in (nn.init.normal_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def check_names(found: set[str], wanted: set[str], origin: Path) -> None:
    for prefix, wrapper in WRAPPERS.items():
        if any(name.startswith(prefix) for name in found):
            raise WeightsError(
                f"{origin} was saved from inside {wrapper}: its names start with {prefix!r}; save the unwrapped model"
            )
    ignored = {HEAD} | {name for name in found if name.endswith("rotary_emb.inv_freq")}  # old transformers wrote those
    for problem, names in (("lacks", wanted - found), ("holds the unknown", found - wanted - ignored)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise WeightsError(f"{origin} {problem} {min(names)}{more}; it does not belong to its config.json")


def check_tie(tensors: Mapping[str, Tensor], config: ModelConfig, origin: Path) -> None:
    """A tied model's file may name the head, but not give it numbers of its own."""
    head = tensors.get(HEAD)
    if config.tie_word_embeddings and head is not None:
        embedding = tensors[EMBEDDING]
        if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
            raise WeightsError(
                f"{origin} holds an {HEAD} of its own, but config.json ties it to the embedding; "
                "set tie_word_embeddings to false there if it was trained so"
            )


def import_hf_folder(path: Path) -> tuple[SmolLM2, Tokenizer]:
    """Read a Hugging Face Llama folder, sizes and RoPE from its `config.json`, as fp32 ready to train or export.

    Raises:
        ConfigError, WeightsError, TokenizerError: what is wrong with it.
    """
    config = ModelConfig.from_hf(read_json(path / "config.json", required=True))
    weights = find_weights(path)
    model = model_from_tensors(read_weights(weights), config, weights, device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = Tokenizer.from_folder(path)
    tokenizer.check_fits(config)
    return model.requires_grad_(True), tokenizer


def load_export(path: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[SmolLM2, Tokenizer]:
    """Load an export folder's model and the tokenizer that belongs to it."""
    folder = read_model_folder(path)
    tokenizer = Tokenizer.from_folder(path)
    tokenizer.check_fits(folder.config)
    return load_model(folder, device=device, dtype=dtype), tokenizer


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
