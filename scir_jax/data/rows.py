"""Token rows and batches: NumPy arrays of fixed shapes, right-padded, with explicit lengths.

Axes: B rows, T tokens, P pairs, 2 the responses of a pair. Nothing is ever derived from a token being the pad token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scir_jax.text.chat import Ids


class Rows(NamedTuple):
    """Rows of token ids in which a span is scored, a verdict is read, or both. All int32.

    Attributes:
      ids: [..., T].
      start: [...] place of the first scored token.
      length: [...] scored tokens; 0: none.
      verdict: [...] place whose hidden state predicts the verdict; 0 where none is asked.
    """

    ids: np.ndarray
    start: np.ndarray
    length: np.ndarray
    verdict: np.ndarray


class Targets(NamedTuple):
    """Supervised rows: `ids` [..., T] int32, `mask` [..., T] float32, 1 for the tokens to be learned."""

    ids: np.ndarray
    mask: np.ndarray


class Row(NamedTuple):
    """One row before padding; see Rows."""

    ids: Ids
    start: int = 0
    length: int = 0
    judged: bool = False


class PairBatch(NamedTuple):
    """What a training or scoring step takes; the float32 fields are those of method.objective.Pairs.

    Attributes:
      responses: [P, 2] rows that hold the responses; with a verdict where the first template continues them.
      judges: [P, 2] rows of each further template, the first or the second response shown as A.
      index: [P] int32, the pair's place in the iteration's file; -1 for padding.
    """

    responses: Rows
    judges: tuple[Rows, ...]
    preference_logps: np.ndarray
    implicit_logps: np.ndarray
    start_logps: np.ndarray
    length_penalty: np.ndarray
    frozen_logits: np.ndarray
    external: np.ndarray
    weight: np.ndarray
    index: np.ndarray


class TrainBatch(NamedTuple):
    """A step of SCIR training: pairs and replayed examples. Absent parts are None."""

    pairs: PairBatch | None
    ift: Targets | None
    eft: Targets | None


def pad_rows(rows: Sequence[Row], tokens: int, pad_id: int) -> Rows:
    """Right-pads rows to `tokens`; ValueError if one is longer."""
    return Rows(
        ids=np.stack([pad(row.ids, tokens, pad_id) for row in rows]),
        start=np.array([row.start for row in rows], np.int32),
        length=np.array([row.length for row in rows], np.int32),
        verdict=np.array([len(row.ids) - 1 if row.judged else 0 for row in rows], np.int32),
    )


def pad(ids: Sequence[int], tokens: int, pad_id: int) -> np.ndarray:
    if len(ids) > tokens:
        raise ValueError(f"a row of {len(ids)} tokens does not fit into {tokens}")
    return np.array([*ids, *[pad_id] * (tokens - len(ids))], np.int32)


def stack(items: Sequence):
    """Stacks equal structures (named tuples, tuples, arrays, None) along a new leading axis."""
    first = items[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        parts = [stack([item[i] for item in items]) for i in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return np.stack(items)


def taken(items: Sequence, rows: np.ndarray) -> list:
    """The items at these rows of a batch; past their end, where a last batch is not full, the first one stands in."""
    return [items[row] if row < len(items) else items[0] for row in rows]


def round_up(tokens: int) -> int:
    """A row length that suits the hardware: a multiple of 8, of 128 where long."""
    unit = 8 if tokens <= 256 else 128
    return -(-tokens // unit) * unit
