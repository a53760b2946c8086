"""The house rules that a machine can check; CONTRIBUTING.md says them to people."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel

from benchmarks.__main__ import USUAL, benchmarks
from service.errors import RequestError
from tests.env_example import env_example
from trainer.config import TrainConfig
from trainer.recipe import section_within

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "trainer", "service", "frontend")
DRAWERS = {"utils.py", "helpers.py", "common.py", "misc.py"}

READS_ENVIRONMENT = {
    "service/settings.py",
    "frontend/settings.py",
    "trainer/config.py",
    "shared/pretrained.py",  # its own command line: `python -m shared.pretrained`
    "shared/device.py",
}


def sources(*folders: str, suffix: str = ".py") -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def holders(pattern: str, *folders: str) -> set[str]:
    """Files whose code matches a pattern."""
    return {relative(path) for path in sources(*folders) if re.search(pattern, path.read_text())}


def test_files_stay_small() -> None:
    limits = dict.fromkeys([*sources(*PACKAGES, "benchmarks"), ROOT / "dev.py"], 400)
    limits |= dict.fromkeys(sources("tests"), 700)
    limits |= dict.fromkeys(sources("service", suffix=".lua"), 60)
    too_long = {
        relative(path): n for path, limit in limits.items() if (n := len(path.read_text().splitlines())) > limit
    }
    assert not too_long


def test_there_are_no_drawers() -> None:
    assert not {relative(path) for path in sources(*PACKAGES) if path.name in DRAWERS}


def test_the_environment_is_read_in_one_place_per_process() -> None:
    assert holders(r"os\.(environ|getenv)", *PACKAGES) <= READS_ENVIRONMENT


def test_redis_is_reached_and_its_keys_are_spelt_in_one_place() -> None:
    assert holders(r"\.from_url\(", "service") == {"service/queue/connection.py"}
    assert holders(r"\{smollm\}", "service") == {"service/queue/keys.py"}


def test_weights_are_written_in_one_place_and_nothing_is_unpickled() -> None:
    assert holders(r"torch\.save\(|save_file\(", *PACKAGES) == {"shared/checkpoint.py"}
    for path in sources(*PACKAGES):
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, relative(path)
    assert not holders(r"pickle\.loads?\(", *PACKAGES)


def test_env_example_is_what_the_settings_say() -> None:
    message = "run `python -m tests.env_example > .env.example`"
    assert (ROOT / ".env.example").read_text() == env_example(), message


def fields_of(schema: type[BaseModel]) -> set[str]:
    """Names of a recipe's keys, those of its tables included."""
    names: set[str] = set()
    for name, field in schema.model_fields.items():
        assert field.description or hasattr(field.annotation, "model_fields"), f"{name} has no description"
        inner = section_within(field.annotation)
        names |= {name} | (fields_of(inner) if inner else set())
    return names


def test_every_recipe_field_stands_in_the_docs() -> None:
    text = (ROOT / "docs/training.md").read_text()
    assert not {name for name in fields_of(TrainConfig) if f"`{name}`" not in text}


def test_every_refusal_stands_in_the_api_docs() -> None:
    text = (ROOT / "docs/api.md").read_text()
    assert not {kind.code for kind in RequestError.__subclasses__() if f"`{kind.code}`" not in text}


def test_every_metric_stands_in_the_operations_guide() -> None:
    names = set(re.findall(r'"((?:api|worker)_[a-z_]+)"', (ROOT / "service/metrics.py").read_text()))
    text = (ROOT / "docs/operations.md").read_text()
    assert names
    assert not {name for name in names if name not in text}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "docs/operations.md"])
def test_commands_in_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ *|=\d+ )make ([a-z][a-z-]+)", text, re.MULTILINE)) <= targets
    for module in re.findall(r"python -m ((?:shared|trainer|service|frontend|tests|benchmarks)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_every_benchmark_is_listed_with_a_sentence() -> None:
    known = benchmarks()
    assert set(USUAL) < set(known)
    assert all(known.values()), known
    assert {"serve", "prepare", "gguf", "overload", "prove_queue"} <= set(known)


def test_the_tree_in_the_readme_is_true() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"^([\w./-]+\.(?:py|yml|toml|md|txt)|\w+/) {2,}", text, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_architecture_is_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 200


def test_nothing_committed_names_a_package_registry_or_a_local_path() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    hosts = re.compile(
        "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", r"registry\." + "npmjs", r"deb\." + "debian"))
    )
    assert not [
        name for name in files if (ROOT / name).is_file() and hosts.search((ROOT / name).read_text(errors="ignore"))
    ]
