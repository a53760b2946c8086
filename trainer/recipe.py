"""From a recipe's name or path and `--set` changes to a checked TrainConfig, and back to TOML for the run's folder."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shared.errors import ConfigError
from shared.files import reading_errors
from trainer.config import NAME_RULE, TrainConfig

RECIPES_DIR = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with the trainer."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe and apply `key=value` changes; a dotted key reaches into a table (`data.vocab_size=4096`).

    Raises:
        ConfigError: no such recipe, not to be read or not TOML; an unknown key (the nearest known one named), or an
            impossible value.
    """
    path = find_recipe(name_or_path)
    try:
        with reading_errors(path, ConfigError):
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from error
    settings.setdefault("name", path.stem)
    for override in overrides:
        apply_override(settings, override)
    return parse_recipe(settings, f"recipe {path}" if path.parent != RECIPES_DIR else f"recipe {path.stem}")


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe given by name or by path."""
    if name_or_path in recipe_names():
        return RECIPES_DIR / f"{name_or_path}.toml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise ConfigError(f"there is no recipe file {name_or_path}; known recipes are {', '.join(recipe_names())}")
    raise ConfigError(
        f"there is no recipe {name_or_path!r}{did_you_mean(name_or_path, recipe_names())}; "
        f"known recipes are {', '.join(recipe_names())}, or give the path of a TOML file"
    )


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one `key=value` in place; the value is read as TOML, and as plain text where it is not TOML."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r} is not of the form key=value")
    *tables, last = key.strip().split(".")
    table: Any = settings
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r} cannot be applied: {part} is not a table")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def parse_recipe(settings: dict[str, Any], where: str) -> TrainConfig:
    """Check settings against TrainConfig; `where` begins the sentence of any error."""
    try:
        # JSON mode lets a list be a tuple and still refuses every other conversion.
        return TrainConfig.model_validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        # A misspelt key leaves the right one missing: the misspelling is what to tell.
        findings = sorted(error.errors(), key=lambda finding: finding["type"] != "extra_forbidden")
        raise ConfigError(f"{where}: {explain(findings[0])}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def explain(error: ErrorDetails) -> str:
    """Turn one of pydantic's findings into a sentence."""
    *parents, last = error["loc"] or ("recipe",)
    key = ".".join(str(part) for part in (*parents, last))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{did_you_mean(str(last), known_keys(parents))}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "string_pattern_mismatch":  # only names have a pattern
        is_key = last == "[key]"
        told = f"{'.'.join(map(str, parents[:-1]))} names" if is_key else f"{key} is"
        return f"{told} {error['input']!r}; {NAME_RULE}"
    return f"{key} is {error['input']!r}; {error['msg'][:1].lower()}{error['msg'][1:]}"


def known_keys(parents: Iterable[int | str]) -> list[str]:
    """Return the keys of the table that a path of keys and list indices leads to."""
    section: Any = TrainConfig
    for part in parents:
        if isinstance(part, str) and part in section.model_fields:  # any other names an entry of a dictionary
            section = section_within(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def section_within(annotation: Any) -> Any:
    """Return the Section class inside an annotation such as `tuple[StageSection, ...]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = getattr(annotation, "__args__", ())
    return next((found for inner in inside if (found := section_within(inner)) is not None), None)


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known word, or nothing where none is near."""
    nearest = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def to_toml(config: TrainConfig) -> str:
    """Write a resolved recipe as TOML that `load_recipe` reads back to the same config."""
    settings = config.model_dump(mode="json", exclude_none=True)
    tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
    rows = {
        key: value
        for key, value in settings.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    lines = [f"{key} = {toml_value(value)}" for key, value in settings.items() if key not in tables | rows]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    for name, row_list in rows.items():
        for row in row_list:
            lines += ["", f"[[{name}]]", *(f"{key} = {toml_value(value)}" for key, value in row.items())]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """One value in TOML; its strings are JSON's."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(inner) for inner in value) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
