"""Mistral 7B and Nemo: one sliding window for all layers (7B v0.1) or none."""

from __future__ import annotations

from scir_jax.errors import InputError
from scir_jax.model.architecture import Architecture
from scir_jax.model.families.reader import SLIDING, Reader

MODEL_TYPE, HF_CLASS = "mistral", "MistralForCausalLM"
REWARD_CLASS = "MistralForSequenceClassification"


def read(config: Reader) -> Architecture:
    """Reads the architecture of a Mistral model."""
    config.refuse("attention_bias", "mlp_bias")
    layers = [SLIDING] * config.integer("num_hidden_layers")
    if len(set(config.layer_types(layers))) > 1:
        raise InputError(f"{config.where}: layer_types mixes full and sliding attention, which Mistral does not have")
    window = config.integer("sliding_window", 4096) if config.get("sliding_window", 0) is not None else None
    return config.architecture(
        kv_heads=8,
        family=MODEL_TYPE,
        layers=config.layers(layers, window),
        max_positions=config.integer("max_position_embeddings", 4096 * 32),
        activation=config.activation("hidden_act", "silu"),
    )
