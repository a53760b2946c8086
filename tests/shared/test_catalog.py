"""Which models stand in a folder, and which answers by default."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared import catalog
from shared.catalog import (
    ModelFolder,
    choose_default_model,
    list_model_folders,
    load_tokenizer,
    read_model_folder,
)
from shared.errors import ConfigError, SmolLMError, StorageError, TokenizerError, WeightsError
from shared.files import sha256_file
from tests.tiny import TINY, other_tokenizer, tiny_tokenizer, write_tiny_export


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def relist(path: Path, entry: dict[str, Any]) -> None:
    """Let the manifest say this of the weights."""
    edit(path / "manifest.json", files={"model.safetensors": entry})


def test_an_export_is_described(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path)
    assert folder.name == "tiny"
    assert folder.config == TINY
    assert folder.weights == folder.path / "model.safetensors"
    assert folder.revision == sha256_file(folder.weights)
    assert folder.end_token_ids == (0,)
    assert folder.trained_here
    assert list_model_folders(tmp_path) == {"tiny": folder}


def test_a_folder_without_manifest_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_export(tmp_path)
    (folder.path / "manifest.json").unlink()
    calls: list[Path] = []

    def counted(path: Path) -> str:
        calls.extend([path] if path == folder.weights else [])
        return sha256_file(path)

    monkeypatch.setattr(catalog, "sha256_file", counted)
    for _ in range(3):
        bare = read_model_folder(folder.path)
    assert bare.revision == folder.revision
    assert (bare.trained_here, bare.trained_length, bare.created_at) == (False, None, None)
    assert len(calls) == 1


def test_end_tokens_stand_in_the_generation_config(tmp_path: Path) -> None:
    path = write_tiny_export(tmp_path).path
    edit(path / "generation_config.json", eos_token_id=[2, 0, 2])
    assert read_model_folder(path).end_token_ids == (2, 0)
    edit(path / "generation_config.json", eos_token_id=512)
    with pytest.raises(ConfigError, match=r"end token 512; it must lie in 0\.\.511"):
        read_model_folder(path)
    (path / "generation_config.json").unlink()
    assert read_model_folder(path).end_token_ids == (0,)
    edit(path / "config.json", eos_token_id=[1, 2])
    assert read_model_folder(path).end_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (lambda path: (path / "config.json").unlink(), WeightsError, r"config\.json is missing"),
        (lambda path: (path / "config.json").write_text("{"), WeightsError, r"config\.json cannot be read"),
        (lambda path: (path / "config.json").write_text("[]"), WeightsError, "holds no JSON object"),
        (lambda path: edit(path / "config.json", model_type="gpt2"), ConfigError, "model_type = 'gpt2'"),
        (lambda path: (path / "manifest.json").write_text("\xff", "latin-1"), WeightsError, r"manifest\.json cannot"),
        (lambda path: edit(path / "config.json", hidden_size="48"), ConfigError, "hidden_size is '48'"),
        (lambda path: edit(path / "config.json", rope_parameters=[1]), WeightsError, "settings of an unknown form"),
        (lambda path: edit(path / "manifest.json", files=[]), WeightsError, "settings of an unknown form"),
        (lambda path: relist(path, {"bytes": 5, "sha256": "0" * 64}), WeightsError, "says 5"),
        (lambda path: relist(path, {"bytes": 5}), WeightsError, r"manifest\.json lists .* without .* sha256"),
        (lambda path: relist(path, {"sha256": "0" * 64}), WeightsError, r"manifest\.json lists .* without .* bytes"),
        (lambda path: relist(path, {"bytes": 5, "sha256": 7}), WeightsError, r"manifest\.json lists .* without"),
        (lambda path: edit(path / "manifest.json", created_at=5), WeightsError, r"manifest\.json has created_at = 5"),
        (lambda path: edit(path / "manifest.json", trained_length="64"), WeightsError, "has trained_length = '64'"),
        (
            lambda path: (path / "model.safetensors").rename(path / "model.safetensors.index.json"),
            WeightsError,
            "in several files",
        ),
        (
            lambda path: [(path / "model.safetensors").unlink(), (path / "b_half.pt").touch()],
            WeightsError,
            r"several \.pt files \(b_half\.pt, tiny_half\.pt\)",
        ),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 100), WeightsError, "no safetensors file"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, damage: Any, error: type[SmolLMError], sentence: str) -> None:
    path = write_tiny_export(tmp_path).path
    damage(path)
    with pytest.raises(error, match=sentence):
        read_model_folder(path)


def test_an_unusable_folder_is_logged_once_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_export(tmp_path, "good")
    path = write_tiny_export(tmp_path, "bad").path
    config = (path / "config.json").read_text()
    (path / "config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert list(list_model_folders(tmp_path)) == ["good"]
    assert [record.getMessage() for record in caplog.records] == [
        "left out the model bad: config.json lacks hidden_size, num_attention_heads, num_hidden_layers, vocab_size"
    ]
    (path / "config.json").write_text(config)
    assert list(list_model_folders(tmp_path)) == ["bad", "good"]


def test_a_fault_of_ours_in_one_folder_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_export(tmp_path, "good")
    deep = write_tiny_export(tmp_path, "deep").path
    (deep / "config.json").write_text("[" * 100_000)
    for _ in range(2):
        assert list(list_model_folders(tmp_path)) == ["good"]
    assert len([record for record in caplog.records if "left out the model deep" in record.getMessage()]) == 1


def test_weights_still_being_copied_are_left_out(tmp_path: Path) -> None:
    source = write_tiny_export(tmp_path / "elsewhere").path
    target = tmp_path / "models" / "tiny"
    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    for name in ("model.safetensors", "tiny_half.pt"):
        data = (source / name).read_bytes()
        with (target / name).open("wb") as file:
            for start in range(0, len(data), len(data) // 4 + 1):
                file.write(data[start : start + len(data) // 4 + 1])
                file.flush()
                done = file.tell() == len(data)
                assert list(list_model_folders(tmp_path / "models")) == (["tiny"] if done else [])
        (target / name).unlink()


def test_new_changed_and_removed_models_are_noticed(tmp_path: Path) -> None:
    assert list_model_folders(tmp_path / "absent") == {}
    assert list_model_folders(tmp_path) == {}
    first = write_tiny_export(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").touch()
    assert list_model_folders(tmp_path) == {"tiny": first}
    second = write_tiny_export(tmp_path, seed=1)
    assert list_model_folders(tmp_path)["tiny"].revision == second.revision != first.revision
    shutil.rmtree(tmp_path / "tiny")
    assert list_model_folders(tmp_path) == {}


def test_a_corrected_tokenizer_makes_it_another_model(tmp_path: Path) -> None:
    """Nothing of its manifest changes, and its ids are other words."""
    first = write_tiny_export(tmp_path)
    assert first.tokenizer_sha256 == sha256_file(first.path / "tokenizer.json")
    assert load_tokenizer(first).sha256 == tiny_tokenizer().sha256
    other_tokenizer().save(first.path)
    second = list_model_folders(tmp_path)["tiny"]
    assert second != first and second.manifest == first.manifest and second.revision == first.revision
    assert load_tokenizer(second).sha256 == other_tokenizer().sha256
    with pytest.raises(TokenizerError, match=r"tokenizer\.json changed while the model was loaded"):
        load_tokenizer(first)


def test_polling_reads_nothing_that_did_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_export(tmp_path)
    list_model_folders(tmp_path)
    monkeypatch.setattr(catalog, "read_model_folder", lambda path: pytest.fail("it was read again"))
    assert list(list_model_folders(tmp_path)) == ["tiny"]


def test_an_unreadable_folder_is_left_out(tmp_path: Path, modes_hold: None) -> None:
    path = write_tiny_export(tmp_path).path
    path.chmod(0)
    assert list_model_folders(tmp_path) == {}
    path.chmod(0o755)


def test_a_link_into_a_closed_folder_hides_no_other(
    tmp_path: Path, modes_hold: None, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_tiny_export(tmp_path / "models", "good")
    write_tiny_export(tmp_path / "closed", "linked")
    (tmp_path / "models" / "linked").symlink_to(tmp_path / "closed" / "linked")
    (tmp_path / "closed").chmod(0)
    try:
        assert list_model_folders(tmp_path / "models") == {"good": good}
    finally:
        (tmp_path / "closed").chmod(0o755)
    [told] = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "linked" in told and "Permission denied" in told
    assert list(list_model_folders(tmp_path / "models")) == ["good", "linked"], "it is looked at again"


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(tmp_path: Path, modes_hold: None) -> None:
    """Whoever serves its models would drop them."""
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0)
    for name, reason in (("file", "Not a directory"), ("locked", "Permission denied")):
        with pytest.raises(StorageError, match=rf"{name} cannot be read: {reason}"):
            list_model_folders(tmp_path / name)


def model(name: str, created_at: str | None, trained_here: bool, recipe: str = "cpu") -> ModelFolder:
    return ModelFolder(
        name=name,
        path=Path(name),
        config=TINY,
        weights=Path(name),
        revision="",
        tokenizer_sha256=None,
        trained_length=None,
        created_at=created_at,
        trained_here=trained_here,
        end_token_ids=(0,),
        manifest={"recipe": recipe},
    )


def test_the_default_is_the_newest_trained_here() -> None:
    models = [
        model("a", None, False),
        model("old", "2026-01-01T00:00:00+00:00", True),
        model("new", "2026-02-01T00:00:00+00:00", True),
        model("public", "2026-03-01T00:00:00+00:00", False),
    ]
    folders = {folder.name: folder for folder in models}
    assert choose_default_model(folders, None) == ("new", "the newest one trained here")
    assert choose_default_model(folders, "a") == ("a", "named in the settings")
    assert choose_default_model(folders, "gone") == ("new", "gone is not there; the newest one trained here")
    assert choose_default_model({"a": models[0], "public": models[3]}, None) == ("public", "the newest one")
    assert choose_default_model({"b": models[0], "a": models[0]}, None) == ("a", "the first by name")
    assert choose_default_model({}, None) == (None, "there is no model yet")


def test_a_check_of_the_installation_does_not_become_the_default() -> None:
    public = model("public", "2026-03-01T00:00:00+00:00", False)
    smoke = model("smoke", "2026-04-01T00:00:00+00:00", True, recipe="smoke")
    assert choose_default_model({"public": public, "smoke": smoke}, None) == ("public", "the newest one")
    assert choose_default_model({"public": public, "smoke": smoke}, "smoke") == ("smoke", "named in the settings")
    assert choose_default_model({"smoke": smoke}, None) == ("smoke", "the newest one trained here")
