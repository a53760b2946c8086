"""The shape of the network, in Hugging Face's words, checked when it is made. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from shared.errors import ConfigError

# Llama settings this network has no code for, with the only value it can honour.
FIXED_HF_SETTINGS: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Llama-style decoder. Defaults are SmolLM2-135M as the original trains it: 134,515,008 parameters."""

    vocab_size: int = 49_152
    hidden_size: int = 576
    intermediate_size: int = 1_536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    max_position_embeddings: int = 2_048
    rope_theta: float = 10_000.0
    """10,000 with 2,048 positions in the original; 100,000 with 8,192 in the released SmolLM2."""
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    bos_token_id: int = 0
    eos_token_id: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_kind(field.name, value, str(field.type))
            if field.name.endswith("_token_id"):
                if not 0 <= value < self.vocab_size:
                    raise ConfigError(f"{field.name} is {value}; it must lie in 0..{self.vocab_size - 1}")
            elif field.type != "bool" and value <= 0:
                raise ConfigError(f"{field.name} is {value}; it must be positive")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Trainable numbers; a tied embedding counts once."""
        embedding = self.vocab_size * self.hidden_size
        queries_and_output = 2 * self.hidden_size * self.hidden_size
        keys_and_values = 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        layers = self.num_hidden_layers * (queries_and_output + keys_and_values + mlp + norms)
        return embedding * (1 if self.tie_word_embeddings else 2) + layers + self.hidden_size

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json` that `LlamaForCausalLM` loads, in transformers 4 and 5."""
        return {
            "architectures": ["LlamaForCausalLM"],
            **FIXED_HF_SETTINGS,
            **dataclasses.asdict(self),
            "head_dim": self.head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "torch_dtype": "float16",
        }

    @classmethod
    def from_hf(cls, settings: dict[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`.

        Raises:
            ConfigError: it describes a network this one is not, naming the setting and both values.
        """
        for name, supported in FIXED_HF_SETTINGS.items():
            if (value := settings.get(name, supported)) not in (supported, {}, {"rope_type": "default"}):
                raise ConfigError(f"config.json has {name} = {value!r}; only {supported!r} is supported")
        rope = settings.get("rope_parameters") or {}  # transformers 5 moved rope_theta in here
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json has rope_type {rope['rope_type']!r}; only 'default' is supported")
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in settings.items() if name in fields and value is not None}
        if "rope_theta" in rope:
            known["rope_theta"] = rope["rope_theta"]
        for name in ("bos_token_id", "eos_token_id"):
            if isinstance(known.get(name), list):  # several end tokens stand in generation_config.json
                known[name] = known[name][0]
        missing = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"} - known.keys()
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(sorted(missing))}")
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        known.setdefault("tie_word_embeddings", False)
        config = cls(**known)
        if settings.get("head_dim") not in (None, config.head_dim):
            raise ConfigError(f"config.json has head_dim {settings['head_dim']}; {config.head_dim} is expected")
        return config


def check_kind(name: str, value: Any, kind: str) -> None:
    """Refuse a value that a JSON file wrote in another kind, such as "576" for 576: torch would, in its own words."""
    words, kinds = {"int": ("a whole number", (int,)), "bool": ("true or false", (bool,))}.get(
        kind, ("a number", (int, float))
    )
    is_of_kind = isinstance(value, kinds) and (kind == "bool" or not isinstance(value, bool))
    if not is_of_kind or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it must be {words}")


SMOLLM2_135M = ModelConfig()
"""The original's network; its RoPE knows 2,048 positions."""

SMOLLM2_135M_RELEASED = ModelConfig(max_position_embeddings=8_192, rope_theta=100_000.0)
"""The same weights' shape with the RoPE of the public SmolLM2-135M."""

PRESETS = {"smollm2-135m": SMOLLM2_135M, "smollm2-135m-released": SMOLLM2_135M_RELEASED}
