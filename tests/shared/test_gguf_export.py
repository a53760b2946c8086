"""A GGUF file written here, read by llama.cpp itself: the same ids, the same greedy tokens, nearly the same scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers
from torch.nn.functional import cross_entropy

from benchmarks.strings import awkward_strings
from shared.checkpoint import half_tensors
from shared.errors import WeightsError
from shared.generate import generate
from shared.gguf_export import GgufKind, write_gguf
from shared.gguf_import import import_gguf
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from shared.tokenizer import Tokenizer
from tests.shared.llama_cpp import LlamaCpp
from tests.tiny import TINY, TINY_TEXTS, tiny_model, tiny_tokenizer

PROMPTS = ("First Citizen:", "def add(first", "Question: 12", "She sells")


@functools.cache
def trained_model() -> SmolLM2:
    """A network that has learnt the tiny texts by heart, so that its greedy choices are clear ones."""
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids_BT = torch.tensor([tiny_tokenizer().encode(text * 5)[:25] for text in TINY_TEXTS])
    for _ in range(80):
        cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufKind, Path]:
    path = tmp_path_factory.mktemp("gguf") / f"tiny-{request.param}.gguf"
    model = trained_model()
    write_gguf(path, half_tensors(model), model.config, tiny_tokenizer(), name="tiny", kind=request.param)
    return request.param, path


@pytest.fixture(scope="module")
def llama_cpp(written: tuple[GgufKind, Path]) -> Iterator[LlamaCpp]:
    yield LlamaCpp(written[1])


def test_llama_cpp_cuts_text_into_the_same_ids(llama_cpp: LlamaCpp) -> None:
    strings = [text for text in awkward_strings(150, seed=5) if "\0" not in text]
    assert [llama_cpp.encode(text) for text in strings] == tiny_tokenizer().encode_batch(strings)


def test_llama_cpp_continues_as_we_do(llama_cpp: LlamaCpp) -> None:
    for prompt in PROMPTS:
        ids = tiny_tokenizer().encode(prompt)
        ours = list(generate(trained_model(), ids, SamplingParams(temperature=0), max_new_tokens=16))
        assert llama_cpp.complete(ids, 16)["tokens"] == ours
        assert len(set(ours)) > 4


def test_llama_cpp_scores_as_we_do(written: tuple[GgufKind, Path], llama_cpp: LlamaCpp) -> None:
    limit = {"f16": 0.01, "q8_0": 0.1}[written[0]]
    ids = tiny_tokenizer().encode("First Citizen:\nBefore we")
    ours = trained_model()(torch.tensor([ids]))[0, -1].log_softmax(-1)
    (position,) = llama_cpp.complete(ids, 1, n_probs=10)["completion_probabilities"]
    likely = [token for token in position["top_logprobs"] if token["logprob"] > -5]
    assert likely
    for token in likely:
        assert token["logprob"] == pytest.approx(float(ours[token["id"]]), abs=limit)


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    write_gguf(tmp_path / "tiny.gguf", half_tensors(model), model.config, tiny_tokenizer(), name="tiny")
    again, tokenizer = import_gguf(tmp_path / "tiny.gguf")
    assert again.config.to_hf() == TINY.to_hf()
    for name, tensor in half_tensors(model).items():
        assert torch.equal(again.get_parameter(name), tensor.float()), name
    strings = awkward_strings(100, seed=3)
    assert tokenizer.encode_batch(strings) == tiny_tokenizer().encode_batch(strings)
    assert tokenizer.special_tokens == tiny_tokenizer().special_tokens
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer().backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = Tokenizer(backend, tiny_tokenizer().settings)
    with pytest.raises(WeightsError, match="does not split text as SmolLM2's"):
        write_gguf(tmp_path / "tiny.gguf", half_tensors(tiny_model()), TINY, other, name="tiny")


def test_ids_beyond_the_tokenizers_have_names(tmp_path: Path) -> None:
    """A model's embedding is often rounded up; llama.cpp wants as many names as rows."""
    config = dataclasses.replace(TINY, vocab_size=544)
    model = SmolLM2(config)
    model.initialize(0)
    write_gguf(tmp_path / "tiny.gguf", half_tensors(model), config, tiny_tokenizer(), name="tiny")
    ids = tiny_tokenizer().encode(TINY_TEXTS[0])
    assert LlamaCpp(tmp_path / "tiny.gguf").encode(TINY_TEXTS[0]) == ids
