"""Rows in bins: the arrays of a cell, filled with what scir_jax.data.packing puts into it.

Axes: C cells (one for each device and micro-batch), T tokens of a bin, A scored places, K answers and V verdicts of a
cell. A place of a cell counts its bins' tokens, group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from scir_jax.data.encode import Row
from scir_jax.data.packing import Packing, RowSize, Shape
from scir_jax.model.segments import BRANCH
from scir_jax.text.tokens import Ids


class BinRows(NamedTuple):
    """Rows in bins.

    Attributes:
      ids: of each group of bins [C bins, T] int32.
      segments: the same shapes, int32, as in scir_jax.model.segments; 0: nothing is there.
      places: [C, A] int32, places of the hidden states that predict the scored tokens.
      targets: [C, A] int32, the scored tokens.
      learned: supervised part -> [C, A] bool, which of them it learns.
      first: [C, K] int32, number of each answer's first token among the scored places.
      length: [C, K] int32, tokens of each answer; 0: none.
      verdict: [C, V] int32, places whose hidden states predict verdicts.
    """

    ids: tuple[np.ndarray, ...]
    segments: tuple[np.ndarray, ...]
    places: np.ndarray
    targets: np.ndarray
    learned: dict[str, np.ndarray]
    first: np.ndarray
    length: np.ndarray
    verdict: np.ndarray


class Laid(NamedTuple):
    """Rows that lie together: one, or several of which the tokens that they begin with are laid once.

    Attributes:
      kind: of a scir_jax.data.packing.RowSize.
      rows: ids of each row.
      scored: numbers of the tokens of each row that are scored or learned.
      answers: the scored tokens are an answer's.
      judged: of each row, whether a verdict is read off its last token; (): of none.
      part: the supervised part that learns the scored tokens.
      shared: how many tokens the rows begin with in common.
    """

    kind: int
    rows: tuple[Ids, ...]
    scored: tuple[Sequence[int], ...]
    answers: bool = False
    judged: tuple[bool, ...] = ()
    part: str = ""
    shared: int = 0

    @classmethod
    def of(cls, kind: int, rows: Sequence[Row]) -> Laid:
        """Lays a pair's rows, of kind 0 those whose answers are scored."""
        scored = tuple(range(row.start, row.start + row.length) if kind == 0 else range(0) for row in rows)
        ids = tuple(row.ids for row in rows)
        shared = 0
        if len(rows) > 1:
            # Not what answers happen to begin with in common: where rows lie would depend on more than their lengths.
            alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*(row.ids[: row.start] for row in rows)))
            shared = sum(1 for _ in alike)
        return cls(kind, ids, scored, kind == 0, tuple(row.judged for row in rows), shared=shared)

    @property
    def size(self) -> RowSize:
        number = len(self.rows)
        tokens = sum(map(len, self.rows)) - (number - 1) * self.shared
        return RowSize(self.kind, tokens, sum(map(len, self.scored)), number * self.answers, sum(self.judged), number)

    @property
    def policy(self) -> int:
        """Counts the tokens of prompts and their answers, which may be less than all: a judge's question may follow."""
        if not self.answers:
            return 0
        return sum(max(scored) + 1 for scored in self.scored if scored) - (len(self.rows) - 1) * self.shared


def fill(packing: Packing, shape: Shape, laid: Sequence[Laid], parts: Sequence[str], pad_id: int) -> BinRows:
    """Fills the arrays of one cell, C = 1.

    Args:
      laid: rows in the order in which their readings are counted.
      parts: names of the supervised parts.

    Raises:
      ValueError: a row does not fit.
    """
    ids = [np.full(group, pad_id, np.int32) for group in shape.groups]
    segments = [np.zeros(group, np.int32) for group in shape.groups]
    begins = np.cumsum([0, *(bins * tokens for bins, tokens in shape.groups)])
    at_A, tokens_A = np.zeros((2, shape.scored), np.int32)
    learned = {name: np.zeros(shape.scored, bool) for name in parts}
    first_K, length_K = np.zeros((2, shape.answers), np.int32)
    verdict_V = np.zeros(shape.verdicts, np.int32)
    done = answers = verdicts = 0
    places = packing.places(shape, [one.size for one in laid])
    for segment, (one, place) in enumerate(zip(laid, places, strict=True), start=1):
        group, bin, at = place
        in_cell = int(begins[group]) + bin * shape.groups[group][1]
        trunk, at = np.arange(at, at + one.shared), at + one.shared
        ids[group][bin, trunk], segments[group][bin, trunk] = one.rows[0][: one.shared], segment
        for branch, (row, scored) in enumerate(zip(one.rows, one.scored, strict=True), start=1):
            own, at = np.arange(at, at + len(row) - one.shared), at + len(row) - one.shared
            ids[group][bin, own] = row[one.shared :]
            segments[group][bin, own] = segment + (branch * BRANCH if one.shared else 0)
            where, scored = in_cell + np.concatenate([trunk, own]), np.asarray(scored, int)
            behind = done + len(scored)
            # A token is predicted by the hidden state before it.
            at_A[done:behind], tokens_A[done:behind] = where[scored - 1], np.asarray(row)[scored]
            if one.part:
                learned[one.part][done:behind] = True
            if one.answers:
                first_K[answers], length_K[answers] = done, len(scored)
                answers += 1
            if one.judged and one.judged[branch - 1]:
                verdict_V[verdicts] = where[-1]
                verdicts += 1
            done = behind
    marks = {name: marked[None] for name, marked in learned.items()}
    return BinRows(
        tuple(ids), tuple(segments), at_A[None], tokens_A[None], marks, first_K[None], length_K[None], verdict_V[None]
    )
