"""Configurations are checked when made, and speak Hugging Face's words of both generations."""

from __future__ import annotations

from typing import Any

import pytest

from shared.config import PRESETS, SMOLLM2_135M_RELEASED, ModelConfig
from shared.errors import ConfigError

RELEASED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}


def test_the_released_config_is_read() -> None:
    config = ModelConfig.from_hf(RELEASED)
    assert config == ModelConfig(max_position_embeddings=8_192, rope_theta=100_000.0, bos_token_id=1, eos_token_id=2)
    assert SMOLLM2_135M_RELEASED.rope_theta == 100_000.0


@pytest.mark.parametrize("config", [*PRESETS.values(), ModelConfig(tie_word_embeddings=False, rope_theta=500.0)])
def test_written_and_read_it_is_the_same(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_rope_of_transformers_5_is_read() -> None:
    settings: dict[str, Any] = {**RELEASED, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    del settings["rope_theta"]
    assert ModelConfig.from_hf(settings).rope_theta == 123.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'; only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_type 'llama3'"),
        ({"head_dim": 32}, "head_dim 32; 64 is expected"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 577}, "577 is not a multiple of num_attention_heads 9"),
        ({"num_key_value_heads": 2}, "9 is not a multiple of num_key_value_heads 2"),
        ({"eos_token_id": 49152}, r"eos_token_id is 49152; it must lie in 0\.\.49151"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be positive"),
        ({"hidden_size": "576"}, "hidden_size is '576'; it must be a whole number"),
        ({"vocab_size": 49152.0}, "vocab_size is 49152.0; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; it must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"hidden_size": 27, "num_attention_heads": 9, "num_key_value_heads": 9}, "head_dim is 3"),
    ],
)
def test_another_network_is_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig.from_hf({**RELEASED, **changes})
