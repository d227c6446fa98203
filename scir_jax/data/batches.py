"""What the compiled programs take: each batch is described once, and its arrays, shapes and costs follow from that.

A description says which rows go through the model (`groups`), makes the arrays of real rows (`arrays`), and the shapes
of those arrays (`abstract`). How many groups of rows a batch has and how long they are is known here and nowhere else.

Axes: B rows, T tokens, P pairs, 2 the answers of a pair (or the orders in which a judge is shown them), C columns of a
reward model, S single verdicts. Rows are right-padded, with explicit lengths: nothing is ever derived from a token
being the pad token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scir_jax.data.encode import Encoder, Lengths, Marked, Row, round_up
from scir_jax.data.pairs import Pair
from scir_jax.errors import InputError

ROW_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""Lengths of rows that are scored or judged, as shares of the longest that the limits allow."""
SHORTEST = 128
"""Tokens below which rows of another length would save less than they cost to compile."""

Share = Callable[[int], np.ndarray]
"""Size of a batch -> the numbers of its rows that this host holds."""


class Rows(NamedTuple):
    """Rows of token ids in which a span is scored, a verdict is read, or both. All int32.

    Attributes:
      ids: [..., T].
      start: [...] place of the first scored token.
      length: [...] number of scored tokens; 0: none.
      verdict: [...] place whose hidden state predicts the verdict; 0 where none is asked.
    """

    ids: np.ndarray
    start: np.ndarray
    length: np.ndarray
    verdict: np.ndarray


class Targets(NamedTuple):
    """Supervised rows: `ids` [B, T] int32, `mask` [B, T] float32, 1 for the tokens to be learned."""

    ids: np.ndarray
    mask: np.ndarray


class Prompts(NamedTuple):
    """Prompts to sample from, all int32.

    Attributes:
      ids: [B, T].
      length: [B].
      index: [B] the prompt's number; -1 for padding.
    """

    ids: np.ndarray
    length: np.ndarray
    index: np.ndarray


class PairBatch(NamedTuple):
    """Pairs as a training step takes them; float32 unless said otherwise.

    Attributes:
      answers: [P, 2] rows that hold the answers; with a verdict where the judge continues them.
      judges: [P, 2] rows for each further template, with the first or the second answer shown as A.
      cached: ROLE_READING -> [P, 2], see data.pairs.Pair.
      frozen: reward model -> [P, C] logits at the start of the iteration.
      verdicts: [P, S] the judge's single verdicts at the start.
      length_penalty: [P, 2] alpha |y|.
      label: [P] probability that the first answer is better (1/2 where it is unknown).
      weight: [P]; 0 for padding.
      index: [P] int32, the pair's place in the iteration's file; -1 for padding.
    """

    answers: Rows
    judges: tuple[Rows, ...]
    cached: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]
    verdicts: np.ndarray
    length_penalty: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    index: np.ndarray


class TrainBatch(NamedTuple):
    """A training step's pairs (None in SFT) and supervised rows by name ("ift", "eft")."""

    pairs: PairBatch | None
    targets: dict[str, Targets]


class RowGroup(NamedTuple):
    """Rows of one length that go through the model together.

    Attributes:
      leading: shape of the rows' axes, [B] or [P, 2].
      tokens: T.
      scored: the most places of a row at which the vocabulary's logits are taken.
      verdict: whether a verdict is read in every row.
      heads: how often the logits are taken at each of these places.
    """

    leading: tuple[int, ...]
    tokens: int
    scored: int = 0
    verdict: bool = False
    heads: int = 1

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
            start=np.array([row.start for row in rows], np.int32).reshape(shape),
            length=np.array([row.length for row in rows], np.int32).reshape(shape),
            verdict=np.array([len(row.ids) - 1 if row.judged else 0 for row in rows], np.int32).reshape(shape),
        )

    def targets(self, rows: Sequence[Marked], pad_id: int) -> Targets:
        """Returns supervised rows as arrays, right-padded.

        Raises:
          ValueError: a row has more than `tokens` tokens.
        """
        mask = np.zeros((len(rows), self.tokens), np.float32)
        for values, row in zip(mask, rows):
            values[: len(row.marks)] = row.marks
        return Targets(np.stack([pad(row.ids, self.tokens, pad_id) for row in rows]), mask)

    def abstract(self) -> Rows:
        """Returns the shapes of `arrays` of a whole batch."""
        return _abstract(self.arrays([Row(())] * math.prod(self.leading[1:]), 0), self.leading[0])

    def abstract_targets(self) -> Targets:
        """Returns the shapes of `targets` of a whole batch."""
        return _abstract(self.targets([Marked((), ())], 0), self.leading[0])


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """Describes the pairs of a training step.

    Attributes:
      pairs: P.
      answers: rows of the answers; with a verdict where they are the first template's rows too.
      judges: rows of the other templates that are asked.
      cached: names of the cached values.
      frozen: name and number of columns of each frozen reward model.
      verdicts: S, single verdicts of the judge.
    """

    pairs: int
    answers: RowGroup
    judges: tuple[RowGroup, ...] = ()
    cached: tuple[str, ...] = ()
    frozen: tuple[tuple[str, int], ...] = ()
    verdicts: int = 0

    @classmethod
    def of(
        cls, pairs: int, lengths: Lengths, *, judged: bool, continued: bool, heads: int = 1, **values: Any
    ) -> PairSpec:
        """Describes pairs with rows of these lengths.

        Args:
          judged: the step asks the judge; otherwise there are no rows for it.
          continued: the first template continues the conversation (Encoder.continued).
          heads: how often the logits are taken in the answers' rows.
          values: the other attributes.
        """
        leading = (pairs, 2)
        if judged and continued:
            answers, judges = RowGroup(leading, lengths.judges[0], lengths.answer, True, heads), lengths.judges[1:]
        else:
            answers = RowGroup(leading, lengths.scored, lengths.answer, heads=heads)
            judges = lengths.judges if judged else ()
        return cls(pairs, answers, tuple(RowGroup(leading, tokens, verdict=True) for tokens in judges), **values)

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        return (self.answers, *self.judges)

    def rows(self, pair: Pair, encoder: Encoder) -> tuple[Sequence[Row], list[Sequence[Row]]]:
        """Returns a pair's rows for `answers` and for each of `judges`."""
        judges = encoder.judges[len(encoder.judges) - len(self.judges) :] if self.judges else ()
        answers = encoder.judge_rows(encoder.judges[0], pair) if self.answers.verdict else encoder.answer_rows(pair)
        return answers, [encoder.judge_rows(judge, pair) for judge in judges]

    def arrays(self, pairs: Sequence[tuple[int, Pair] | None], encoder: Encoder) -> PairBatch:
        """Returns numbered pairs as arrays; None is padding, a pair that counts for nothing.

        Raises:
          InputError: a pair lacks a cached value, a frozen logit or a verdict.
        """
        return _stack([self._padding(encoder.chat.pad_id) if p is None else self._one(*p, encoder) for p in pairs])

    def abstract(self) -> PairBatch:
        """Returns the shapes of `arrays` of a whole batch."""
        return _abstract(_stack([self._padding(0)]), self.pairs)

    def known(self, pair: Pair) -> dict[str, Any]:
        """Returns the parts of a PairBatch that a pair brings with it.

        Raises:
          InputError: the pair lacks a cached value, a frozen logit or a verdict.
        """
        where = pair.prompt.where
        if len(pair.verdicts) < self.verdicts:
            raise InputError(f"{where}: verdicts: holds {len(pair.verdicts)} numbers, {self.verdicts} are needed")
        return {
            "cached": {name: _values(pair.cached, name, 2, f"{where}: cached") for name in self.cached},
            "frozen": {name: _values(pair.frozen, name, size, f"{where}: frozen_logits") for name, size in self.frozen},
            "verdicts": np.array(pair.verdicts[: self.verdicts], np.float32),
        }

    def _one(self, index: int, pair: Pair, encoder: Encoder) -> PairBatch:
        answers, judges = self.rows(pair, encoder)
        return PairBatch(
            **self.known(pair),
            answers=_single(self.answers, answers, encoder.chat.pad_id),
            judges=tuple(
                _single(group, rows, encoder.chat.pad_id) for group, rows in zip(self.judges, judges, strict=True)
            ),
            length_penalty=np.float32(pair.length_penalty) * np.array(pair.lengths, np.float32),
            label=np.float32(0.5 if pair.label is None else pair.label),
            weight=np.float32(pair.weight),
            index=np.int32(index),
        )

    def _padding(self, pad_id: int) -> PairBatch:
        empty = [Row(())] * 2
        return PairBatch(
            answers=_single(self.answers, empty, pad_id),
            judges=tuple(_single(group, empty, pad_id) for group in self.judges),
            cached={name: np.zeros(2, np.float32) for name in self.cached},
            frozen={name: np.zeros(size, np.float32) for name, size in self.frozen},
            verdicts=np.zeros(self.verdicts, np.float32),
            length_penalty=np.zeros(2, np.float32),
            label=np.float32(0.5),
            weight=np.float32(0),
            index=np.int32(-1),
        )


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """Describes a training step's batch.

    Attributes:
      pairs: None in SFT.
      targets: name and rows of the supervised parts.
    """

    pairs: PairSpec | None
    targets: tuple[tuple[str, RowGroup], ...] = ()

    @classmethod
    def of(cls, pairs: PairSpec | None, targets: Mapping[str, int], lengths: Lengths) -> TrainSpec:
        """Describes pairs beside supervised rows.

        Args:
          targets: number of supervised rows by name; names without rows are left out.
        """
        groups = ((name, RowGroup((size,), lengths.targets[name])) for name, size in targets.items() if size)
        return cls(pairs, tuple((name, group._replace(scored=group.tokens)) for name, group in groups))

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        """All rows of a step, as the model takes them."""
        return (*(self.pairs.groups if self.pairs else ()), *(group for _, group in self.targets))

    @property
    def tokens(self) -> int:
        """Token places of a step over all devices, padding included."""
        return sum(group.rows * group.tokens for group in self.groups)

    def arrays(
        self,
        pairs: Sequence[tuple[int, Pair] | None],
        targets: Mapping[str, Sequence[Marked]],
        encoder: Encoder,
        share: Share = np.arange,
    ) -> TrainBatch:
        """Returns this host's part of a batch.

        Args:
          pairs: numbered pairs of the whole batch, None where it is not full.
          targets: supervised rows of the whole batch by name.
          share: which of them are this host's.
        """
        made = {
            name: group.targets([targets[name][i] for i in share(group.rows)], encoder.chat.pad_id)
            for name, group in self.targets
        }
        mine = [pairs[i] for i in share(self.pairs.pairs)] if self.pairs else []
        return TrainBatch(self.pairs.arrays(mine, encoder) if self.pairs else None, made)

    def abstract(self) -> TrainBatch:
        """Returns the shapes of `arrays` of a whole batch."""
        targets = {name: group.abstract_targets() for name, group in self.targets}
        return TrainBatch(self.pairs.abstract() if self.pairs else None, targets)


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """Describes a sampler's batch: `prompts` of at most `tokens`, with `answers` of at most `answer_tokens` to each."""

    prompts: int
    tokens: int
    answers: int
    answer_tokens: int

    @property
    def places(self) -> int:
        """Places of a row in the cache."""
        return self.tokens + self.answer_tokens

    def arrays(self, prompts: Sequence[tuple[int, Sequence[int]] | None], pad_id: int) -> Prompts:
        """Returns the ids of numbered prompts as arrays; None is padding, a row that stops at once."""
        filled = [(-1, (pad_id,)) if prompt is None else prompt for prompt in prompts]
        return Prompts(
            np.stack([pad(ids, self.tokens, pad_id) for _, ids in filled]),
            np.array([len(ids) for _, ids in filled], np.int32),
            np.array([number for number, _ in filled], np.int32),
        )

    def abstract(self) -> Prompts:
        """Returns the shapes of `arrays` of a whole batch."""
        return _abstract(self.arrays([None], 0), self.prompts)


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


def _single(group: RowGroup, rows: Sequence[Row], pad_id: int) -> Rows:
    """Returns the rows of one pair, [2, T]."""
    return jax.tree.map(lambda x: x[0], group.arrays(rows, pad_id))


def _values(values: Mapping[str, Sequence[float]], name: str, size: int, where: str) -> np.ndarray:
    found = values.get(name)
    if found is None or len(found) != size:
        raise InputError(f"{where}: {name} has {'no' if found is None else len(found)} values, {size} are needed")
    return np.array(found, np.float32)


def _stack(items: Sequence[PairBatch]) -> PairBatch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


def _abstract(example: Any, size: int) -> Any:
    """Returns the shapes of a batch of `size` like the example, whose leading axis is 1."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), example)
