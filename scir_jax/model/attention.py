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
      implementation: "xla", "cudnn" (GPU, bfloat16 or float16 only) or "auto" (cuDNN where it works).

    Returns:
      [B, T, H, d] in the queries' dtype; the softmax is computed in float32.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}.")
    if positions_B is not None:
        places_S = jnp.arange(k_BSKd.shape[1])
        visible_BS = places_S <= positions_B[:, None]
        if window is not None:
            visible_BS &= places_S > positions_B[:, None] - window
        # One query has no [T, S] scores to save, and cuDNN would need the mask as a float bias.
        return jax.nn.dot_product_attention(
            q_BTHd, k_BSKd, v_BSKd, mask=visible_BS[:, None, None, :], implementation="xla"
        )
    if implementation == "auto":
        implementation = "cudnn" if _cudnn_works(q_BTHd) else "xla"
    if window is not None and window >= q_BTHd.shape[1]:
        window = None
    return jax.nn.dot_product_attention(
        q_BTHd,
        k_BSKd,
        v_BSKd,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def _cudnn_works(q_BTHd: jax.Array) -> bool:
    head_dim = q_BTHd.shape[-1]
    return (
        jax.default_backend() == "gpu"
        and q_BTHd.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
    )
