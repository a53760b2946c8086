"""The models in a folder: which stand there whole, what each is, which one answers by default. Imports no torch.

An export is a folder with `config.json`, weights (`model.safetensors`, or an FP16 `.pt` alone) and the tokenizer's
files; ours carry a `manifest.json` as well. Polling is cheap: an unchanged folder costs a few calls of `stat`.
"""

from __future__ import annotations

import json
import logging
import re
import struct
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.config import ModelConfig
from shared.errors import ConfigError, SmolLMError, TokenizerError, WeightsError
from shared.files import reading_errors, sha256_file
from shared.tokenizer import TOKENIZER_NAME, Tokenizer

log = logging.getLogger(__name__)

SAFETENSORS_NAME = "model.safetensors"
FULL_SIZE_PT_NAME = "final_smollm2_135m_half.pt"
FULL_SIZE_PARAMETERS = 134_515_008

READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".pt")
"""What a model is read from: where such a file changes, the folder is looked at again."""

CHECK_RECIPE = "smoke"
"""A run of this recipe checks an installation; nobody wants its answers."""

SHA256 = re.compile("[0-9a-f]{64}")

Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """One model that can be served."""

    name: str
    path: Path
    config: ModelConfig
    weights: Path
    revision: str
    """sha256 of the weights file, 64 hex digits."""
    tokenizer_sha256: str | None
    """sha256 of `tokenizer.json`, by which processes of any version know the same ids; None where there is none."""
    trained_length: int | None
    """Tokens per training sequence; positions beyond it were never learnt. None where unknown."""
    created_at: str | None
    """ISO 8601 in UTC, from the manifest."""
    trained_here: bool
    end_token_ids: tuple[int, ...]
    """Tokens that end a completion."""
    manifest: dict[str, Any] = field(hash=False)


def pt_name(folder_name: str, config: ModelConfig) -> str:
    """Return the name of the FP16 file: the original's for its size, else after the folder."""
    return FULL_SIZE_PT_NAME if config.num_parameters == FULL_SIZE_PARAMETERS else f"{folder_name}_half.pt"


def read_model_folder(path: Path) -> ModelFolder:
    """Describe one export folder.

    Raises:
        ConfigError: `config.json` describes another network.
        WeightsError: a file is missing, unreadable or half-written.
    """
    try:
        return describe(path)
    except (TypeError, AttributeError, KeyError, ValueError) as error:  # valid JSON of another form
        raise WeightsError(f"{path} holds settings of an unknown form ({error}); export or copy it again") from error


def describe(path: Path) -> ModelFolder:
    settings = read_json(path / "config.json", required=True)
    config = ModelConfig.from_hf(settings)
    weights = find_weights(path)
    check_whole(weights)
    manifest = read_json(path / "manifest.json")
    check_manifest(manifest, path / "manifest.json")
    listed, num_bytes = listed_file(manifest, weights), weights.stat().st_size
    if listed and listed.num_bytes != num_bytes:
        raise WeightsError(f"{weights} has {num_bytes} bytes, its manifest says {listed.num_bytes}; export it again")
    return ModelFolder(
        name=path.name,
        path=path,
        config=config,
        weights=weights,
        revision=listed.sha256 if listed else revision_of(weights),
        tokenizer_sha256=tokenizer_sha256(path),
        trained_length=manifest.get("trained_length"),
        created_at=manifest.get("created_at"),
        trained_here=bool(manifest.get("trained_here", False)),
        end_token_ids=end_token_ids(path, settings, config),
        manifest=manifest,
    )


def tokenizer_sha256(path: Path) -> str | None:
    """Hash the file that alone decides which text an id stands for."""
    file = path / TOKENIZER_NAME
    return sha256_file(file) if file.is_file() else None


def load_tokenizer(folder: ModelFolder) -> Tokenizer:
    """Read the tokenizer that a folder was described with.

    Raises:
        TokenizerError: it is missing, belongs to another model, or was replaced since: describe the folder again.
    """
    tokenizer = Tokenizer.from_folder(folder.path)
    tokenizer.check_fits(folder.config)
    if tokenizer_sha256(folder.path) != folder.tokenizer_sha256:
        raise TokenizerError(f"{folder.path / TOKENIZER_NAME} changed while the model was loaded; it is read again")
    return tokenizer


MANIFEST_KINDS: dict[str, type] = {"trained_length": int, "created_at": str}


def check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Refuse a field of another kind here, by its name, before somebody compares dates with numbers."""
    for name, kind in MANIFEST_KINDS.items():
        if not isinstance(value := manifest.get(name), kind | None):
            raise WeightsError(f"{path} has {name} = {value!r}; export or copy the model again")


@dataclass(frozen=True)
class ListedFile:
    """What a manifest says of one file."""

    num_bytes: int
    sha256: str


def listed_file(manifest: Mapping[str, Any], path: Path) -> ListedFile | None:
    """Return what a manifest says of a file beside it; None where it lists none of that name.

    Raises:
        WeightsError: it lists the file without its length or its sha256.
    """
    entry = manifest.get("files", {}).get(path.name)
    if entry is None:
        return None
    num_bytes, sha256 = entry.get("bytes"), entry.get("sha256")
    if not isinstance(num_bytes, int) or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        manifest_path = path.with_name("manifest.json")
        raise WeightsError(f"{manifest_path} lists {path.name} without its bytes and sha256; export or copy it again")
    return ListedFile(num_bytes, sha256)


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; export or download the model again") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); export or download the model again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object; export or download the model again")
    return content


def find_weights(folder: Path) -> Path:
    """Return the weights file to serve: safetensors where present, else the only `.pt`."""
    if (folder / SAFETENSORS_NAME).is_file():
        return folder / SAFETENSORS_NAME
    if (folder / f"{SAFETENSORS_NAME}.index.json").is_file():
        raise WeightsError(f"{folder} holds weights in several files; save them as one {SAFETENSORS_NAME}")
    found = sorted(folder.glob("*.pt"))
    if len(found) > 1:
        found = [path for path in found if path.name.endswith("_half.pt")] or found
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise WeightsError(f"{folder} holds several .pt files ({names}); leave one of them")
    if not found:
        raise WeightsError(f"{folder} has neither {SAFETENSORS_NAME} nor a .pt file; export or copy the weights there")
    return found[0]


def check_whole(weights: Path) -> None:
    """Refuse a file that is still being copied: compare its length with what its own table of contents says."""
    if weights.suffix == ".pt":
        if not zipfile.is_zipfile(weights):
            raise WeightsError(f"{weights} is no PyTorch file, or only half of one; copy or export it again")
        return
    size = weights.stat().st_size
    try:
        with weights.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(size, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(header_bytes))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{weights} is no safetensors file ({error}); copy or export it again") from error
    if size != 8 + header_bytes + end:
        raise WeightsError(f"{weights} has {size} of {8 + header_bytes + end} bytes; copy or export it again")


def end_token_ids(path: Path, settings: Mapping[str, Any], config: ModelConfig) -> tuple[int, ...]:
    """Return the ids that end a completion: generation_config.json's, else config.json's."""
    value = read_json(path / "generation_config.json").get("eos_token_id", settings.get("eos_token_id"))
    ids = value if isinstance(value, list) else [config.eos_token_id if value is None else value]
    for token_id in ids:
        if not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size:
            raise ConfigError(f"{path} names the end token {token_id!r}; it must lie in 0..{config.vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


class Cache:
    """What was read before, per path, as long as the files' sizes and times stay the same."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.revisions: dict[Path, tuple[Signature, str]] = {}
        self.folders: dict[Path, tuple[Signature, ModelFolder | SmolLMError]] = {}


cache = Cache()


def signature(*paths: Path) -> Signature:
    """Return what changes when a file does."""
    marks = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        marks.append((path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(marks)


def revision_of(weights: Path) -> str:
    """Hash a weights file that came without a manifest, once per content."""
    mark = signature(weights)
    with cache.lock:
        known = cache.revisions.get(weights)
    if known is None or known[0] != mark:
        known = (mark, sha256_file(weights))
        with cache.lock:
            cache.revisions[weights] = known
    return known[1]


def list_model_folders(models_dir: Path) -> dict[str, ModelFolder]:
    """Return every model that stands whole in `models_dir`, by name.

    Folders in the making (their names start with a dot) are passed over; unusable ones are logged once and left out.

    Raises:
        StorageError: `models_dir` cannot be listed, so nobody knows what stands there.
    """
    with reading_errors(models_dir):
        try:
            paths = sorted(
                path for path in models_dir.iterdir() if not path.name.startswith(".") and may_be_model(path)
            )
        except FileNotFoundError:
            return {}
    found = {}
    for path in paths:
        result = read_cached(path)
        if isinstance(result, ModelFolder):
            found[path.name] = result
    return found


def may_be_model(path: Path) -> bool:
    """Whether an entry is a folder, or a link nobody may follow: what cannot be read is told when it is read."""
    try:
        return path.is_dir()
    except OSError:
        return True


def read_cached(path: Path) -> ModelFolder | SmolLMError:
    try:
        mark = signature(*sorted(file for file in path.iterdir() if file.suffix in READ_SUFFIXES))
    except OSError:
        mark = ()
    with cache.lock:
        known = cache.folders.get(path)
    if known is not None and known[0] == mark:
        return known[1]
    result: ModelFolder | SmolLMError
    try:
        result = read_model_folder(path)
    except SmolLMError as error:
        result = error
    except OSError as error:  # taken away while it was read
        result = WeightsError(f"{path} cannot be read: {error.strerror}")
    except Exception as error:  # nothing that stands in one folder may hide the others
        result = WeightsError(f"{path} cannot be read: {error!r}")
    if isinstance(result, SmolLMError) and not (known and str(known[1]) == str(result)):
        log.warning("left out the model %s: %s", path.name, result)
    with cache.lock:
        cache.folders[path] = (mark, result)
    return result


def choose_default_model(folders: Mapping[str, ModelFolder], preferred: str | None) -> tuple[str | None, str]:
    """Return the model that answers a request naming none, and the reason.

    What the recipe `smoke` made is served, and is the default only where there is nothing else.
    """
    if preferred in folders:
        return preferred, "named in the settings"
    note = f"{preferred} is not there; " if preferred else ""
    if not folders:
        return None, f"{note}there is no model yet"
    meant = {name: folder for name, folder in folders.items() if folder.manifest.get("recipe") != CHECK_RECIPE}
    folders = meant or folders
    # ISO dates of one time zone sort as text.
    dated = sorted((folder for folder in folders.values() if folder.created_at), key=lambda it: it.created_at or "")
    trained = [folder for folder in dated if folder.trained_here]
    if trained:
        return trained[-1].name, f"{note}the newest one trained here"
    if dated:
        return dated[-1].name, f"{note}the newest one"
    return min(folders), f"{note}the first by name"
