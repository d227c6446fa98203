"""The cache of keys and values, and attention of one query in each row over it.

A cache of S places is a ring: position p lies at place p mod S, so that a row's last S positions are there. Layers with
a sliding window have no more places than their window, in whole blocks; layers of as many places are one stack.

Attention reads fixed blocks of places, and no more of them than needed. A running softmax over blocks: a block of which
a row sees nothing adds exact zeros. So how far other rows look back changes no bit of a row's result, nor does how many
places a cache has beyond those that the row fills.

Shapes: L layers of a stack, B rows, P prompt tokens, S places, H heads, K key/value heads, G = H / K, d head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.model.architecture import Architecture, Layer
from scir_jax.model.sharding import Layout

Array = jax.Array
BLOCK = 256
_LOWEST = float(np.finfo(np.float32).min)


class Cache(NamedTuple):
    """Keys (rotated) and values of the layers of a stack: [L, B, S, K, d] each, compute dtype."""

    k: Array
    v: Array


class Stack(NamedTuple):
    """The numbers of the layers that hold so many places."""

    places: int
    layers: tuple[int, ...]


def cache_places(tokens: int) -> int:
    """Returns the places of a cache for rows of so many tokens: whole blocks where there are several."""
    return tokens if tokens <= BLOCK else -(-tokens // BLOCK) * BLOCK


def layer_places(layer: Layer, places: int) -> int:
    """Returns how many of a cache's places a layer has: no more than its window needs."""
    return places if layer.window is None else min(cache_places(layer.window), places)


def stacks(arch: Architecture, places: int) -> tuple[Stack, ...]:
    """Groups the layers by their places in a cache of so many, the most places first.

    The stacks of a cache that exists are those of the places of its first one.
    """
    of = [layer_places(layer, places) for layer in arch.layers]
    numbered = list(enumerate(of))
    return tuple(Stack(n, tuple(i for i, m in numbered if m == n)) for n in sorted(set(of), reverse=True))


def held(positions_B: Array, at_S: Array, places: int) -> Array:
    """Returns the positions [B, S] that places hold once rows are written up to a position; below 0: none yet."""
    last_B1 = positions_B[:, None] % places
    turn_B1 = positions_B[:, None] - last_B1
    return at_S + jnp.where(at_S > last_B1, turn_B1 - places, turn_B1)


def visible(positions_B: Array, at_S: Array, places: int, window: int | None) -> Array:
    """Checks which of a cache's places the queries at the positions see, [B, S]; at_S are some of the places."""
    held_BS = held(positions_B, at_S, places)
    seen_BS = held_BS >= 0
    return seen_BS if window is None else seen_BS & (held_BS > positions_B[:, None] - window)


def of_prompts(x_BPKd: Array, lengths_B: Array, places: int) -> Array:
    """Returns what right-padded prompts leave in a cache: [B, P, K, d], or [B, S, K, d] where they are longer than it.

    A place that no token of a prompt reaches holds anything: it is not visible until it is written.
    """
    if x_BPKd.shape[1] <= places:
        return x_BPKd
    at_BS = jnp.maximum(held(lengths_B - 1, jnp.arange(places), places), 0)
    return jnp.take_along_axis(x_BPKd, at_BS[:, :, None, None], axis=1)


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
    """Computes attention of the queries at their positions over one layer of a stack of whole blocks.

    Args:
      layer: int32 scalar, its number in the stack.
      positions_B: int32; a query sees what is held up to and including its own, with a window the last ones of it.
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
        seen = visible(positions_B, at_S, places, window)[:, None, None, :]
        new_BKG = jnp.maximum(maximum_BKG, jnp.where(seen, scores, _LOWEST).max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_BKG[..., None]), 0)
        shrink_BKG = jnp.exp(maximum_BKG - new_BKG)
        v_BSKd = read(v_LBSKd)
        added = jnp.einsum("bkgs,bskd->bkgd", weights.astype(v_BSKd.dtype), v_BSKd, preferred_element_type=jnp.float32)
        total_BKG = total_BKG * shrink_BKG + weights.sum(axis=-1)
        return lay(new_BKG), lay(total_BKG), lay(mixed_BKGd * shrink_BKG[..., None] + added)

    shape = q_BKGd.shape[:3]
    start = (
        lay(jnp.full(shape, _LOWEST, jnp.float32)),
        lay(jnp.zeros(shape, jnp.float32)),
        lay(jnp.zeros((*shape, dim), jnp.float32)),
    )
    end = jnp.minimum(positions_B.max(), places - 1) // BLOCK + 1
    _, total_BKG, mixed_BKGd = jax.lax.fori_loop(0, end, block, start)
    return (mixed_BKGd / total_BKG[..., None]).reshape(batch, heads, dim).astype(q_BHd.dtype)
