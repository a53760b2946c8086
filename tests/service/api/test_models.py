"""The model list keeps itself: exports come and go without a restart."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import httpx2
import pytest

from shared.catalog import read_model_folder
from tests.service.api.stack import ScriptedWorker, client_of, make_settings, running_api, wait_until
from tests.service.api.test_bad_input import assert_error
from tests.tiny import TINY_TEXTS, other_tokenizer, tiny_tokenizer, write_tiny_export


def names(client: httpx2.Client) -> set[str]:
    return {model["id"] for model in client.get("/v1/models").json()["data"]}


def test_exports_come_and_go(redis_url: str, tmp_path: Path, runs_dir: Path) -> None:
    models_dir = tmp_path / "models"
    settings = make_settings(redis_url, models_dir, runs_dir, default_model=None)
    with running_api(settings) as api, client_of(api) as client:
        assert names(client) == set()
        error = assert_error(client.get("/ready"), 503)
        assert "model" in error["message"]
        assert_error(client.post("/generate", json={"prompt": "a"}), 503)
        write_tiny_export(models_dir, "first")
        wait_until(lambda: names(client) == {"first"}, "the first export")
        assert_error(client.post("/generate", json={"prompt": "a"}), 503, code="no_worker")
        write_tiny_export(models_dir, "second", seed=1)
        wait_until(lambda: names(client) == {"first", "second"}, "the second export")
        before = client.get("/v1/models/second").json()
        write_tiny_export(models_dir, "second", seed=2)
        wait_until(lambda: client.get("/v1/models/second").json()["revision"] != before["revision"], "the new weights")
        (models_dir / "broken").mkdir()
        (models_dir / "broken" / "config.json").write_text("{")
        shutil.rmtree(models_dir / "first")
        wait_until(lambda: names(client) == {"second"}, "the first to be gone")
        assert_error(client.post("/tokenize", json={"text": "a", "model": "first"}), 404, code="model_not_found")


def test_a_model_is_replaced_when_its_workers_have_the_new_one(
    redis_url: str, tmp_path: Path, runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models_dir = tmp_path / "models"
    first = write_tiny_export(models_dir)
    assert first.tokenizer_sha256 is not None
    worker = ScriptedWorker(redis_url, {"tiny": (first.revision, tiny_tokenizer())})
    worker.tokenizers = {"tiny": first.tokenizer_sha256}
    worker.start()
    caplog.set_level(logging.INFO)
    settings = make_settings(redis_url, models_dir, runs_dir, model_poll_s=0.05)
    try:
        with running_api(settings) as api, client_of(api) as client:

            def served() -> tuple[str, list[int]]:
                answer = client.post("/tokenize", json={"text": TINY_TEXTS[0]}).json()
                return client.get("/v1/models/tiny").json()["revision"], answer["token_ids"]

            other_tokenizer().save(first.path)  # nothing else changes
            wait_until(lambda: "until its workers have it" in caplog.text, "the API to see it")
            assert served() == (first.revision, tiny_tokenizer().encode(TINY_TEXTS[0]))
            second = read_model_folder(first.path)
            assert second.tokenizer_sha256 is not None
            worker.tokenizers = {"tiny": second.tokenizer_sha256}
            wait_until(lambda: served() == (first.revision, other_tokenizer().encode(TINY_TEXTS[0])), "the new one")

            caplog.clear()
            (first.path / "tokenizer.json").write_text("{")  # half of a copy
            wait_until(lambda: "model tiny is left out" in caplog.text, "the API to see it")
            assert served() == (first.revision, other_tokenizer().encode(TINY_TEXTS[0]))

            third = write_tiny_export(models_dir, seed=3)
            wait_until(lambda: "until its workers have it" in caplog.text, "the API to see the third")
            assert served()[0] == first.revision
            worker.stop()
            worker.queue.withdraw()
            wait_until(lambda: served()[0] == third.revision, "the third, when nobody serves the model")
    finally:
        worker.stop()


def test_a_folder_that_cannot_be_read_is_our_fault_and_told_once(
    redis_url: str, tmp_path: Path, runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models_dir = tmp_path / "models"
    write_tiny_export(models_dir, "tiny")
    with (
        running_api(make_settings(redis_url, models_dir, runs_dir, model_poll_s=0.05)) as api,
        client_of(api) as client,
    ):
        models_dir.rename(tmp_path / "away")
        models_dir.touch()
        asked = {"text": "a", "model": "other"}
        wait_until(lambda: client.post("/tokenize", json=asked).status_code != 404, "another look at the folder")
        error = assert_error(client.post("/tokenize", json=asked), 503, code="not_ready")
        assert str(tmp_path) not in error["message"]
        assert client.post("/tokenize", json={"text": "a"}).status_code == 200, "what is known is served"
        wait_until(lambda: "cannot be read" in caplog.text, "a word in the log")
        models_dir.unlink()
        write_tiny_export(models_dir, "other")
        wait_until(lambda: names(client) == {"other"}, "the folder again")
    assert len([record for record in caplog.records if "cannot be read" in record.getMessage()]) == 1
    assert not any(record.exc_info for record in caplog.records)


def test_a_model_is_described(client: httpx2.Client) -> None:
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    tiny = models["tiny"]
    assert tiny["context_length"] == 256 and tiny["trained_length"] == 64 and len(tiny["revision"]) == 64
    assert tiny["is_default"] is True and models["plain"]["is_default"] is False
    assert tiny["has_chat_template"] is True and models["plain"]["has_chat_template"] is False


def test_tokens(client: httpx2.Client) -> None:
    text = "First Citizen: Größe 日本 🙂<|im_end|>"
    answer = client.post("/tokenize", json={"text": text}).json()
    assert answer["count"] == len(answer["token_ids"]) and answer["model"] == "tiny"
    body = {"token_ids": answer["token_ids"]}
    assert client.post("/detokenize", json=body).json()["text"] == text.removesuffix("<|im_end|>")
    assert_error(client.post("/detokenize", json={"token_ids": [512]}), 422, param="token_ids")
    assert client.post("/tokenize", json={"text": ""}).json()["token_ids"] == []


def test_a_broken_model_keeps_no_api_from_starting(
    redis_url: str, tmp_path: Path, runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models_dir = tmp_path / "models"
    write_tiny_export(models_dir, "whole")
    for name, settings in {"array": "[]", "templates": '{"chat_template": ["{{ x }}", {"name": "default"}]}'}.items():
        (write_tiny_export(models_dir, name).path / "tokenizer_config.json").write_text(settings)
    manifest = write_tiny_export(models_dir, "listed").path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "created_at": 20_261_125}))
    with (
        running_api(make_settings(redis_url, models_dir, runs_dir, default_model=None)) as api,
        client_of(api) as client,
    ):
        assert names(client) == {"whole", "templates"}
        assert client.get("/v1/models/templates").json()["has_chat_template"] is False
        (models_dir / "array" / "tokenizer_config.json").write_text("{}")
        wait_until(lambda: names(client) == {"whole", "templates", "array"}, "the mended model")
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 2, "each once"
    assert any("tokenizer_config.json holds no JSON object" in line for line in told)
    assert any("created_at = 20261125" in line for line in told)
