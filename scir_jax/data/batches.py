"""What sampler, reward model and pointwise judge take: a batch is described once; arrays, shapes and costs follow.

A description makes the arrays of real rows (`arrays`), and the shapes of those arrays (`abstract`). What
scorer and judge take is described in scir_jax.data.reading, a training step's batch in scir_jax.data.steps.

Axes: B rows, T tokens, P pairs, 2 the answers of a pair (or the orders in which a judge is shown them). Rows are
right-padded, with explicit lengths: nothing is ever derived from a token being the pad token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scir_jax.data.encode import Row, round_up

ROW_SHARES = (0.1, 0.15, 0.22, 0.32, 0.5, 1)
"""Lengths of rows that are scored or judged, as shares of the longest that the limits allow: few rows are near it."""
SHORTEST = 128
"""Tokens below which rows of another length would save less than they cost to compile."""

Share = Callable[[int], np.ndarray]
"""Size of a batch -> the numbers of its rows that this host holds."""


class Rows(NamedTuple):
    """Rows of token ids in which a verdict is read, int32.

    Attributes:
      ids: [..., T].
      verdict: [...] place whose hidden state predicts the verdict.
    """

    ids: np.ndarray
    verdict: np.ndarray


class Admission(NamedTuple):
    """Prompts that come into slots together, all int32.

    Attributes:
      ids: [B, T].
      length: [B].
      index: [B] the prompt's number; -1 for padding.
      source: [M] number of the slot's new prompt among those of its device; -1: it keeps what it has.
      sample: [M] the new answer's number among those of its prompt.
    """

    ids: np.ndarray
    length: np.ndarray
    index: np.ndarray
    source: np.ndarray
    sample: np.ndarray


class RowGroup(NamedTuple):
    """Rows of one length that go through the model together.

    Attributes:
      leading: shape of the rows' axes, [B] or [P, 2].
      tokens: T.
      scored: the most places of a row at which the vocabulary's logits are taken.
      verdict: verdicts that are read in every row.
      heads: how often the logits are taken at each of these places.
      verdicts: among how many tokens a verdict chooses.
    """

    leading: tuple[int, ...]
    tokens: int
    scored: int = 0
    verdict: int = 0
    heads: int = 1
    verdicts: int = 2

    @property
    def rows(self) -> int:
        return math.prod(self.leading)

    def arrays(self, rows: Sequence[Row], pad_id: int) -> Rows:
        """Returns rows as arrays, right-padded.

        Raises:
          ValueError: a row has more than `tokens` tokens.
        """
        shape = (-1, *self.leading[1:])
        return Rows(
            ids=np.stack([pad(row.ids, self.tokens, pad_id) for row in rows]).reshape(*shape, self.tokens),
            verdict=np.array([len(row.ids) - 1 if row.judged else 0 for row in rows], np.int32).reshape(shape),
        )

    def abstract(self) -> Rows:
        """Returns the shapes of `arrays` of a whole batch."""
        return abstract_of(self.arrays([Row(())] * math.prod(self.leading[1:]), 0), self.leading[0])


@dataclasses.dataclass(frozen=True)
class SlotSpec:
    """Describes a sampler's slots, and the prompts that come in together.

    Attributes:
      slots: M.
      prompts: B.
      tokens: compiled lengths of prompts, from short to long.
      answer_tokens: R.
      places: S, places of a row in the cache.
      devices: that share slots and prompts.
    """

    slots: int
    prompts: int
    tokens: tuple[int, ...]
    answer_tokens: int
    places: int
    devices: int = 1

    def arrays(
        self,
        tokens: int,
        prompts: Sequence[tuple[int, Sequence[int]] | None],
        answers: Mapping[int, tuple[int, int]],
        pad_id: int,
        share: Share = np.arange,
    ) -> Admission:
        """Returns this host's part of an admission.

        Args:
          tokens: one of the compiled lengths.
          prompts: numbered ids, B of them, those of the first device first; None is padding.
          answers: slot -> number of its prompt among those of its device, and number of the answer.
        """
        source, sample = np.full((2, self.slots), -1, np.int32)
        for slot, (prompt, number) in answers.items():
            source[slot], sample[slot] = prompt, number
        filled = [(-1, (pad_id,)) if prompts[i] is None else prompts[i] for i in share(self.prompts)]
        mine = share(self.slots)
        return Admission(
            np.stack([pad(ids, tokens, pad_id) for _, ids in filled]),
            np.array([len(ids) for _, ids in filled], np.int32),
            np.array([number for number, _ in filled], np.int32),
            source[mine],
            sample[mine],
        )

    def abstract(self, tokens: int) -> Admission:
        """Returns the shapes of a whole admission."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.arrays(tokens, [None] * self.prompts, {}, 0)
        )


def row_lengths(longest: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the compiled lengths of rows, from short to long.

    Args:
      longest: tokens of the longest row of each kind of rows that go through the model together.

    Returns:
      For each length those of every kind; the last is `longest`.
    """
    found = [
        tuple(min(tokens, max(round_up(math.ceil(share * tokens)), SHORTEST)) for tokens in longest)
        for share in ROW_SHARES
    ]
    return list(dict.fromkeys(found))


def by_length(rows: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Returns for each of `row_lengths` the numbers of the rows that fit into it and into none before, in order.

    A row's length depends on the row alone, so that what is computed of it does not depend on its company.

    Args:
      rows: for each row its tokens of every kind.

    Raises:
      ValueError: a row fits into none.
    """
    tokens = np.array(rows, int).reshape(len(rows), len(lengths[0]))
    fits = np.stack([(tokens <= np.array(length)).all(axis=1) for length in lengths])
    if not fits.any(axis=0).all():
        raise ValueError(f"a row of {tokens[~fits.any(axis=0)][0].tolist()} tokens does not fit into {lengths[-1]}")
    first = fits.argmax(axis=0)
    return [np.flatnonzero(first == number) for number in range(len(lengths))]


def pad(ids: Sequence[int], tokens: int, pad_id: int) -> np.ndarray:
    """Pads ids at the right end to [tokens] int32.

    Raises:
      ValueError: there are more ids than `tokens`.
    """
    if len(ids) > tokens:
        raise ValueError(f"a row of {len(ids)} tokens does not fit into {tokens}")
    return np.array([*ids, *[pad_id] * (tokens - len(ids))], np.int32)


def abstract_of(example: Any, size: int) -> Any:
    """Returns the shapes of a batch of `size` like the example, whose leading axis is 1."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), example)
