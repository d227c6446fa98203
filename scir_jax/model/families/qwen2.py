"""Qwen 2 and 2.5: biases on queries, keys and values; upper layers may have a sliding window."""

from __future__ import annotations

from scir_jax.model.architecture import Architecture
from scir_jax.model.families.reader import FULL, SLIDING, Reader

MODEL_TYPE, HF_CLASS = "qwen2", "Qwen2ForCausalLM"
REWARD_CLASS = "Qwen2ForSequenceClassification"


def read(config: Reader) -> Architecture:
    """Reads the architecture of a Qwen 2 or 2.5 model."""
    return config.architecture(kv_heads=32, family=MODEL_TYPE, qkv_bias=True, **layers_and_limits(config))


def layers_and_limits(config: Reader) -> dict:
    """Reads what Qwen 2 and 3 have in common beside the sizes."""
    window = None
    if config.flag("use_sliding_window") and config.get("sliding_window", 0) is not None:
        window = config.integer("sliding_window", 4096)
    layers = config.integer("num_hidden_layers")
    full_layers = config.integer("max_window_layers", 28, least=0) if window else layers
    default = [SLIDING if i >= full_layers else FULL for i in range(layers)]
    return dict(
        layers=config.layers(config.layer_types(default), window),
        max_positions=config.integer("max_position_embeddings", 32768),
        activation=config.activation("hidden_act", "silu"),
    )
