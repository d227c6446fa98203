"""Gemma 3, text: normalised queries and keys, five layers with a window (and their own rotary base) to one without."""

from __future__ import annotations

from scir_jax.errors import InputError
from scir_jax.model.architecture import Architecture, Layer, Rope
from scir_jax.model.families.gemma2 import gemma
from scir_jax.model.families.reader import FULL, SLIDING, Reader

MODEL_TYPE, HF_CLASS = "gemma3_text", "Gemma3ForCausalLM"
REWARD_CLASS = "Gemma3TextForSequenceClassification"


def read(config: Reader) -> Architecture:
    """Reads the architecture of a Gemma 3 text model."""
    # transformers reads this key and does not apply it
    config.refuse("attn_logit_softcapping")
    pattern = config.integer("sliding_window_pattern", 6, 6)
    default = [SLIDING if (i + 1) % pattern else FULL for i in range(config.integer("num_hidden_layers"))]
    window = config.integer("sliding_window", 4096)
    kinds = {SLIDING: Layer(window, _rope(config, SLIDING)), FULL: Layer(None, _rope(config, FULL))}
    return config.architecture(
        **gemma(config),
        family=MODEL_TYPE,
        layers=tuple(kinds[kind] for kind in config.layer_types(default)),
        max_positions=config.integer("max_position_embeddings", 131072),
        qk_norm=True,
        final_cap=config.optional("final_logit_softcapping"),
    )


def _rope(config: Reader, kind: str) -> Rope:
    """Reads the rotary positions of a layer type.

    They are in rope_parameters by layer type (new), or in rope_theta with rope_scaling, and rope_local_base_freq (old).
    """
    by_type = config.get("rope_parameters") or {}
    if not isinstance(by_type, dict) or by_type and not {FULL, SLIDING} & set(by_type):
        raise InputError(f"{config.where}: rope_parameters must be an object of {FULL} and {SLIDING}, not {by_type!r}")
    found = by_type.get(kind) or {}
    if kind == SLIDING:
        return config.rope_of(found, "rope_parameters", config.positive("rope_local_base_freq", 1e4))
    key, scaling = "rope_parameters", config.get("rope_scaling")
    if isinstance(found, dict) and scaling:
        key, found = "rope_scaling", found | scaling if isinstance(scaling, dict) else scaling
    return config.rope_of(found, key, config.positive("rope_theta", 1e6))
