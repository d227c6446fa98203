"""Llama 2, 3, 3.1, 3.2: the plain decoder, with scaled rotary positions from 3.1 on."""

from __future__ import annotations

from scir_jax.model.architecture import Architecture
from scir_jax.model.families.reader import FULL, Reader

MODEL_TYPE, HF_CLASS = "llama", "LlamaForCausalLM"
REWARD_CLASS = "LlamaForSequenceClassification"


def read(config: Reader) -> Architecture:
    """Reads the architecture of a Llama model."""
    bias = config.flag("attention_bias")
    return config.architecture(
        family=MODEL_TYPE,
        layers=config.layers([FULL] * config.integer("num_hidden_layers"), None),
        max_positions=config.integer("max_position_embeddings", 2048),
        activation=config.activation("hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
    )
