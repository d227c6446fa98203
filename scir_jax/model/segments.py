"""Which tokens of a bin belong together: several rows behind one another, and rows that share their beginning.

A segment is a run of places with one number. Rows with a beginning in common are one segment: a trunk, and branches
behind it, each of which sees the trunk and itself, as if it were the trunk's only continuation.

Shapes: B bins, T places.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
BRANCH = 1 << 24
"""added to a segment's number for its first branch, twice for its second; numbers are smaller"""


class Spans(NamedTuple):
    """Of every place; [B, T] int32.

    Attributes:
      first, last: the first and the last place of its segment.
      begin, end: the same of its branch, or of the trunk.
      trunk: the place behind the trunk, for the places of branches.
    """

    first: Array
    last: Array
    begin: Array
    end: Array
    trunk: Array

    @property
    def hole(self) -> Array:
        """How many places between the trunk and its branch a token does not see, [B, T] int32."""
        return jnp.maximum(self.begin - self.trunk, 0)

    @property
    def positions(self) -> Array:
        """Positions of tokens in their rows, [B, T] int32."""
        return jnp.arange(self.first.shape[1], dtype=jnp.int32) - self.first - self.hole


def spans(segments_BT: Array) -> Spans:
    """Finds where segments, trunks and branches begin and end.

    Args:
      segments_BT: int32, a segment's number plus its branch's times BRANCH. The places of a segment lie behind one
        another: the trunk, then its branches, one after the other.
    """
    first_BT, last_BT = _ends(segments_BT % BRANCH)
    begin_BT, end_BT = _ends(segments_BT)
    places_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    trunk_BT = jax.lax.cummax(jnp.where(segments_BT < BRANCH, places_T + 1, 0), axis=1)
    return Spans(first_BT, last_BT, begin_BT, end_BT, trunk_BT)


def visible(of: Spans, queries: Array, keys: Array, window: int | None) -> Array:
    """Checks which keys queries see.

    Args:
      of: of the queries, in a shape that broadcasts with `queries`.
      queries, keys: places, int32, which broadcast.
      window: a query sees its own position and the window - 1 before it; None: all before it.
    """
    seen = (keys <= queries) & (keys >= of.first) & ((keys < of.trunk) | (keys >= of.begin))
    if window is not None:
        seen &= queries - keys - jnp.where(keys < of.trunk, of.hole, 0) < window
    return seen


def reach(of: Spans, window: int | None) -> tuple[Array, Array]:
    """Bounds what queries see, and what sees keys.

    Returns:
      [B, T] int32 each: no query at a place sees a key before the first; no query behind the second sees a key at a
      place.
    """
    if window is None:
        return of.first, jnp.where(of.begin == of.first, of.last, of.end)
    places_T = jnp.arange(of.first.shape[1], dtype=jnp.int32)
    lowest_BT = jnp.maximum(of.first, places_T - of.hole - window + 1)
    behind_BT = places_T + window - 1
    # Branches may see the end of their trunk from afar.
    branched_BT = (of.begin == of.first) & (of.end < of.last)
    return lowest_BT, jnp.where(branched_BT, of.last, jnp.minimum(of.end, behind_BT))


def _ends(numbers_BT: Array) -> tuple[Array, Array]:
    """Returns the first and the last place of the run of equal numbers that each place is in, [B, T] int32."""
    places_T = jnp.arange(numbers_BT.shape[1], dtype=jnp.int32)
    changes = numbers_BT[:, 1:] != numbers_BT[:, :-1]
    first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(first, places_T, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(last, places_T, numbers_BT.shape[1]), axis=1, reverse=True)
    return first_BT, last_BT
