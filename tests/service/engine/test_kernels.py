"""The compiled network against PyTorch's, at every level of instructions this machine has."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.engine.engine import Engine
from service.engine.kernels import build
from service.engine.kernels.build import KernelsUnavailable, compile_library, library_name, usable_levels
from service.engine.kernels.decoder import CompiledDecoder
from service.engine.kernels.library import load_library
from service.engine.kv_cache import KVCache, Span
from service.engine.network import TorchNetwork
from service.engine.networks import choose_serving_dtype, load_network
from service.engine.sequence import Sequence
from shared import device as device_module
from shared.catalog import read_model_folder
from shared.checkpoint import load_export
from shared.config import ModelConfig
from shared.errors import ConfigError
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from tests.tiny import TINY, tiny_model, tiny_tokenizer, write_tiny_export

CPU = torch.device("cpu")
WIDE = ModelConfig(
    vocab_size=515,
    hidden_size=192,
    intermediate_size=200,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
"""Heads of 64 numbers, as SmolLM2's, for the tiled attention; sizes that fill no tile."""

LONG = ModelConfig(
    vocab_size=300,
    hidden_size=480,
    intermediate_size=1300,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
"""More inputs than 32 bits hold sums of, heads of 80 numbers: some registers full and a last one not."""

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in build.COMPILERS), reason="there is no C++ compiler here"
)


def model_of(config: ModelConfig) -> SmolLM2:
    model = SmolLM2(config)
    model.initialize(1)
    return model.to(torch.bfloat16).eval()


def cache_for(network: CompiledDecoder | TorchNetwork, config: ModelConfig) -> KVCache:
    dtype = network.model.model.embed_tokens.weight.dtype if isinstance(network, TorchNetwork) else torch.bfloat16
    blocks = network.wants_blocks
    return KVCache(config, num_slots=40, max_cached_tokens=16_384, dtype=dtype, device=CPU, in_blocks=blocks)


def ids_for(config: ModelConfig, count: int) -> list[int]:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(2)).tolist()


def all_scores(network: CompiledDecoder | TorchNetwork, config: ModelConfig, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return network.scores(cache_for(network, config), ids, [Span(0, 0, len(ids))], range(len(ids))).float().clone()


@pytest.mark.parametrize("level", [level.name for level in usable_levels()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_packed_as_the_floats_they_are(level: str, dtype: torch.dtype) -> None:
    halves, floats = (model_of(WIDE).to(dtype) for _ in range(2))
    odd = torch.tensor([6e-8, -6e-5, -0.0, 5.96e-8 * 513, 300.0], dtype=dtype)  # subnormal in fp16, and large
    for model in (halves, floats):
        matrices = dict(model.requires_grad_(False).named_parameters())
        matrices["lm_head.weight"][0, : len(odd)] = odd
        matrices["model.layers.0.mlp.gate_proj.weight"][3, -len(odd) :] = odd
    for is_int8 in (False, True):
        scores = [
            all_scores(CompiledDecoder(model, load_library(level), is_int8=is_int8), WIDE, ids_for(WIDE, 5))
            for model in (copy.deepcopy(halves), copy.deepcopy(floats).float())
        ]
        assert torch.equal(*scores)


@pytest.mark.parametrize("config", [TINY, WIDE, LONG], ids=["tiny", "wide", "long"])
@pytest.mark.parametrize("level", [level.name for level in usable_levels()])
def test_scores_are_those_of_the_exact_network(level: str, config: ModelConfig) -> None:
    ids = ids_for(config, 150)
    exact = all_scores(TorchNetwork(model_of(config).float()), config, ids)
    scores = {
        is_int8: all_scores(CompiledDecoder(model_of(config), load_library(level), is_int8=is_int8), config, ids)
        for is_int8 in (False, True)
    }
    assert scores[False].shape == (150, config.vocab_size)
    # Weights are the same bf16 numbers; what remains is the rounding of inputs, keys and values, 2**-9 each.
    assert (scores[False] - exact).std() < 0.01 * exact.std()
    assert (scores[True] - exact).std() < 0.05 * exact.std()


def relative_error(scores: Tensor, exact: Tensor) -> float:
    return float((scores - exact).std() / exact.std())


@pytest.mark.weights
def test_the_real_network_is_nearer_to_fp32_than_pytorchs_bf16(instruct_folder: Path) -> None:
    """The residual stream stays fp32: on every prompt the kernels lose less than PyTorch does in the same 16 bits."""
    exact_model, tokenizer = load_export(instruct_folder, device=CPU, dtype=torch.float32)
    rounded_model, _ = load_export(instruct_folder, device=CPU, dtype=torch.bfloat16)
    config = exact_model.config
    exact_network, rounded_network = TorchNetwork(exact_model), TorchNetwork(rounded_model)
    folder = read_model_folder(instruct_folder)
    compiled = load_network(folder, device=CPU, dtype=torch.bfloat16)[1].value
    assert isinstance(compiled, CompiledDecoder)
    questions = ("What is the capital of France?", "Name three primary colours.", "Write a haiku about rain.")
    prompts = [tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": text}])) for text in questions]
    prompts += [ids_for(config, count) for count in (1, 15, 16, 17, 33, 200)]
    for ids in prompts:
        exact = all_scores(exact_network, config, ids)
        rounded = all_scores(rounded_network, config, ids)
        scores = all_scores(compiled, config, ids)
        assert relative_error(scores, exact) < min(0.06, relative_error(rounded, exact))
        certain = exact.topk(2).values.diff().abs().flatten() > 0.25 * exact.std(dim=1)
        assert torch.equal(scores.argmax(dim=1)[certain], exact.argmax(dim=1)[certain])


@pytest.mark.parametrize("is_int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("level", [level.name for level in usable_levels()])
@pytest.mark.parametrize("config", [WIDE, LONG], ids=["wide", "long"])
def test_a_row_depends_on_no_other_row(level: str, is_int8: bool, config: ModelConfig) -> None:
    """Bit for bit: alone, in a batch of any size, with its prompt in one piece or in many."""
    decoder = CompiledDecoder(model_of(config), load_library(level), is_int8=is_int8)
    cache = cache_for(decoder, config)
    ids = ids_for(config, 120)
    whole = all_scores(decoder, config, ids)
    for count in (1, 2, 3, 5, 17):  # alone, and in steps that leave one row or few for themselves
        spans = [Span(20 + slot, 0, 1) for slot in range(count)]
        for scores in decoder.scores(cache, ids[:1] * count, spans, range(count)):
            assert torch.equal(scores, whole[0])
    draw = random.Random(3)
    done = dict.fromkeys(range(1, 13), 0)  # the same tokens in 12 slots, each at its own pace
    while any(count < len(ids) for count in done.values()):
        spans = [
            Span(slot, start, min(len(ids) - start, draw.choice([1, 1, 1, 1, draw.randint(2, 60)])))
            for slot, start in done.items()
            if start < len(ids) and draw.random() < 0.7
        ]
        if not spans:
            continue
        tokens = [token for span in spans for token in ids[span.start : span.end]]
        scores = decoder.scores(cache, tokens, spans, range(len(tokens)))
        row = 0
        for span in spans:
            assert torch.equal(scores[row : row + span.count], whole[span.start : span.end])
            row += span.count
            done[span.slot] = span.end


@pytest.mark.parametrize("is_int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("level", [level.name for level in usable_levels()])
def test_other_threads_give_the_same_bits(level: str, is_int8: bool) -> None:
    decoder = CompiledDecoder(model_of(WIDE), load_library(level), is_int8=is_int8)
    ids = ids_for(WIDE, 100)
    before = torch.get_num_threads()
    scores = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            scores.append(all_scores(decoder, WIDE, ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_an_engine_gives_the_same_tokens_alone_together_and_after_a_resume() -> None:
    model = tiny_model().to(torch.bfloat16)
    network = CompiledDecoder(model, load_library())
    engine = Engine(model, tiny_tokenizer(), num_slots=8, max_cached_tokens=2_000, network=network)

    def run(*sequences: Sequence) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {sequence.id: list(sequence.completion_ids) for sequence in sequences}
        for sequence in sequences:
            engine.add(sequence)
        while engine.has_work:
            for output in engine.step():
                tokens[output.sequence_id] += output.token_ids
        return tokens

    def request(number: int, completion_ids: tuple[int, ...] = ()) -> Sequence:
        return Sequence(
            id=str(number),
            prompt_ids=ids_for(TINY, 5 + 17 * number),
            params=SamplingParams(temperature=0.0 if number % 2 else 1.0, seed=number),
            max_new_tokens=24,
            completion_ids=list(completion_ids),
        )

    alone = {str(number): run(request(number))[str(number)] for number in range(8)}
    assert run(*(request(number) for number in range(8))) == alone
    assert run(*(request(number, tuple(alone[str(number)][:9])) for number in range(8))) == alone


def test_without_a_compiler_pytorch_computes_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(build, "SHIPPED", tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(KernelsUnavailable, match="no C\\+\\+ compiler"):
        build.find_library(usable_levels()[0])
    folder = write_tiny_export(tmp_path)
    _, choice = load_network(folder, device=CPU, dtype=torch.float32)
    assert isinstance(choice.value, TorchNetwork) and "not float32" in choice.reason
    _, choice = load_network(folder, device=CPU, dtype=torch.bfloat16, kernels="off")
    assert isinstance(choice.value, TorchNetwork) and "off in the settings" in choice.reason
    with pytest.raises(ConfigError, match="weights is 'int8', which needs the compiled kernels"):
        load_network(folder, device=CPU, dtype=torch.bfloat16, weights="int8", kernels="off")
    with pytest.raises(KernelsUnavailable, match="no level 'nonesuch'"):
        usable_levels("nonesuch")


@pytest.mark.parametrize("level", ["avx2", "portable"])
def test_a_cpu_without_bfloat16_serves_it_where_the_kernels_do(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    if level not in {usable.name for usable in usable_levels()}:
        pytest.skip(f"this CPU has no {level}")
    monkeypatch.setattr(device_module, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    choice = choose_serving_dtype(CPU, "auto", kernels=level)
    assert choice.value == torch.bfloat16 and f"kernels for {level} compute in it" in choice.reason
    choice = choose_serving_dtype(CPU, "auto", kernels="off")
    assert choice.value == torch.float32 and "off in the settings" in choice.reason
    assert choose_serving_dtype(CPU, "float32", kernels=level).value == torch.float32


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    level = usable_levels()[-1]
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-fno-such-flag"))
    with pytest.raises(KernelsUnavailable, match=r"failed: .*no-such-flag"):
        compile_library(level, tmp_path / library_name(level))
    assert list(tmp_path.iterdir()) == []


def test_an_int8_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    model, choice = load_network(write_tiny_export(tmp_path), device=CPU, dtype=torch.float32, weights="int8")
    assert isinstance(choice.value, CompiledDecoder) and choice.value.is_int8
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 0  # type: ignore[union-attr, operator]
