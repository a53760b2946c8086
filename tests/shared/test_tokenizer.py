"""Token ids equal transformers', both ways, for a tokenizer trained here and for SmolLM2's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.strings import awkward_strings
from shared.config import ModelConfig
from shared.errors import GenerationError, TokenizerError
from shared.tokenizer import Tokenizer
from tests.tiny import TINY, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save(tmp_path)
    return tmp_path


def assert_equal_to_transformers(folder: Path, strings: list[str]) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_folder(folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size
    for text, ids in zip(strings, ours.encode_batch(strings), strict=True):
        assert theirs(text, add_special_tokens=False).input_ids == ids == ours.encode(text), text
        for skip in (True, False):
            assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special_tokens=skip)
    messages = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "ho"}]
    for prompt in (True, False):
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert rendered == ours.render_chat(messages, add_generation_prompt=prompt)


def test_ids_equal_transformers_for_a_trained_tokenizer(folder: Path) -> None:
    assert_equal_to_transformers(folder, awkward_strings(1_000, seed=2))


@pytest.mark.weights
def test_ids_equal_transformers_for_smollm2(instruct_folder: Path) -> None:
    assert_equal_to_transformers(instruct_folder, awkward_strings(5_000, seed=0))


@given(st.text(st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_one_id_and_are_skipped() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert tokenizer.end_of_text_id == 0
    ids = tokenizer.encode("<|im_start|>a<|im_end|><|endoftext|>")
    assert ids[0] == 1
    assert ids[-2:] == [2, 0]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|><|endoftext|>"


def test_digits_stand_alone() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer.encode("2026")) == 4


def test_nul_and_control_characters_come_back() -> None:
    text = "a\x00b\x01\x04\x7f\r\n"
    assert tiny_tokenizer().decode(tiny_tokenizer().encode(text)) == text


@pytest.mark.parametrize("text", ["ab\ud800", "\udfffab", "\udc00\ud800"])
def test_a_lone_surrogate_is_named_with_its_place(text: str) -> None:
    place = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    with pytest.raises(
        GenerationError, match=f"lone surrogate U\\+D[8F].. at character {place}|U\\+DC00 at character 0"
    ):
        tiny_tokenizer().encode(text)
    with pytest.raises(GenerationError, match="lone surrogate"):
        tiny_tokenizer().encode_batch(["fine", text])


def test_training_is_repeatable_and_of_the_size_asked_for() -> None:
    texts = ["the cat sat on the mat " * 5, "def f(x):\n    return x\n" * 5]
    first, second = (Tokenizer.train(texts, vocab_size=270) for _ in range(2))
    assert first.sha256 == second.sha256
    assert first.vocab_size == 270
    assert Tokenizer.train(texts, vocab_size=269).sha256 != first.sha256
    assert Tokenizer.train(texts, vocab_size=10_000).vocab_size < 300, "a little text has no more to merge"
    with pytest.raises(TokenizerError, match=r"vocab_size is 200; .* need 259"):
        Tokenizer.train(texts, vocab_size=200)


def test_saved_and_read_again_it_is_the_same(folder: Path) -> None:
    again = Tokenizer.from_folder(folder)
    assert again.sha256 == tiny_tokenizer().sha256
    assert again.chat_template == tiny_tokenizer().chat_template
    assert again.special_tokens == tiny_tokenizer().special_tokens


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_broken_tokenizer_names_its_file(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(TokenizerError, match=r"tokenizer.json is not a tokenizer"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(("content", "words"), [("{", "cannot be read"), ("[]", "holds no JSON object")])
@pytest.mark.parametrize("has_template", [False, True])
def test_broken_settings_name_their_file(folder: Path, content: str, words: str, has_template: bool) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    if has_template:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(TokenizerError, match=rf"tokenizer_config.json {words}"):
        Tokenizer.from_folder(folder)


def test_another_kind_of_tokenizer_is_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    with pytest.raises(TokenizerError, match="only byte-level BPE"):
        Tokenizer(backend, {})


@pytest.mark.parametrize(("vocab_size", "fits"), [(512, True), (576, True), (511, False), (49_152, False)])
def test_a_tokenizer_of_another_model_is_refused(vocab_size: int, fits: bool) -> None:
    config = ModelConfig(vocab_size=vocab_size)
    if fits:
        tiny_tokenizer().check_fits(config)
    else:
        with pytest.raises(TokenizerError, match=f"512 ids and the model {vocab_size:,}"):
            tiny_tokenizer().check_fits(config)


def test_the_template_of_a_folder_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<|endoftext|>hi"


def test_one_of_several_named_templates(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["chat_template"] = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    content["eos_token"] = {"content": "<|im_end|>", "special": True}
    path.write_text(json.dumps(content))
    assert Tokenizer.from_folder(folder).render_chat([]) == "yes"


def test_without_a_template_a_chat_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(GenerationError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_chatml_is_smollm2s() -> None:
    messages = [{"role": "user", "content": "What is\n1+1?"}]
    assert tiny_tokenizer().render_chat(messages) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    messages.insert(0, {"role": "system", "content": "Be brief."})
    assert tiny_tokenizer().render_chat(messages, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is\n1+1?<|im_end|>\n"
    )


def test_a_template_can_refuse_and_cannot_reach_out() -> None:
    tokenizer = Tokenizer(tiny_tokenizer().backend, {"chat_template": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(GenerationError, match="roles must alternate"):
        tokenizer.render_chat([])
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(GenerationError, match="refuses the messages"):
        Tokenizer(tiny_tokenizer().backend, {"chat_template": escape}).render_chat([])
    with pytest.raises(GenerationError, match="template is broken"):
        Tokenizer(tiny_tokenizer().backend, {"chat_template": "{% if %}"}).render_chat([])


def test_the_vocabulary_of_the_tiny_model_is_full() -> None:
    assert tiny_tokenizer().vocab_size == TINY.vocab_size


def test_tokenizer_and_catalog_need_no_torch() -> None:
    code = "import sys, shared.catalog, shared.tokenizer, shared.log; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
