"""What a training step takes: pairs and supervised rows, laid out in the bins of scir_jax.data.packing.

Axes: C cells (one for each device and micro-batch), T tokens of a bin, A scored places of a cell, P pairs, 2 the answers
of a pair (or the orders in which a judge is shown them), G templates that are asked, R columns of a reward model, S
single verdicts. A place of a cell counts its bins' tokens, group by group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scir_jax.data.batches import RowGroup, Share
from scir_jax.data.encode import Encoder, Lengths, Marked, Row
from scir_jax.data.packing import Item, Packing, Shape
from scir_jax.data.pairs import Pair
from scir_jax.errors import InputError


class BinRows(NamedTuple):
    """Rows in bins.

    Attributes:
      ids: of each group of bins [C bins, T] int32.
      segments: the same shapes, int32: numbers that tell the rows of a bin apart; 0: nothing is there.
      places: [C, A] int32, places of the hidden states that predict the scored tokens.
      targets: [C, A] int32, the scored tokens.
      learned: supervised part -> [C, A] bool, which of them it learns.
    """

    ids: tuple[np.ndarray, ...]
    segments: tuple[np.ndarray, ...]
    places: np.ndarray
    targets: np.ndarray
    learned: dict[str, np.ndarray]


class PairBatch(NamedTuple):
    """Pairs of a training step; float32 unless said otherwise.

    Attributes:
      first: [P, 2] int32, number of each answer's first token among the scored places of its cell.
      length: [P, 2] int32, tokens of each answer.
      verdict: [P, G, 2] int32, places whose hidden states predict the verdicts, with the first or the second answer
        shown as A.
      cached: ROLE_READING -> [P, 2], see data.pairs.Pair.
      frozen: reward model -> [P, R] logits at the start of the iteration.
      verdicts: [P, S] the judge's single verdicts at the start.
      length_penalty: [P, 2] alpha |y|.
      label: [P] probability that the first answer is better (1/2 where it is unknown).
      weight: [P]; 0 for padding.
      index: [P] int32, the pair's place in the iteration's file; -1 for padding.
      place: [P] int32, the pair's place in the batch before it was dealt out to cells.
    """

    first: np.ndarray
    length: np.ndarray
    verdict: np.ndarray
    cached: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]
    verdicts: np.ndarray
    length_penalty: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    index: np.ndarray
    place: np.ndarray


class TrainBatch(NamedTuple):
    """A training step's rows, and its pairs (None in SFT)."""

    rows: BinRows
    pairs: PairBatch | None


class Cell(NamedTuple):
    """What lies in one cell: numbers of pairs, and of supervised rows, in the step's batch."""

    pairs: list[int]
    rows: list[int]


Supervised = list[tuple[str, Marked]]
"""the supervised rows of a step: name of the part, and row"""


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """Describes the pairs of a training step.

    Attributes:
      pairs: P.
      answers: the longest rows of the answers; with a verdict where they are the first template's rows too.
      judges: the longest rows of the other templates that are asked.
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

    @property
    def asked(self) -> int:
        """G."""
        return len(self.judges) + self.answers.verdict

    def rows(self, pair: Pair, encoder: Encoder) -> list[Sequence[Row]]:
        """Returns a pair's two rows of each of `groups`."""
        judges = encoder.judges[len(encoder.judges) - len(self.judges) :] if self.judges else ()
        answers = encoder.judge_rows(encoder.judges[0], pair) if self.answers.verdict else encoder.answer_rows(pair)
        return [answers, *(encoder.judge_rows(judge, pair) for judge in judges)]

    def item(self, rows: Sequence[Sequence[Row]]) -> Item:
        """Returns the lengths of a pair's `rows`; padding has none."""
        return Item(
            tuple((kind, len(row.ids)) for kind, both in enumerate(rows) for row in both),
            sum(row.length for both in rows[:1] for row in both),
        )

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
            "length_penalty": np.float32(pair.length_penalty) * np.array(pair.lengths, np.float32),
            "label": np.float32(0.5 if pair.label is None else pair.label),
            "weight": np.float32(pair.weight),
        }

    def padding(self) -> PairBatch:
        """Returns a pair that counts for nothing."""
        return PairBatch(
            first=np.zeros(2, np.int32),
            length=np.zeros(2, np.int32),
            verdict=np.zeros((self.asked, 2), np.int32),
            cached={name: np.zeros(2, np.float32) for name in self.cached},
            frozen={name: np.zeros(size, np.float32) for name, size in self.frozen},
            verdicts=np.zeros(self.verdicts, np.float32),
            length_penalty=np.zeros(2, np.float32),
            label=np.float32(0.5),
            weight=np.float32(0),
            index=np.int32(-1),
            place=np.int32(0),
        )


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """Describes a training step's batch.

    Row j of n of cell m of the micro-batches of a device d stands at (d micro n + j micro + m), in every array: a batch
    is split over the devices as it lies, and each micro-batch takes every micro-th row.

    Attributes:
      pairs: None in SFT.
      targets: name and longest rows of the supervised parts.
      devices: that share a batch's rows.
      micro: micro-batches of each device.
    """

    pairs: PairSpec | None
    targets: tuple[tuple[str, RowGroup], ...] = ()
    devices: int = 1
    micro: int = 1

    @classmethod
    def of(
        cls, pairs: PairSpec | None, targets: Mapping[str, int], lengths: Lengths, devices: int = 1, micro: int = 1
    ) -> TrainSpec:
        """Describes pairs beside supervised rows.

        Args:
          targets: number of supervised rows by name; names without rows are left out.
        """
        groups = (
            (name, RowGroup((size,), lengths.targets[name], lengths.learned[name]))
            for name, size in targets.items()
            if size
        )
        return cls(pairs, tuple(groups), devices, micro)

    @property
    def cells(self) -> int:
        return self.devices * self.micro

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        """The longest rows of a step, in kinds."""
        return (*(self.pairs.groups if self.pairs else ()), *(group for _, group in self.targets))

    @property
    def bound(self) -> Shape:
        """The shape that holds the longest rows, each kind in bins of its own."""
        groups = tuple((group.rows // self.cells, group.tokens) for group in self.groups)
        return Shape(groups, max(sum(group.rows * group.scored for group in self.groups) // self.cells, 1))

    def item(self, name: str, row: Marked) -> Item:
        """Returns the lengths of a supervised row."""
        kind = len(self.pairs.groups if self.pairs else ()) + [name for name, _ in self.targets].index(name)
        return Item(((kind, len(row.ids)),), sum(row.marks[1:]))

    def numbers(self, each: int) -> np.ndarray:
        """Returns where the rows of cells stand in an array that has `each` rows of a cell, [C, each]."""
        d, m, j = np.ogrid[: self.devices, : self.micro, :each]
        return (d * self.micro * each + j * self.micro + m).reshape(self.cells, each)

    def batch(
        self,
        packing: Packing,
        shape: Shape,
        cells: Sequence[Cell],
        pairs: Sequence[tuple[int, Pair] | None],
        targets: Supervised,
        encoder: Encoder,
        share: Share = np.arange,
    ) -> TrainBatch:
        """Returns this host's part of a batch.

        Args:
          cells: what lies in each.
          pairs: numbered pairs of the whole batch, None where it is not full.
          targets: supervised rows of the whole batch.
          share: says which rows of an array are this host's.

        Raises:
          InputError: a pair lacks a cached value, a frozen logit or a verdict.
        """
        made = {
            number: _cell(
                self,
                packing,
                shape,
                [(i, pairs[i]) for i in cells[number].pairs],
                [targets[i] for i in cells[number].rows],
                encoder,
            )
            for number in map(int, share(self.cells))
        }

        def lay(*parts: np.ndarray) -> np.ndarray:
            """Puts the rows of this host's cells where they stand."""
            rows = np.concatenate(parts)
            return rows[np.argsort(self.numbers(len(parts[0]))[list(made)].reshape(-1))]

        return jax.tree.map(lay, *made.values())

    def abstract(self, shape: Shape) -> TrainBatch:
        """Returns the shapes of a whole batch."""
        empty = _cell(self, Packing("off", [shape]), shape, [(0, None)] * self._each, [], None)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * self.cells, *x.shape[1:]), x.dtype), empty)

    def own(self, pairs: int, targets: Sequence[str]) -> list[Cell]:
        """Returns cells in which each kind of rows lies in its order, as many in each."""
        cells = [Cell(numbers, []) for numbers in self.numbers(pairs // self.cells).tolist()]
        for name, group in self.targets:
            places = [i for i, other in enumerate(targets) if other == name]
            for cell, numbers in zip(cells, self.numbers(group.rows // self.cells).tolist(), strict=True):
                cell.rows.extend(places[i] for i in numbers)
        return cells

    @property
    def _each(self) -> int:
        return self.pairs.pairs // self.cells if self.pairs else 0


def _cell(
    spec: TrainSpec,
    packing: Packing,
    shape: Shape,
    pairs: Sequence[tuple[int, tuple[int, Pair] | None]],
    targets: Supervised,
    encoder: Encoder | None,
) -> TrainBatch:
    """Makes the arrays of one cell; without an encoder nothing is in it.

    Args:
      pairs: with each its place in the batch.
    """
    pad_id = encoder.chat.pad_id if encoder else 0
    ids = [np.full(group, pad_id, np.int32) for group in shape.groups]
    segments = [np.zeros(group, np.int32) for group in shape.groups]
    begins = np.cumsum([0, *(bins * tokens for bins, tokens in shape.groups)])
    scored: list[tuple[np.ndarray, Sequence[int]]] = []
    learned = {name: np.zeros(shape.scored, bool) for name, _ in spec.targets}
    rows = [spec.pairs.rows(pair[1], encoder) if pair else [] for _, pair in pairs]
    items = [*(spec.pairs.item(both) for both in rows), *(spec.item(name, row) for name, row in targets)]
    places = packing.places(shape, items)
    number = done = 0

    def put(place, row_ids: Sequence[int]) -> int:
        """Lays a row into its bin -> its first place in the cell."""
        nonlocal number
        number += 1
        end = place.offset + len(row_ids)
        ids[place.group][place.bin, place.offset : end] = row_ids
        segments[place.group][place.bin, place.offset : end] = number
        return int(begins[place.group]) + place.bin * shape.groups[place.group][1] + place.offset

    def score(places_: np.ndarray, tokens: Sequence[int]) -> int:
        """Notes scored tokens -> the number of the first of them."""
        nonlocal done
        scored.append((places_, tokens))
        done += len(tokens)
        return done - len(tokens)

    made = []
    for (in_batch, pair), both, where in zip(pairs, rows, places):
        one = spec.pairs.padding()._replace(place=np.int32(in_batch))
        if pair is not None:
            one = one._replace(**spec.pairs.known(pair[1]), index=np.int32(pair[0]))
            at = iter(where)
            verdicts = []
            for kind, two in enumerate(both):
                for side, row in enumerate(two):
                    begin = put(next(at), row.ids)
                    if kind == 0:
                        first = score(
                            begin + row.start - 1 + np.arange(row.length), row.ids[row.start : row.start + row.length]
                        )
                        one.first[side], one.length[side] = first, row.length
                    if row.judged:
                        verdicts.append(begin + len(row.ids) - 1)
            one.verdict[:] = np.reshape(verdicts, one.verdict.shape)
        made.append(one)
    for (name, row), (place,) in zip(targets, places[len(pairs) :], strict=True):
        marked = np.flatnonzero(row.marks[1:])
        first = score(put(place, row.ids) + marked, [row.ids[i + 1] for i in marked])
        learned[name][first : first + len(marked)] = True
    at_A, tokens_A = np.zeros((2, shape.scored), np.int32)
    if scored:
        at_A[:done] = np.concatenate([places_ for places_, _ in scored])
        tokens_A[:done] = np.concatenate([tokens for _, tokens in scored])
    return TrainBatch(
        BinRows(
            tuple(ids), tuple(segments), at_A[None], tokens_A[None], {name: x[None] for name, x in learned.items()}
        ),
        jax.tree.map(lambda *leaves: np.stack(leaves), *made) if spec.pairs else None,
    )


def _values(values: Mapping[str, Sequence[float]], name: str, size: int, where: str) -> np.ndarray:
    found = values.get(name)
    if found is None or len(found) != size:
        raise InputError(f"{where}: {name} has {'no' if found is None else len(found)} values, {size} are needed")
    return np.array(found, np.float32)
