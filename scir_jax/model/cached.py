"""Attention of one query in each row over a cache, in fixed blocks of places, no more of which are read than needed.

A running softmax over blocks: a block of which a row sees nothing adds exact zeros. So neither how many places a cache
has nor how far other rows look back changes a bit of a row's result.

Shapes: L layers, B rows, S places, H heads, K key/value heads, G = H / K, d head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.model.sharding import Layout

Array = jax.Array
BLOCK = 256
_LOWEST = float(np.finfo(np.float32).min)


def cache_places(tokens: int) -> int:
    """Returns the places of a cache for rows of so many tokens: whole blocks where there are several."""
    return tokens if tokens <= BLOCK else -(-tokens // BLOCK) * BLOCK


def over_cache(
    q_BHd: Array,
    k_LBSKd: Array,
    v_LBSKd: Array,
    layer: Array,
    positions_B: Array,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    layout: Layout | None = None,
) -> Array:
    """Computes attention of the queries at their positions over one layer of a cache of whole blocks.

    Args:
      layer: int32 scalar.
      positions_B: int32; a query sees the places up to and including its own, with a window the last ones of them.
      scale, cap, layout: as in scir_jax.model.attention.

    Returns:
      [B, H, d] in the queries' dtype; the softmax is computed in float32.

    Raises:
      ValueError: the cache does not have whole blocks.
    """
    batch, heads, dim = q_BHd.shape
    places, kv_heads = k_LBSKd.shape[2:4]
    if places % BLOCK:
        raise ValueError(f"a cache of {places} places does not have whole blocks of {BLOCK}")

    def lay(x: Array) -> Array:
        """Leaves the rows and heads of a loop's values where the cache has them."""
        return x if layout is None else layout.constrain(x, "batch", "kv_heads", *[None] * (x.ndim - 2))

    q_BKGd = lay(q_BHd.reshape(batch, kv_heads, heads // kv_heads, dim))

    def block(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum_BKG, total_BKG, mixed_BKGd = state

        def read(all_LBSKd: Array) -> Array:
            start = (layer, 0, index * BLOCK, 0, 0)
            return jax.lax.dynamic_slice(all_LBSKd, start, (1, batch, BLOCK, kv_heads, dim))[0]

        scores = jnp.einsum("bkgd,bskd->bkgs", q_BKGd, read(k_LBSKd), preferred_element_type=jnp.float32) * scale
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        at_S = index * BLOCK + jnp.arange(BLOCK)
        visible_BS = at_S <= positions_B[:, None]
        if window is not None:
            visible_BS &= at_S > positions_B[:, None] - window
        visible = visible_BS[:, None, None, :]
        new_BKG = jnp.maximum(maximum_BKG, jnp.where(visible, scores, _LOWEST).max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_BKG[..., None]), 0)
        shrink_BKG = jnp.exp(maximum_BKG - new_BKG)
        v_BSKd = read(v_LBSKd)
        added = jnp.einsum("bkgs,bskd->bkgd", weights.astype(v_BSKd.dtype), v_BSKd, preferred_element_type=jnp.float32)
        total_BKG = total_BKG * shrink_BKG + weights.sum(axis=-1)
        return lay(new_BKG), lay(total_BKG), lay(mixed_BKGd * shrink_BKG[..., None] + added)

    first = jnp.zeros((), jnp.int32)
    if window is not None:
        first = jnp.maximum(positions_B.min() - window + 1, 0) // BLOCK
    shape = q_BKGd.shape[:3]
    start = (
        lay(jnp.full(shape, _LOWEST, jnp.float32)),
        lay(jnp.zeros(shape, jnp.float32)),
        lay(jnp.zeros((*shape, dim), jnp.float32)),
    )
    end = positions_B.max() // BLOCK + 1
    _, total_BKG, mixed_BKGd = jax.lax.fori_loop(first, end, block, start)
    return (mixed_BKGd / total_BKG[..., None]).reshape(batch, heads, dim).astype(q_BHd.dtype)
