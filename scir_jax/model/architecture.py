"""The shape of a model, read from and written to a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from scir_jax.errors import InputError

# What transformers assumes for a key that config.json does not have.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 4096 * 32,
    },
    "llama": {"max_position_embeddings": 2048},
}
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 10000.0
_CLASSES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama kind: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    family: str  # "mistral" or "llama"; they differ only in what config.json says
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = _DEFAULT_ROPE_THETA
    norm_eps: float = _DEFAULT_NORM_EPS
    tie_embeddings: bool = False
    sliding_window: int | None = None  # a position sees itself and the window - 1 before it
    max_positions: int = 4096

    @classmethod
    def from_hf_config(cls, config: dict[str, Any], where: str) -> Architecture:
        """The architecture that a parsed config.json describes, in its old or new spelling.

        Args:
          config: the parsed JSON object.
          where: the file it came from, for messages.

        Raises:
          InputError: for a model, a setting or a value that this decoder does not compute.
        """
        family = _family(config, where)
        _refuse_unsupported(config, where)
        defaults = _DEFAULTS[family]
        num_heads = _integer(config, "num_attention_heads", where)
        hidden_size = _integer(config, "hidden_size", where)
        default_kv_heads = defaults.get("num_key_value_heads", num_heads)
        num_kv_heads = _integer(config, "num_key_value_heads", where, default_kv_heads, num_heads)
        if num_heads % num_kv_heads:
            raise InputError(
                f"{where}: num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})."
            )
        share = hidden_size // num_heads
        head_dim = _integer(config, "head_dim", where, share, share)
        if head_dim % 2:
            raise InputError(f"{where}: head_dim is {head_dim}; rotary positions need an even number.")
        window = None
        if family == "mistral" and config.get("sliding_window", 0) is not None:
            window = _integer(config, "sliding_window", where, defaults["sliding_window"])
        return cls(
            family=family,
            vocab_size=_integer(config, "vocab_size", where),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size", where),
            num_layers=_integer(config, "num_hidden_layers", where),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=_rope_theta(config, where),
            norm_eps=_positive(config, "rms_norm_eps", where, _DEFAULT_NORM_EPS),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=window,
            max_positions=_integer(config, "max_position_embeddings", where, defaults["max_position_embeddings"]),
        )

    def to_hf_config(self) -> dict[str, Any]:
        """A config.json object for transformers: both spellings of the rotary base, no special token ids."""
        config = {
            "architectures": [_CLASSES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "initializer_range": 0.02,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            # transformers would otherwise assume the ids of its own default tokenizer
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "dtype": "float32",
        }
        if self.family == "mistral":
            config["sliding_window"] = self.sliding_window
        return config

    def parameter_count(self) -> int:
        """The number of weights, a tied head counted once."""
        d, f, v = self.hidden_size, self.intermediate_size, self.vocab_size
        attention = 2 * d * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * d * f + 2 * d
        return self.num_layers * layer + v * d * (1 if self.tie_embeddings else 2) + d


def _family(config: dict[str, Any], where: str) -> str:
    family = config.get("model_type")
    architectures = config.get("architectures") or []
    if family is None and len(architectures) == 1:
        family = {name: key for key, name in _CLASSES.items()}.get(architectures[0])
    supported = " and ".join(_CLASSES.values())
    if family not in _CLASSES:
        found = config.get("model_type") or architectures or "nothing"
        raise InputError(f"{where}: model_type is {found!r}; only {supported} are supported.")
    if architectures and _CLASSES[family] not in architectures:
        raise InputError(f"{where}: architectures is {architectures!r}; only {supported} are supported.")
    return family


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise InputError(f"{where}: {key} is true, but only layers without biases are supported.")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise InputError(f"{where}: hidden_act is {activation!r}, but only 'silu' is supported.")
    if config.get("quantization_config"):
        raise InputError(
            f"{where}: quantization_config is set, but quantized weights cannot be trained; "
            "give a directory with bfloat16, float16 or float32 weights."
        )
    if any(kind not in ("full_attention", "sliding_attention") for kind in config.get("layer_types") or []):
        raise InputError(f"{where}: layer_types has kinds other than full and sliding attention.")
    if len(set(config.get("layer_types") or [])) > 1:
        raise InputError(f"{where}: layer_types mixes full and sliding attention, which is not supported.")


def _rope_theta(config: dict[str, Any], where: str) -> float:
    """The rotary base: in rope_parameters (new), at top level (old), scaled variants refused."""
    # An old rope_scaling takes precedence in transformers as well.
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: {key} must be an object, not {rope!r}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(
            f"{where}: {key} asks for the rope type {kind!r}, but only 'default' (no scaling) is supported."
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InputError(f"{where}: partial_rotary_factor is {partial!r}, but only 1 is supported.")
    if "rope_theta" in rope:
        return _positive(rope, "rope_theta", where)
    return _positive(config, "rope_theta", where, _DEFAULT_ROPE_THETA)


def _integer(config: dict[str, Any], key: str, where: str, absent: int | None = None, null: int | None = None) -> int:
    """The positive integer at `key`; `absent` and `null` stand in for a key that is missing or null."""
    value = config.get(key, absent)
    if value is None:
        value = null
    if value is None:
        raise InputError(f"{where}: the key {key!r} is missing.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {key} must be a positive integer, not {value!r}.")
    return value


def _positive(config: dict[str, Any], key: str, where: str, absent: float | None = None) -> float:
    value = config.get(key, absent)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InputError(f"{where}: {key} must be a positive number, not {value!r}.")
    return float(value)
