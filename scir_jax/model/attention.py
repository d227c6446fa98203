"""Grouped-query attention and the one switch between its implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    *,
    positions_B: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Causal attention over right-padded rows, or one decoding step against a cache.

    Without `positions_B`, S = T and query t sees the keys s <= t. Padding is at the right end of a
    row, where no valid query looks, so that no padding mask is needed; the outputs at padded
    positions are finite and meaningless.

    With `positions_B`, T = 1 and the query of row b stands at positions_B[b] of a cache of S places,
    of which it sees the places up to and including its own.

    Args:
      q_BTHd: queries, H a multiple of K; k_BSKd, v_BSKd: keys and values, of the same dtype.
      positions_B: int32, or None.
      window: with a sliding window, a query sees only its own place and the window - 1 before it.
      scale: of the scores; d ** -0.5 by default.
      cap: scores become cap * tanh(scores / cap); XLA only.
      implementation: "xla", "cudnn" (GPU, bfloat16 or float16 only) or "auto" (cuDNN where it works).

    Returns:
      [B, T, H, d] in the queries' dtype; the softmax is computed in float32.

    Raises:
      ValueError: for an unknown implementation, and for cuDNN with a cap.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}.")
    if implementation == "cudnn" and cap is not None:
        raise ValueError("cuDNN attention has no soft cap; use attention xla or auto.")
    if scale is None:
        scale = q_BTHd.shape[-1] ** -0.5
    if positions_B is not None:
        places_S = jnp.arange(k_BSKd.shape[1])
        visible_BS = places_S <= positions_B[:, None]
        if window is not None:
            visible_BS &= places_S > positions_B[:, None] - window
        # One query has no [T, S] scores to save, and cuDNN would need the mask as a float bias.
        return _xla(q_BTHd, k_BSKd, v_BSKd, visible_BS[:, None, None, None, :], scale, cap)
    if implementation == "auto":
        implementation = "cudnn" if cap is None and _cudnn_works(q_BTHd) else "xla"
    tokens = q_BTHd.shape[1]
    if window is not None and window >= tokens:
        window = None
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTHd,
            k_BSKd,
            v_BSKd,
            is_causal=True,
            scale=scale,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    behind_TT = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    visible_TT = behind_TT >= 0 if window is None else (behind_TT >= 0) & (behind_TT < window)
    return _xla(q_BTHd, k_BSKd, v_BSKd, visible_TT, scale, cap)


def _xla(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, visible: jax.Array, scale: float, cap: float | None
) -> jax.Array:
    """Attention as two batched matrix products; `visible` broadcasts to [B, K, G, T, S], G = H / K.

    The queries of a group are stacked as rows of one product with their shared key head. XLA compiles that (and its
    gradient) to plain batched products, several times faster on a CPU than the five-axis einsum.
    """
    batch, tokens, heads, dim = q_BTHd.shape
    places, kv_heads = k_BSKd.shape[1:3]
    group = heads // kv_heads
    q_BKRd = q_BTHd.reshape(batch, tokens, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    q_BKRd = q_BKRd.reshape(batch, kv_heads, group * tokens, dim)
    scores = jnp.matmul(q_BKRd, k_BSKd.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, tokens, places) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    # Finite, so that a row that sees nothing (none does) would not become NaN.
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = weights.astype(v_BSKd.dtype).reshape(batch, kv_heads, group * tokens, places)
    mixed = jnp.matmul(weights, v_BSKd.transpose(0, 2, 1, 3))
    mixed = mixed.reshape(batch, kv_heads, group, tokens, dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, tokens, heads, dim)


def _cudnn_works(q_BTHd: jax.Array) -> bool:
    head_dim = q_BTHd.shape[-1]
    return (
        jax.default_backend() == "gpu"
        and q_BTHd.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
    )
