"""What a training step takes: pairs and supervised rows, in the bins of scir_jax.data.bins.

Axes: C cells (one for each device and micro-batch), T tokens of a bin, A scored places, K answers and V verdicts of a
cell, P pairs, 2 the answers of a pair, G templates that are asked, O the orders in which a judge is shown a pair (2, or
1 of them), R columns of a reward model, S single verdicts. A place of a cell counts its bins' tokens, group by group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scir_jax.data.batches import RowGroup, Share
from scir_jax.data.bins import BinRows, Laid, fill
from scir_jax.data.encode import Encoder, Lengths, Marked, Row
from scir_jax.data.packing import Dealt, Item, Number, Packing, RowSize, Shape, rows_of
from scir_jax.data.pairs import Pair
from scir_jax.errors import InputError


def turned(index: Any) -> Any:
    """Returns whether the pairs of these places in the iteration's file show their second answer as A in one order."""
    return index % 2 == 1


class PairBatch(NamedTuple):
    """Pairs of a training step; float32 unless said otherwise.

    Attributes:
      answer: [P, 2] int32, number of each answer among those of all devices' cells of its micro-batch.
      verdict: [P, G, O] int32, likewise of each verdict, with the first or the second answer shown as A; in one order
        as `turned` says.
      length: [P, 2] int32, tokens of each answer.
      cached: ROLE_READING -> [P, 2], see data.pairs.Pair.
      frozen: reward model -> [P, R] logits at the start of the iteration.
      verdicts: [P, S] the judge's single verdicts at the start.
      length_penalty: [P, 2] alpha |y|.
      label: [P] probability that the first answer is better (1/2 where it is unknown).
      weight: [P]; 0 for padding.
      index: [P] int32, the pair's place in the iteration's file; -1 for padding.
      place: [P] int32, the pair's place in the batch before it was dealt out to cells.
    """

    answer: np.ndarray
    verdict: np.ndarray
    length: np.ndarray
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
      orders: O.
    """

    pairs: int
    answers: RowGroup
    judges: tuple[RowGroup, ...] = ()
    cached: tuple[str, ...] = ()
    frozen: tuple[tuple[str, int], ...] = ()
    verdicts: int = 0
    orders: int = 2

    @classmethod
    def of(
        cls,
        pairs: int,
        lengths: Lengths,
        *,
        judged: bool,
        continued: bool,
        heads: int = 1,
        orders: int = 2,
        **values: Any,
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
        asked = tuple(RowGroup((pairs, orders), tokens, verdict=True) for tokens in judges)
        return cls(pairs, answers, asked, orders=orders, **values)

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        return (self.answers, *self.judges)

    @property
    def asked(self) -> int:
        """G."""
        return len(self.judges) + self.answers.verdict

    def rows(self, pair: Pair, encoder: Encoder, index: int = 0) -> list[tuple[Row, ...]]:
        """Returns a pair's rows of each of `groups`, those of its two answers first.

        Args:
          index: the pair's place in the iteration's file.
        """
        judges = encoder.judges[len(encoder.judges) - len(self.judges) :] if self.judges else ()
        answers: tuple[Row, ...] = encoder.answer_rows(pair)
        if self.answers.verdict:
            continued = encoder.judge_rows(encoder.judges[0], pair)
            answers = tuple(continued[i] if self.asks(i, index) else answers[i] for i in range(2))
        sides = (int(turned(index)),) if self.orders == 1 else (0, 1)
        found = [answers]
        for judge in judges:
            asked = encoder.judge_rows(judge, pair)
            found.append(tuple(asked[i] for i in sides))
        return found

    def asks(self, row: int, index: int = 0) -> bool:
        """Returns whether a verdict is read off a pair's row of this number, one of those of its `rows`."""
        return row > 1 or (bool(self.answers.verdict) and (self.orders == 2 or row == int(turned(index))))

    def laid(self, pair: Pair, encoder: Encoder, most: int = 0, index: int = 0) -> list[Laid]:
        """Returns a pair's `rows` as they lie in bins.

        Args:
          most: the two rows of a group share their beginning if they have one and so many tokens hold both; 0: never.
        """
        found = []
        for kind, both in enumerate(self.rows(pair, encoder, index)):
            one = Laid.of(kind, both)
            alone = one.shared == 0 or one.size.tokens > most
            found += [Laid.of(kind, [row]) for row in both] if alone else [one]
        return found

    def known(self, pair: Pair) -> dict[str, Any]:
        """Returns the parts of a PairBatch that a pair brings with it.

        Raises:
          InputError: the pair lacks a cached value, a frozen logit or a verdict.
        """
        where = pair.prompt.where
        if len(pair.verdicts) < self.verdicts:
            raise InputError(f"{where}: verdicts: holds {len(pair.verdicts)} numbers, {self.verdicts} are needed")
        return {
            "length": np.array(pair.lengths, np.int32),
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
            answer=np.zeros(2, np.int32),
            verdict=np.zeros((self.asked, self.orders), np.int32),
            length=np.zeros(2, np.int32),
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
        scored = sum(group.rows * group.scored for group in self.groups) // self.cells
        verdicts = self._each * self.pairs.asked * self.pairs.orders if self.pairs else 0
        return Shape(groups, max(scored, 1), 2 * self._each, verdicts)

    @property
    def longest(self) -> list[Item]:
        """The sizes of a step's rows that are all the longest, as those of items."""
        found = []
        for _ in range(self.pairs.pairs if self.pairs else 0):
            rows = ((k, group) for k, group in enumerate(self.pairs.groups) for _ in range(group.leading[1]))
            found.append(
                tuple(
                    RowSize(k, group.tokens, group.scored, int(not k), int(self.pairs.asks(number)))
                    for number, (k, group) in enumerate(rows)
                )
            )
        first = len(self.pairs.groups) if self.pairs else 0
        for kind, (_, group) in enumerate(self.targets, first):
            found += [(RowSize(kind, group.tokens, group.scored),)] * group.rows
        return found

    def laid(self, name: str, row: Marked) -> Laid:
        """Returns a supervised row as it lies in bins."""
        kind = len(self.pairs.groups if self.pairs else ()) + [name for name, _ in self.targets].index(name)
        return Laid(kind, (row.ids,), (tuple(np.flatnonzero(row.marks[1:]) + 1),), part=name)

    def numbers(self, each: int) -> np.ndarray:
        """Returns where the rows of cells stand in an array that has `each` rows of a cell, [C, each]."""
        d, m, j = np.ogrid[: self.devices, : self.micro, :each]
        return (d * self.micro * each + j * self.micro + m).reshape(self.cells, each)

    def batch(
        self,
        packing: Packing,
        shape: Shape,
        dealt: Dealt,
        items: Sequence[Item],
        laid: Callable[[int], Sequence[Laid]],
        pairs: Sequence[tuple[int, Pair] | None],
        pad_id: int,
        share: Share = np.arange,
    ) -> TrainBatch:
        """Returns this host's part of a batch.

        Args:
          dealt: what lies where; items are the pairs, and the supervised rows behind them.
          items: sizes of the whole batch's items.
          laid: number of an item -> its rows; called for those that this host holds.
          pairs: numbered pairs of the whole batch, None where it is not full.
          share: says which rows of an array are this host's.

        Raises:
          InputError: a pair lacks a cached value, a frozen logit or a verdict.
        """
        mine = list(map(int, share(self.cells)))
        parts = [name for name, _ in self.targets]
        rows = []
        for cell in mine:
            made = {i: laid(i) for i in dict(dealt.cells[cell])}
            rows.append(fill(packing, shape, [made[i][r] for i, r in dealt.cells[cell]], parts, pad_id))
        if self.pairs is None:
            return TrainBatch(self._laid(mine, rows), None)
        answers, verdicts = self._readings(shape, dealt, items, pairs)
        found = []
        for cell in mine:
            device, part = divmod(cell, self.micro)
            numbers = dealt.pairs[part][device * self._each : (device + 1) * self._each]
            found.append(_stack([self._pair(number, pairs[number], answers, verdicts) for number in numbers]))
        return TrainBatch(self._laid(mine, rows), self._laid(mine, found))

    def _laid(self, cells: Sequence[int], parts: Sequence[Any]) -> Any:
        """Puts the rows of this host's cells where they stand."""

        def lay(*arrays: np.ndarray) -> np.ndarray:
            return np.concatenate(arrays)[np.argsort(self.numbers(len(arrays[0]))[cells].reshape(-1))]

        return jax.tree.map(lay, *parts)

    def _readings(
        self, shape: Shape, dealt: Dealt, items: Sequence[Item], pairs: Sequence[tuple[int, Pair] | None]
    ) -> tuple[dict[Number, int], dict[Number, int]]:
        """Returns the number of every answer, and of every verdict, among those of its micro-batch.

        Their keys are the number of the pair, and of the row among its rows.
        """
        answers: dict[Number, int] = {}
        verdicts: dict[Number, int] = {}
        for cell, laid in enumerate(dealt.cells):
            device = cell // self.micro
            rows = [(i, row, items[i][r]) for i, r in laid for row in rows_of(items[i], r)]
            counted = [(i, row) for i, row, size in rows if size.answers]
            answers |= {number: device * shape.answers + k for k, number in enumerate(counted)}
            judged = [(i, row) for i, row, size in rows if size.verdicts and self._asks(row, pairs[i])]
            verdicts |= {number: device * shape.verdicts + k for k, number in enumerate(judged)}
        return answers, verdicts

    def _asks(self, row: int, pair: tuple[int, Pair] | None) -> bool:
        return pair is not None and self.pairs.asks(row, pair[0])

    def _pair(
        self,
        number: int,
        pair: tuple[int, Pair] | None,
        answers: Mapping[Number, int],
        verdicts: Mapping[Number, int],
    ) -> PairBatch:
        one = self.pairs.padding()._replace(place=np.int32(number))
        if pair is None:
            return one
        one = one._replace(**self.pairs.known(pair[1]), index=np.int32(pair[0]))
        one.answer[:] = [answers[number, side] for side in range(2)]
        rows = range(sum(group.leading[1] for group in self.pairs.groups))
        asked = [verdicts[number, row] for row in rows if self._asks(row, pair)]
        one.verdict[:] = np.reshape(asked, one.verdict.shape)
        return one

    def abstract(self, shape: Shape) -> TrainBatch:
        """Returns the shapes of a whole batch."""
        pairs = None if self.pairs is None else _stack([self.pairs.padding()] * self._each)
        empty = TrainBatch(fill(Packing("off", [shape]), shape, [], [name for name, _ in self.targets], 0), pairs)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * self.cells, *x.shape[1:]), x.dtype), empty)

    def own(self, items: Sequence[Item]) -> Dealt:
        """Deals a step out as it lies: the rows of each kind in their order, as many in each cell."""
        pairs = self.pairs.pairs if self.pairs else 0
        cells: list[list[Number]] = [[] for _ in range(self.cells)]
        dealt: list[list[int]] = [[] for _ in range(self.micro)]
        for cell, numbers in enumerate(self.numbers(self._each).tolist()):
            cells[cell] += [(i, r) for i in numbers for r in range(len(items[i]))]
            dealt[cell % self.micro] += numbers
        first = pairs
        for _, group in self.targets:
            for cell, numbers in enumerate(self.numbers(group.rows // self.cells).tolist()):
                cells[cell] += [(first + i, 0) for i in numbers]
            first += group.rows
        return Dealt(dealt, cells)

    @property
    def _each(self) -> int:
        return self.pairs.pairs // self.cells if self.pairs else 0


def _stack(items: Sequence[PairBatch]) -> PairBatch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


def _values(values: Mapping[str, Sequence[float]], name: str, size: int, where: str) -> np.ndarray:
    found = values.get(name)
    if found is None or len(found) != size:
        raise InputError(f"{where}: {name} has {'no' if found is None else len(found)} values, {size} are needed")
    return np.array(found, np.float32)
