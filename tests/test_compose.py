"""What docker-compose.yml passes on: a setting in .env that no container gets would be dropped silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from frontend.settings import Settings as PageSettings
from service.settings import Settings as ServiceSettings
from service.settings import variables_of

COMPOSE = yaml.safe_load((Path(__file__).parents[1] / "docker-compose.yml").read_text())
OF_THE_HOST = {"SMOLLM_MODELS_DIR", "SMOLLM_RUNS_DIR", "API_PORT", "UI_PORT"}
"""Folders are volumes at the image's places, ports are opened from the outside."""


def environment_of(service: str) -> dict[str, Any]:
    environment: dict[str, Any] = COMPOSE["services"][service]["environment"]
    return environment


def test_every_setting_of_the_service_is_passed_on_or_has_a_meaning_of_its_own() -> None:
    api, worker = environment_of("api"), environment_of("worker")
    assert COMPOSE["services"]["worker"]["scale"] == "${SMOLLM_NUM_WORKERS:-1}"
    assert {*api, *worker, *OF_THE_HOST - {"UI_PORT"}, "SMOLLM_NUM_WORKERS"} == set(variables_of(ServiceSettings))
    own = {name: value for name, value in (api | worker).items() if value is not None}
    assert own.keys() == {"SMOLLM_REDIS_URL", "SMOLLM_API_HOST", "SMOLLM_API_KEYS_FILE"}


def test_every_setting_of_the_page_is_passed_on_or_has_a_meaning_of_its_own() -> None:
    page = environment_of("frontend")
    assert {*page, "UI_PORT"} == set(variables_of(PageSettings))
    assert {name for name, value in page.items() if value is not None} == {"SMOLLM_API_URL", "UI_HOST"}


def test_a_file_of_keys_is_mounted_where_the_api_is_told_that_it_stands() -> None:
    [mount] = [volume for volume in COMPOSE["services"]["api"]["volumes"] if isinstance(volume, dict)]
    told = environment_of("api")["SMOLLM_API_KEYS_FILE"]
    assert told == f"${{SMOLLM_API_KEYS_FILE:+{mount['target']}}}"
    assert mount["source"] == "${SMOLLM_API_KEYS_FILE:-/dev/null}" and mount["read_only"]
