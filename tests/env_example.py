"""Writes .env.example: `python -m tests.env_example > .env.example`. `test_house` compares the file with this."""

from __future__ import annotations

import sys

from pydantic import SecretStr
from pydantic_settings import BaseSettings

from frontend.settings import Settings as PageSettings
from service.settings import Settings as ServiceSettings
from service.settings import variables_of
from trainer.config import Directories

COMPOSE_SETTINGS = (
    "# All settings above are passed on, but for folders and addresses inside, which are its own: docs/operations.md",
    "# address the ports are opened on; 0.0.0.0 shows them to the network: set SMOLLM_API_KEYS first",
    "#BIND=127.0.0.1",
    "# an index with PyTorch's CPU wheels: without a GPU it spares several GB of CUDA libraries",
    "#TORCH_INDEX_URL=",
    "# what `docker compose --profile train up trainer` trains",
    "#RECIPE=cpu",
    "# CPUs of the worker; 0 is all of them",
    "#WORKER_CPUS=0",
    "#REDIS_MAXMEMORY=256mb",
)


def env_example() -> str:
    """Return .env.example: every setting of every process, its default commented out, its meaning above it."""
    parts: dict[str, type[BaseSettings]] = {
        "the service": ServiceSettings,
        "the page": PageSettings,
        "the trainer": Directories,
    }
    lines = [
        "# Copy to .env and change what you like. Written by `python -m tests.env_example`; every line shows a default."
    ]
    seen = set()
    for title, settings in parts.items():
        lines += ["", f"# ---- {title}"]
        for variable, field in variables_of(settings).items():
            if variable in seen:
                continue
            seen.add(variable)
            value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
            shown = "" if value in (None, ()) else str(value).lower() if isinstance(value, bool) else str(value)
            lines += [f"# {field.description}", f"#{variable}={shown}"]
    lines += ["", "# ---- docker compose", *COMPOSE_SETTINGS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(env_example())
