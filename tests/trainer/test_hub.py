"""Datasets streamed as the Hub's are, from local folders laid out like its repositories; and a Hub that is away."""

from __future__ import annotations

import json
import logging
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from shared.errors import ConfigError, DataError, StorageError
from tests.tiny import tiny_tokenizer
from tests.trainer.small_run import ROOT
from trainer import prepare as prepare_module
from trainer.config import DataSection, DatasetSection, Directories
from trainer.corpus import hub
from trainer.corpus.hub import HubText
from trainer.prepare import prepare
from trainer.recipe import load_recipe, parse_recipe, to_toml
from trainer.recipe_data import hub_texts, load_data, prepare_data

NUM_ROWS = 300


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three parquet files and two of JSON lines, 300 rows each kind."""
    root = tmp_path / "repository"
    for name in ("web", "code"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        rows = [f"Web page {number * 100 + row} is about the number {row * row}." for row in range(100)]
        table = pyarrow.table({"id": list(range(100)), "text": rows})
        pyarrow.parquet.write_table(table, root / "web" / f"train-{number:05}.parquet", row_group_size=10)
    for number in range(2):
        lines = [json.dumps({"content": f"print({number * 150 + row})\n"}) for row in range(150)]
        (root / "code" / f"train-{number:05}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def dataset(repository: Path, source: str = "web", **changes: Any) -> HubText:
    wanted: dict[str, Any] = {
        "source": source,
        "repository": str(repository),
        "subset": None,
        "folder": source,
        "split": "train",
        "revision": None,
        "text_column": "content" if source == "code" else "text",
        "max_tokens": 10**9,
    }
    return HubText(**wanted | changes)


def test_rows_come_in_order_and_a_reader_goes_on_where_another_was(repository: Path) -> None:
    for source, first in (("web", "Web page 0 is about the number 0."), ("code", "print(0)\n")):
        text = dataset(repository, source)
        documents = list(text.open())
        assert len(documents) == NUM_ROWS
        assert documents[0] == first
        for stop in (0, 1, 137, 299, 300):
            reader = text.open()
            assert [next(reader) for _ in range(stop)] == documents[:stop]
            position = json.loads(json.dumps(reader.position()))
            assert list(text.open(position)) == documents[stop:]


def test_a_stream_is_cut_at_its_budget_and_split(repository: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data = prepare(
        ["web", "code"],
        data_dir=data_dir,
        datasets={"web": dataset(repository, max_tokens=1_000), "code": dataset(repository, "code")},
        tokenizer=tiny_tokenizer(),
        vocab_size=None,
        output_dir=data_dir / "tokens",
        held_out_share=0.2,
    )
    web, code = data.token_files["web"], data.token_files["code"]
    assert 1_000 <= len(web.train) + len(web.held_out) < 1_100
    end = data.tokenizer.end_of_text_id
    assert int(np.sum(code.train == end) + np.sum(code.held_out == end)) == NUM_ROWS
    assert 0.1 < len(code.held_out) / (len(code.train) + len(code.held_out)) < 0.3


def test_a_dataset_that_ends_before_its_budget_says_so(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="trainer"):
        small_prepare(repository, tmp_path)
    assert "code: the dataset ended after" in caplog.text


def test_a_budget_the_disk_cannot_take_is_refused_before_any_work(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"1,000,000,000,000,000 tokens need 2000000\.0 GB.*data\.token_budget"):
        small_prepare(repository, tmp_path, max_tokens=10**15)
    assert not list(tmp_path.glob("tokens/*code*"))


def small_prepare(repository: Path, root: Path, max_tokens: int = 50_000) -> None:
    prepare(
        ["code"],
        data_dir=root,
        datasets={"code": dataset(repository, "code", max_tokens=max_tokens)},
        tokenizer=tiny_tokenizer(),
        vocab_size=None,
        output_dir=root / "tokens",
    )


def test_finished_token_files_need_no_dataset(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_prepare(repository, tmp_path)
    monkeypatch.setattr(hub, "import_datasets", lambda source: pytest.fail("opened again"))
    small_prepare(repository, tmp_path)


def test_a_new_tokenizer_learns_from_the_beginning_of_a_stream(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE_CHARACTERS", 2_000)
    data = prepare(
        ["web"],
        data_dir=tmp_path,
        datasets={"web": dataset(repository)},
        tokenizer=None,
        vocab_size=320,
        output_dir=tmp_path / "tokens",
    )
    assert data.tokenizer.vocab_size > 259
    assert data.tokenizer.encode("Web page")[0] != data.tokenizer.encode("W")[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_column": "body"}, ["no text in column 'body'", "id, text", "data.datasets.web.text_column"]),
        ({"text_column": "id"}, ["no text in column 'id'"]),
        ({"split": "nothing"}, ["cannot be opened", "nothing"]),
        ({"subset": "nothing", "folder": None}, ["cannot be opened", "nothing"]),
        ({"folder": "nothing"}, ["cannot be opened"]),
    ],
)
def test_what_a_dataset_has_not_is_named(repository: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as refusal:
        next(dataset(repository, **changes).open())
    for word in words:
        assert word in str(refusal.value)


def test_rows_without_text_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ["one", None, "", "two\0", "   \n", "three"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert list(dataset(tmp_path, folder=None).open()) == ["one", "three"]
    assert len(caplog.messages) == 1
    assert "web: rows without text are passed over" in caplog.text


def test_a_damaged_file_breaks_off_with_a_sentence(repository: Path) -> None:
    path = repository / "web" / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"dataset .* (broke off|cannot be opened)"):
        list(dataset(repository).open())


def test_a_hub_that_is_away_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine refuses, as a closed network does."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"dataset somebody/something of source 'web' could not be reached") as refusal:
        dataset(Path("somebody/something")).open()
    assert "data/web.txt" in str(refusal.value)


def test_without_the_package_a_sentence_says_what_to_install(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub.import_datasets.cache_clear()
    with pytest.raises(DataError, match=r"datasets is not installed: pip install"):
        dataset(repository).open()


def test_a_recipe_names_its_datasets(repository: Path, tmp_path: Path) -> None:
    table = {"repository": str(repository), "folder": "web", "share": 0.75}
    data = DataSection(
        sources=("web", "code"),
        datasets={
            "web": DatasetSection(**table),  # type: ignore[arg-type]
            "code": DatasetSection(repository=str(repository), folder="code", text_column="content", share=0.25),
        },
        token_budget=2_000,
        tokenizer="train",
        vocab_size=300,
    )
    assert {source: text.max_tokens for source, text in hub_texts(data).items()} == {"web": 1_500, "code": 500}
    directories = Directories(data_dir=tmp_path / "data", runs_dir=tmp_path / "runs", models_dir=tmp_path / "models")
    prepared = prepare_data(data, directories)
    assert load_data(data, directories).data_hash == prepared.data_hash


def test_the_recipe_survives_being_written_down() -> None:
    config = load_recipe("smoke", ["data.datasets.input={ repository = 'a/b', share = 0.5 }", "data.token_budget=9"])
    assert config.data.datasets["input"].repository == "a/b"
    assert parse_recipe(tomllib.loads(to_toml(config)), "again") == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.datasets.web.repository='a/b'", "data.token_budget=9"], "'web', which is not among data.sources"),
        (["data.datasets.input.repository='a/b'"], "set both or neither"),
        (["data.datasets.input.repositry='a/b'", "data.token_budget=9"], "did you mean 'repository'"),
        (["data.files.web=['a']"], "'web', which is not among data.sources"),
    ],
)
def test_recipes_that_cannot_be_right(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe("smoke", overrides)


def test_the_recipe_in_the_docs_is_one() -> None:
    """The example of datasets, put into a recipe, is understood."""
    text = (ROOT / "docs/training.md").read_text()
    example = next(part for part in text.split("```toml\n")[1:] if "token_budget" in part).split("```")[0]
    config = parse_recipe(tomllib.loads(to_toml(load_recipe("smoke"))) | tomllib.loads(example), "docs")
    assert set(config.data.datasets) == set(config.data.sources) == {"web", "code", "math"}
    assert sum(text.max_tokens for text in hub_texts(config.data).values()) == config.data.token_budget
