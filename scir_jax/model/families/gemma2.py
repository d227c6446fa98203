"""Gemma 2: soft-capped scores and logits, sliding windows in every other layer, four norms in each block."""

from __future__ import annotations

from scir_jax.model.architecture import Architecture
from scir_jax.model.families.reader import FULL, SLIDING, Reader

MODEL_TYPE, HF_CLASS = "gemma2", "Gemma2ForCausalLM"
REWARD_CLASS = "Gemma2ForSequenceClassification"


def read(config: Reader) -> Architecture:
    """Reads the architecture of a Gemma 2 model."""
    default = [FULL if i % 2 else SLIDING for i in range(config.integer("num_hidden_layers"))]
    return config.architecture(
        **gemma(config),
        family=MODEL_TYPE,
        layers=config.layers(config.layer_types(default), config.integer("sliding_window", 4096)),
        max_positions=config.integer("max_position_embeddings", 8192),
        attention_cap=config.optional("attn_logit_softcapping", 50.0),
        final_cap=config.optional("final_logit_softcapping", 30.0),
    )


def gemma(config: Reader) -> dict:
    """Reads what Gemma 2 and 3 have in common."""
    config.refuse("use_bidirectional_attention")
    bias = config.flag("attention_bias")
    return dict(
        kv_heads=4,
        head_dim=256,
        tie_embeddings=config.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        post_norms=True,
        norm_offset=1.0,
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        embed_scale=config.integer("hidden_size") ** 0.5,
        query_scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
    )
