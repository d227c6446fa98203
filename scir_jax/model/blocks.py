"""Causal attention over blocks of queries and keys in plain JAX, for every backend, dtype, cap and head dimension.

The softmax is a running one (Rabe & Staats, arXiv 2112.05682; FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2):
the [T, T] scores never exist, neither forward nor backward, and blocks in which no query sees a key are not computed.

Shapes: B rows, T tokens, H heads, K key/value heads, G = H / K, d head dimension, N blocks of S places, R = G S.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.model.segments import Spans, reach, spans, visible

Array = jax.Array
BLOCKS = (256, 192, 128)
# A CPU's caches are small, and short segments leave more small blocks empty than large ones.
CPU_BLOCK, CPU_SEGMENTED_BLOCK = 128, 64
_LOWEST = float(np.finfo(np.float32).min)


class Settings(NamedTuple):
    """What a query sees and how scores are made; hashable.

    Attributes:
      block: S, places of a block; it divides the row.
      window: a query sees its own place and the window - 1 before it; None: all before it.
      scale, cap: of the scores, as in scir_jax.model.attention.
      skip: blocks between a trunk and its branch are not computed; a branch of the program for each block is cheap on a
        CPU only.
    """

    block: int
    window: int | None
    scale: float
    cap: float | None
    skip: bool = False


def block_size(tokens: int, backend: str, segmented: bool) -> int:
    """Returns the places of a block: the row itself where it is short, else the size that pads it least."""
    if backend == "cpu":
        return min(tokens, CPU_SEGMENTED_BLOCK if segmented else CPU_BLOCK)
    if tokens <= BLOCKS[0]:
        return tokens
    return min(BLOCKS, key=lambda size: (-(-tokens // size) * size, -size))


def blockwise(
    q_BTHd: Array,
    k_BTKd: Array,
    v_BTKd: Array,
    segments_BT: Array | None,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    backend: str,
) -> Array:
    """Computes causal attention on one device, as scir_jax.model.attention describes it.

    Args:
      segments_BT: int32, as in scir_jax.model.segments.

    Returns:
      [B, T, H, d] in the queries' dtype.
    """
    block = block_size(q_BTHd.shape[1], backend, segments_BT is not None)
    settings = Settings(block, window, scale, cap, segments_BT is not None and backend == "cpu")
    batch, tokens, heads, dim = q_BTHd.shape
    kv_heads = k_BTKd.shape[2]
    spare = -tokens % block
    number = (tokens + spare) // block

    def blocked(x_BTHd: Array) -> Array:
        """Returns [B, N, K, G S, d]: the queries of a group are rows of one product with their shared keys."""
        # The padding is at the right end, where no query of the row looks.
        x = jnp.pad(x_BTHd, ((0, 0), (0, spare), (0, 0), (0, 0))).reshape(batch, number, block, kv_heads, -1, dim)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, number, kv_heads, -1, dim)

    sight = None
    if segments_BT is not None:
        of = spans(jnp.pad(segments_BT, ((0, 0), (0, spare)), mode="edge"))
        sight = Sight(of, *reach(of, window))
    blocks = (blocked(q_BTHd), blocked(k_BTKd), blocked(v_BTKd))
    if segments_BT is not None and backend == "cpu" and batch > 1:
        # One row after another: each skips the blocks that its own segments leave empty.
        mixed = jax.lax.map(lambda row: _attend(settings, *jax.tree.map(lambda x: x[None], row))[0], (*blocks, sight))
    else:
        mixed = _attend(settings, *blocks, sight)
    mixed = mixed.reshape(batch, number, kv_heads, heads // kv_heads, block, dim).transpose(0, 1, 4, 2, 3, 5)
    return mixed.reshape(batch, number * block, heads, dim)[:, :tokens]


class Sight(NamedTuple):
    """What the queries of each place see in their segments, and how far at the most; [B, T] int32."""

    of: Spans
    lowest: Array
    highest: Array


def _seen(settings: Settings, i: Array, sight: Sight | None) -> Array:
    """Returns the first block of keys that the queries of block i see; the last is i."""
    if sight is not None:
        return _part(settings, sight.lowest, i).min() // settings.block
    if settings.window is None:
        return jnp.zeros((), jnp.int32)
    return jnp.maximum(0, (i * settings.block - settings.window + 1) // settings.block)


def _seeing(settings: Settings, j: Array, number: int, sight: Sight | None) -> Array:
    """Returns the block behind the last one whose queries see the keys of block j; the first is j."""
    if sight is not None:
        return _part(settings, sight.highest, j).max() // settings.block + 1
    end = jnp.full((), number, jnp.int32)
    if settings.window is None:
        return end
    return jnp.minimum(end, ((j + 1) * settings.block + settings.window - 2) // settings.block + 1)


def _where_seen(settings: Settings, i: Array, j: Array, sight: Sight | None, compute, state):
    """Returns compute(state), or the state where no query of block i sees a key of block j."""
    if not settings.skip:
        return compute(state)
    of = jax.tree.map(lambda x: _part(settings, x, i), sight.of)
    first, last = j * settings.block, (j + 1) * settings.block - 1
    before = (first < of.trunk) & (last >= of.first)
    return jax.lax.cond((before | (last >= of.begin)).any(), compute, lambda state: state, state)


def _part(settings: Settings, values_BT: Array, block: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(values_BT, block * settings.block, settings.block, axis=1)


def _scores(
    settings: Settings, i: Array, j: Array, q_BKRd: Array, k_BKSd: Array, sight: Sight | None
) -> tuple[Array, Array]:
    """Computes one block of scores [B, K, G, S, S], and which of its pairs are visible (broadcasts to it)."""
    block = settings.block
    scores = jnp.einsum("bkrd,bksd->bkrs", q_BKRd, k_BKSd, preferred_element_type=jnp.float32) * settings.scale
    scores = scores.reshape(*scores.shape[:2], -1, block, block)
    if settings.cap is not None:
        scores = settings.cap * jnp.tanh(scores / settings.cap)
    places_S = jnp.arange(block)
    queries, keys = i * block + places_S[:, None], j * block + places_S
    if sight is not None:
        of = jax.tree.map(lambda x: _part(settings, x, i)[:, None, None, :, None], sight.of)
        return scores, visible(of, queries, keys, settings.window)
    seen = keys <= queries
    if settings.window is not None:
        seen &= keys > queries - settings.window
    return scores, seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, q_BNKRd, k_BNKSd, v_BNKSd, sight) -> Array:
    return _forward(settings, q_BNKRd, k_BNKSd, v_BNKSd, sight)[0]


def _forward(settings, q_BNKRd, k_BNKSd, v_BNKSd, sight):
    batch, number, kv_heads, rows, dim = q_BNKRd.shape
    block = settings.block
    shape = (batch, kv_heads, rows // block, block)

    def queries(carry, i):
        q_BKRd = jax.lax.dynamic_index_in_dim(q_BNKRd, i, 1, keepdims=False)

        def keys(j, state):
            return _where_seen(settings, i, j, sight, functools.partial(of_block, j), state)

        def of_block(j, state):
            maximum, total, mixed_BKRd = state
            k_BKSd = jax.lax.dynamic_index_in_dim(k_BNKSd, j, 1, keepdims=False)
            v_BKSd = jax.lax.dynamic_index_in_dim(v_BNKSd, j, 1, keepdims=False)
            scores, seen = _scores(settings, i, j, q_BKRd, k_BKSd, sight)
            new = jnp.maximum(maximum, jnp.where(seen, scores, _LOWEST).max(axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - new[..., None]), 0)
            shrink = jnp.exp(maximum - new)
            total = total * shrink + weights.sum(axis=-1)
            weights = weights.reshape(batch, kv_heads, rows, block).astype(v_BKSd.dtype)
            added = jnp.einsum("bkrs,bksd->bkrd", weights, v_BKSd, preferred_element_type=jnp.float32)
            return new, total, mixed_BKRd * shrink.reshape(batch, kv_heads, rows, 1) + added

        start = (
            jnp.full(shape, _LOWEST, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((batch, kv_heads, rows, dim), jnp.float32),
        )
        maximum, total, mixed = jax.lax.fori_loop(_seen(settings, i, sight), i + 1, keys, start)
        mixed = mixed / total.reshape(batch, kv_heads, rows, 1)
        return carry, (mixed.astype(q_BNKRd.dtype), maximum + jnp.log(total))

    _, (mixed_NBKRd, normalizer_NBKGS) = jax.lax.scan(queries, None, jnp.arange(number, dtype=jnp.int32))
    mixed_BNKRd = jnp.moveaxis(mixed_NBKRd, 0, 1)
    return mixed_BNKRd, (q_BNKRd, k_BNKSd, v_BNKSd, sight, mixed_BNKRd, normalizer_NBKGS)


def _backward(settings, saved, cotangent_BNKRd):
    q_BNKRd, k_BNKSd, v_BNKSd, sight, mixed_BNKRd, normalizer_NBKGS = saved
    batch, number, kv_heads, rows, dim = q_BNKRd.shape
    dtype = q_BNKRd.dtype
    # The softmax's own term: sum over keys of a weight times its gradient.
    inner_BNKR = jnp.einsum("bnkrd,bnkrd->bnkr", cotangent_BNKRd, mixed_BNKRd, preferred_element_type=jnp.float32)

    def keys(dq_NBKRd, j):
        k_BKSd = jax.lax.dynamic_index_in_dim(k_BNKSd, j, 1, keepdims=False)
        v_BKSd = jax.lax.dynamic_index_in_dim(v_BNKSd, j, 1, keepdims=False)

        def queries(i, state):
            return _where_seen(settings, i, j, sight, functools.partial(of_block, i), state)

        def of_block(i, state):
            dq_NBKRd, dk_BKSd, dv_BKSd = state
            q_BKRd = jax.lax.dynamic_index_in_dim(q_BNKRd, i, 1, keepdims=False)
            cotangent_BKRd = jax.lax.dynamic_index_in_dim(cotangent_BNKRd, i, 1, keepdims=False)
            inner_BKR = jax.lax.dynamic_index_in_dim(inner_BNKR, i, 1, keepdims=False)
            scores, seen = _scores(settings, i, j, q_BKRd, k_BKSd, sight)
            weights = jnp.where(seen, jnp.exp(scores - normalizer_NBKGS[i][..., None]), 0)
            dweights = jnp.einsum("bkrd,bksd->bkrs", cotangent_BKRd, v_BKSd, preferred_element_type=jnp.float32)
            dscores = weights * (dweights - inner_BKR[..., None]).reshape(weights.shape)
            if settings.cap is not None:
                dscores *= 1 - jnp.square(scores / settings.cap)
            flat = (batch, kv_heads, rows, settings.block)
            weights, dscores = (
                weights.reshape(flat).astype(dtype),
                (dscores * settings.scale).reshape(flat).astype(dtype),
            )
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            dv_BKSd += product("bkrs,bkrd->bksd", weights, cotangent_BKRd)
            dk_BKSd += product("bkrs,bkrd->bksd", dscores, q_BKRd)
            return dq_NBKRd.at[i].add(product("bkrs,bksd->bkrd", dscores, k_BKSd)), dk_BKSd, dv_BKSd

        zeros = jnp.zeros(k_BKSd.shape, jnp.float32)
        end = _seeing(settings, j, number, sight)
        dq_NBKRd, dk_BKSd, dv_BKSd = jax.lax.fori_loop(j, end, queries, (dq_NBKRd, zeros, zeros))
        return dq_NBKRd, (dk_BKSd.astype(dtype), dv_BKSd.astype(dtype))

    dq_NBKRd = jnp.zeros((number, batch, kv_heads, rows, dim), jnp.float32)
    dq_NBKRd, (dk_NBKSd, dv_NBKSd) = jax.lax.scan(keys, dq_NBKRd, jnp.arange(number, dtype=jnp.int32))
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), sight)
    dq, dk, dv = (jnp.moveaxis(x, 0, 1) for x in (dq_NBKRd.astype(dtype), dk_NBKSd, dv_NBKSd))
    return dq, dk, dv, none


_attend.defvjp(_forward, _backward)
