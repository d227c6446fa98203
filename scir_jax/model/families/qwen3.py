"""Qwen 3: queries and keys are normalised, and the head dimension is a setting of its own."""

from __future__ import annotations

from scir_jax.model.architecture import Architecture
from scir_jax.model.families.qwen2 import layers_and_limits
from scir_jax.model.families.reader import Reader

MODEL_TYPE, HF_CLASS = "qwen3", "Qwen3ForCausalLM"
REWARD_CLASS = "Qwen3ForSequenceClassification"


def read(config: Reader) -> Architecture:
    """Reads the architecture of a Qwen 3 model."""
    bias = config.flag("attention_bias")
    return config.architecture(
        kv_heads=32,
        head_dim=128,
        family=MODEL_TYPE,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        **layers_and_limits(config),
    )
