"""Checksums of arrays, computed where the arrays lie: sums of their bits, whatever the mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def checksums(tree: Any, dtype: str | None = None) -> dict[str, int]:
    """Computes a checksum of every array of a tree, by its path.

    It is the sum of the array's 32-bit words, each times the odd number 2 i + 1 of its place i, modulo 2^32: one
    changed word always changes it, and so do most exchanges. Integers are summed, so that it does not depend on how an
    array is split over devices.

    Args:
      tree: of arrays, on this process's or on all processes' devices.
      dtype: of the arrays before they are summed; None: their own.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in paths], dtype))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return {name: int(value) for name, value in zip(names, sums, strict=True)}


def first_change(found: dict[str, int], expected: dict[str, int]) -> str | None:
    """Finds the first array whose checksum is another one, or that only one of both has."""
    names = (name for name in (*expected, *found) if found.get(name) != expected.get(name))
    return next(names, None)


@functools.partial(jax.jit, static_argnums=1)
def _sums(leaves: list[Array], dtype: str | None) -> list[Array]:
    return [_sum(leaf if dtype is None else leaf.astype(dtype)) for leaf in leaves]


def _sum(x: Array) -> Array:
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(words.shape):
        place = place * jnp.uint32(length % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
