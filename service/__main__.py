"""`python -m service`: one command per process. Errors are one sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

from service.api_keys import hash_of, new_key
from service.engine.kernels.build import compile_ahead
from service.settings import Settings, doubtful_names, get_settings, given_names
from shared.catalog import list_model_folders
from shared.errors import SmolLMError
from shared.log import configure_logging

log = logging.getLogger("service")

DESCRIPTION = """\
Serve language models over HTTP, with a bounded queue in Redis between the two kinds of process.

  python -m service api        answers HTTP and admits jobs; needs no GPU; start as many as you like
  python -m service worker     takes jobs from the queue and generates; one per GPU, or per machine
  python -m service health     asks a running API how it is, in words
  python -m service key        makes an API key and prints it with its hash

Both serve every export in models/ (SMOLLM_MODELS_DIR); a new one is offered without a restart. They meet at
SMOLLM_REDIS_URL (Redis >= 7.0 or Valkey >= 7.2). API_PORT moves the API. `make up` starts all of it at once.
Try it:

  curl -s http://127.0.0.1:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "First Citizen:"}'

Every setting, with its default, stands in .env.example; every route in docs/api.md."""


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m service", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, brief: str, more: str) -> argparse.ArgumentParser:
        description = f"{brief[0].upper()}{brief[1:]}. {more}"
        return commands.add_parser(name, help=brief, description=description)

    add(
        "api",
        "serve HTTP until SIGTERM",
        "Listens on SMOLLM_API_HOST and API_PORT, admits jobs to the Redis at SMOLLM_REDIS_URL and offers the models "
        "in SMOLLM_MODELS_DIR. The other settings stand in .env.example, the routes in docs/api.md and at /docs.",
    )
    add(
        "worker",
        "take jobs and generate until SIGTERM",
        "The jobs wait in the Redis at SMOLLM_REDIS_URL, the models stand in SMOLLM_MODELS_DIR; SMOLLM_DEVICE, "
        "SMOLLM_WEIGHTS and SMOLLM_NUM_SLOTS say how it computes. The other settings stand in .env.example.",
    )
    health = add(
        "health",
        "ask the API at API_PORT how it is",
        "The exit code is 1 if it does not answer.",
    )
    health.add_argument("--ready", action="store_true", help="exit code 1 also while it cannot serve a request yet")
    add(
        "key",
        "make an API key and print it with its hash",
        "The service keeps the hash alone, in SMOLLM_API_KEYS or SMOLLM_API_KEYS_FILE: docs/operations.md.",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.command == "key":
        return make_key()
    try:
        settings = get_settings()
    except SmolLMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.command == "health":
        return health(settings, must_be_ready=options.ready)
    configure_logging(options.command, style=settings.log_format)
    for sentence in doubtful_names(given_names()):
        log.warning("%s", sentence)
    try:
        list_model_folders(settings.models_dir)  # one that cannot be read is a sentence here, not a traceback later
        if options.command == "api":
            from service.api.server import run_api

            run_api(settings)
        else:
            if settings.may_use_kernels:  # some seconds where nothing is cached, and torch's import takes one
                compile_ahead(settings.kernels)
            from service.worker_process import run_worker

            run_worker(settings)
    except SmolLMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def make_key() -> int:
    key = new_key()
    print(f"key     {key}\nhash    sha256:{hash_of(key)}")
    print("Give the key to whoever asks; set SMOLLM_API_KEYS, or a [[key]] of SMOLLM_API_KEYS_FILE, to the hash.")
    return 0


def health(settings: Settings, *, must_be_ready: bool) -> int:
    """Print whether the API lives and whether it can serve; a container's health check needs only the first."""
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    address = f"http://{here.get(settings.api_host, settings.api_host)}:{settings.api_port}"
    try:
        with urllib.request.urlopen(f"{address}/ready", timeout=3) as response:
            print(f"{address} is ready: {response.read(2_000).decode()}")
    except urllib.error.HTTPError as error:
        try:
            reason = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = f"it answered {error.code}"
        print(f"{address} lives but is not ready: {reason}")
        return 1 if must_be_ready or error.code != 503 else 0
    except OSError as error:
        print(f"{address} does not answer ({getattr(error, 'reason', error)}).")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
