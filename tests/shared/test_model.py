"""The network is Llama: equal to transformers on random small shapes, causal, aware of positions, of the right size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import SMOLLM2_135M, SMOLLM2_135M_RELEASED, ModelConfig
from shared.model import SmolLM2, rope_tables
from tests.tiny import TINY, tiny_model


@st.composite
def configs(draw: Any) -> ModelConfig:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=draw(st.integers(10, 90)),
        hidden_size=heads * 2 * draw(st.integers(1, 8)),
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        rope_theta=draw(st.sampled_from([100.0, 10_000.0, 100_000.0])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        tie_word_embeddings=draw(st.booleans()),
    )


@given(configs(), st.integers(0, 1_000), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_logits_equal_transformers(config: ModelConfig, seed: int, length: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = SmolLM2(config).eval()
    ours.initialize(seed)
    theirs: Any = LlamaForCausalLM(LlamaConfig(**config.to_hf())).eval()  # type: ignore[no-untyped-call]
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5


def test_a_token_does_not_see_what_follows() -> None:
    model, ids = tiny_model(), torch.arange(24).unsqueeze(0)
    with torch.inference_mode():
        before = model(ids)
        for place in (0, 7, 23):
            changed = ids.clone()
            changed[0, place] = 99
            after = model(changed)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.allclose(after[:, place:], before[:, place:])


def test_order_matters_but_absolute_place_does_not() -> None:
    model = tiny_model()
    ids = torch.tensor([[5, 9, 13, 7]])
    with torch.inference_mode():
        forward, backward = model(ids)[0, -1], model(ids[:, [1, 0, 2, 3]])[0, -1]
        moved = model(ids, torch.arange(4).unsqueeze(0) + 100)[0, -1]
    assert not torch.allclose(forward, backward)
    assert torch.allclose(forward, moved, atol=1e-4), "RoPE turns by distance alone"


def test_full_size_is_exact() -> None:
    for config in (SMOLLM2_135M, SMOLLM2_135M_RELEASED):
        with torch.device("meta"):
            model = SmolLM2(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters == 134_515_008
    assert ModelConfig(tie_word_embeddings=False).num_parameters == 134_515_008 + 49_152 * 576


def test_an_untrained_model_guesses_uniformly() -> None:
    config = ModelConfig(num_hidden_layers=2)
    model = SmolLM2(config)
    model.initialize(0)
    ids = torch.randint(config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss) - math.log(config.vocab_size)) < 0.3


def test_initial_weights_follow_seed_and_scale() -> None:
    assert torch.equal(tiny_model(3).model.embed_tokens.weight, tiny_model(3).model.embed_tokens.weight)
    assert not torch.equal(tiny_model(3).model.embed_tokens.weight, tiny_model(4).model.embed_tokens.weight)
    scaled, plain = SmolLM2(TINY), tiny_model(0)
    scaled.initialize(0, residual_scale=0.5)
    for name in ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
        ours = scaled.get_parameter(f"model.layers.1.{name}.weight")
        factor = 1.0 if name == "mlp.up_proj" else 0.5
        assert torch.allclose(ours, plain.get_parameter(f"model.layers.1.{name}.weight") * factor)


@pytest.mark.parametrize("config", [SMOLLM2_135M, SMOLLM2_135M_RELEASED])
def test_rope_tables_equal_transformers(config: ModelConfig) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs: Any = LlamaRotaryEmbedding(LlamaConfig(**config.to_hf()))
    cos, sin = theirs(torch.empty(1), torch.arange(config.max_position_embeddings).unsqueeze(0))
    ours = rope_tables(config, torch.device("cpu"))
    assert (ours[0] - cos[0]).abs().max() <= 1e-6
    assert (ours[1] - sin[0]).abs().max() <= 1e-6


def test_rope_stays_fp32_and_out_of_checkpoints() -> None:
    model = tiny_model().to(torch.bfloat16)
    assert model.rope[0].dtype == torch.float32
    assert not any("rope" in name or "rotary" in name for name in model.state_dict())
