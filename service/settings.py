"""Every setting of the service, and the only place that reads its environment. Each is `SMOLLM_` + its name."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.api_keys import ApiKey, parse_list
from service.queue.job import QueueLimits
from shared.errors import ConfigError

PREFIX = "SMOLLM_"
SETTINGS_OF_OTHERS = ("SMOLLM_API_URL", "SMOLLM_API_KEY", "SMOLLM_DATA_DIR", "SMOLLM_TEXT_DIR")
"""The page's and the trainer's, which one .env may hold too."""
MAX_S = 30 * 24 * 3_600
"""No span of time is longer than a month: every key in Redis lives as long as its job may."""
MAX_BODY_BYTES = 1_000_000_000
"""A body is held in memory whole."""


class Settings(BaseSettings):
    """One frozen object, read once at start."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True)

    # Where things are
    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="Redis >= 7.0 or Valkey >= 7.2")
    models_dir: Path = Field(Path("models"), description="every export in here is served")
    runs_dir: Path = Field(Path("runs"), description="training runs the page shows")
    default_model: str | None = Field(None, description="answers when a request names no model; default: newest export")

    # The API process
    api_host: str = Field("127.0.0.1", description="address the API listens on")
    api_port: int = Field(8000, ge=1, le=65_535, description="port the API listens on", validation_alias="API_PORT")
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode] = Field(
        (),
        description="comma-separated keys or sha256:HASH of keys; a request must carry one as `Authorization: Bearer`; "
        "empty: no key asked",
    )
    api_keys_file: Path | None = Field(None, description="TOML with one [[key]] per key: hash, name, weight, limits")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated origins whose pages may call the API from a browser; empty: none; * is any"
    )
    max_body_bytes: int = Field(
        1_000_000, ge=1_000, le=MAX_BODY_BYTES, description="larger request bodies are refused with 413"
    )

    # Limits of the queue
    max_queued_jobs: int = Field(256, ge=1, description="waiting jobs of one model; more are refused with 429")
    max_queued_tokens: int = Field(
        400_000, ge=2, description="waiting cost of one model: prompt + max_new_tokens, summed"
    )
    max_timeout_s: float = Field(3_600.0, ge=1, le=MAX_S, description="largest timeout_s a request may ask for")
    result_ttl_s: int = Field(600, ge=1, le=MAX_S, description="how long a finished job can be read")
    lease_ms: int = Field(
        4_000, ge=200, le=1000 * MAX_S, description="a worker silent for this long loses its jobs to another"
    )
    max_attempts: int = Field(3, ge=1, le=1_000, description="a job that loses this many workers is failed")

    # The worker process
    num_workers: int = Field(1, ge=1, le=1_024, description="worker processes that `make up` starts")
    num_slots: int = Field(32, ge=1, le=4_096, description="sequences one model decodes at a time")
    max_cached_tokens: int = Field(16_384, ge=2, description="tokens of all sequences of one model together")
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="arithmetic of the model")
    weights: Literal["dtype", "int8"] = Field("dtype", description="int8: half the memory and half the time of 16 bits")
    kernels: str = Field(
        "auto", description="compiled network on CPUs, graphs on CUDA: auto, off, or a level such as avx512_bf16"
    )
    num_threads: int = Field(
        0, ge=0, le=4_096, description="CPU threads; 0: the CPU quota or affinity, whichever is smaller"
    )
    speculation: Literal["auto", "off"] = Field(
        "auto", description="auto: guess tokens ahead where the measured pace says it pays; changes no token"
    )
    share_prefixes: bool = Field(True, description="prompts that begin alike are computed once")
    shutdown_grace_s: float = Field(
        5.0,
        ge=0,
        le=MAX_S,
        description="after SIGTERM: finish what ends by then, hand over the rest; compose kills after 90 s",
    )
    model_poll_s: float = Field(2.0, ge=0.05, le=MAX_S, description="how often models_dir is looked at for new exports")

    worker_metrics_port: int = Field(0, ge=0, le=65_535, description="port of a worker's own /metrics; 0: none")

    # What is told
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="auto: JSON in containers, text on terminals"
    )
    otlp_endpoint: str | None = Field(
        None,
        description="where spans go, as http://collector:4318; needs the extra `tracing`; empty: nowhere",
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    log_prompts: bool = Field(False, description="write prompts and completions to the log")

    @property
    def queue_limits(self) -> QueueLimits:
        """The limits as the queue takes them: its fields are settings of the same names."""
        return QueueLimits(**{name: getattr(self, name) for name in QueueLimits.__dataclass_fields__})

    @property
    def may_use_kernels(self) -> bool:
        """Whether the compiled network may come to compute, as far as settings and a glance at the devices tell."""
        is_cpu = self.device == "cpu" or (self.device == "auto" and not Path("/dev/nvidiactl").exists())
        is_16bit = self.dtype in ("auto", "bfloat16") or self.weights == "int8"
        return is_cpu and is_16bit and self.kernels != "off"

    @field_validator("api_keys", mode="before")
    @classmethod
    def split_keys(cls, value: object) -> object:
        """Read `one,two`; an empty setting is no key at all, not an empty key."""
        return parse_list(value) if isinstance(value, str) else value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def split_origins(cls, value: object) -> object:
        return tuple(one.strip() for one in value.split(",") if one.strip()) if isinstance(value, str) else value

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def empty_is_none(cls, value: object) -> object:
        return value or None


def variables_of(settings: type[BaseSettings]) -> dict[str, FieldInfo]:
    """Return the settings of a process by the names they have in the environment."""
    prefix = settings.model_config.get("env_prefix", "")
    return {
        str(field.validation_alias or f"{prefix}{name}".upper()): field for name, field in settings.model_fields.items()
    }


def doubtful_names(given: Iterable[str]) -> list[str]:
    """Say of names in the environment that are nearly one of ours what was probably meant: they set nothing."""
    known = {name.removeprefix(PREFIX): name for name in (*variables_of(Settings), *SETTINGS_OF_OTHERS)}
    sentences = []
    for name in sorted(name for name in given if name.upper().startswith(PREFIX)):
        own_part = name.upper().removeprefix(PREFIX)
        nearest = difflib.get_close_matches(own_part, known, n=1, cutoff=0.7)
        if nearest and name.upper() != known[nearest[0]]:
            sentences.append(f"There is no setting {name}, so it sets nothing; did you mean {known[nearest[0]]}?")
    return sentences


def given_names() -> set[str]:
    """Return what the environment and .env set."""
    return {*os.environ, *dotenv_values(".env")}


@functools.cache
def get_settings() -> Settings:
    """Return the process's settings.

    Raises:
        ConfigError: a setting has a value it cannot have; named with the value.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """Say which setting is wrong, as its environment variable is called."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][-1]).upper()
    name = name if name.startswith(("API_", "OTEL_", "SMOLLM_", "UI_")) else f"SMOLLM_{name}"
    return f"The setting {name} is {first['input']!r}: {first['msg']}."
