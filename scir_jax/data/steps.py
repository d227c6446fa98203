"""What a training step takes: pairs and supervised rows, laid out in the bins of scir_jax.data.packing.

Axes: C cells (one for each device and micro-batch), T tokens of a bin, A scored places, K answers and V verdicts of a
cell, P pairs, 2 the answers of a pair (or the orders in which a judge is shown them), G templates that are asked, R
columns of a reward model, S single verdicts. A place of a cell counts its bins' tokens, group by group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scir_jax.data.batches import RowGroup, Share
from scir_jax.data.encode import Encoder, Lengths, Marked, Row
from scir_jax.data.packing import Dealt, Item, Number, Packing, RowSize, Shape
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


class PairBatch(NamedTuple):
    """Pairs of a training step; float32 unless said otherwise.

    Attributes:
      answer: [P, 2] int32, number of each answer among those of all devices' cells of its micro-batch.
      verdict: [P, G, 2] int32, likewise of each verdict, with the first or the second answer shown as A.
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
        """Returns the sizes of a pair's `rows`."""
        return tuple(
            RowSize(kind, len(row.ids), 0 if kind else row.length, not kind, row.judged)
            for kind, both in enumerate(rows)
            for row in both
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
            verdict=np.zeros((self.asked, 2), np.int32),
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
        answers = 2 * self._each
        return Shape(groups, max(scored, 1), answers, answers * (self.pairs.asked if self.pairs else 0))

    @property
    def longest(self) -> list[Item]:
        """The sizes of a step's rows that are all the longest, as those of items."""
        found = []
        for _ in range(self.pairs.pairs if self.pairs else 0):
            rows = enumerate(self.pairs.groups)
            found.append(tuple(RowSize(k, g.tokens, g.scored, not k, g.verdict) for k, g in rows for _ in range(2)))
        first = len(self.pairs.groups) if self.pairs else 0
        for kind, (_, group) in enumerate(self.targets, first):
            found += [(RowSize(kind, group.tokens, group.scored),)] * group.rows
        return found

    def item(self, name: str, row: Marked) -> Item:
        """Returns the size of a supervised row."""
        kind = len(self.pairs.groups if self.pairs else ()) + [name for name, _ in self.targets].index(name)
        return (RowSize(kind, len(row.ids), sum(row.marks[1:])),)

    def numbers(self, each: int) -> np.ndarray:
        """Returns where the rows of cells stand in an array that has `each` rows of a cell, [C, each]."""
        d, m, j = np.ogrid[: self.devices, : self.micro, :each]
        return (d * self.micro * each + j * self.micro + m).reshape(self.cells, each)

    def batch(
        self,
        packing: Packing,
        shape: Shape,
        dealt: Dealt,
        pairs: Sequence[tuple[int, Pair] | None],
        targets: Supervised,
        encoder: Encoder,
        share: Share = np.arange,
    ) -> TrainBatch:
        """Returns this host's part of a batch.

        Args:
          dealt: what lies where; items are the pairs, and the supervised rows behind them.
          pairs: numbered pairs of the whole batch, None where it is not full.
          targets: supervised rows of the whole batch.
          share: says which rows of an array are this host's.

        Raises:
          InputError: a pair lacks a cached value, a frozen logit or a verdict.
        """
        mine = list(map(int, share(self.cells)))
        made = [self._cell(packing, shape, dealt.cells[cell], pairs, targets, encoder) for cell in mine]
        if self.pairs is None:
            return TrainBatch(self._laid(mine, made), None)
        answers, verdicts = self._readings(shape, dealt, len(pairs))
        parts = []
        for cell in mine:
            device, part = divmod(cell, self.micro)
            numbers = dealt.pairs[part][device * self._each : (device + 1) * self._each]
            parts.append(_stack([self._pair(number, pairs[number], answers, verdicts) for number in numbers]))
        return TrainBatch(self._laid(mine, made), self._laid(mine, parts))

    def _laid(self, cells: Sequence[int], parts: Sequence[Any]) -> Any:
        """Puts the rows of this host's cells where they stand."""

        def lay(*arrays: np.ndarray) -> np.ndarray:
            return np.concatenate(arrays)[np.argsort(self.numbers(len(arrays[0]))[cells].reshape(-1))]

        return jax.tree.map(lay, *parts)

    def _readings(self, shape: Shape, dealt: Dealt, pairs: int) -> tuple[dict[Number, int], dict[Number, int]]:
        """Returns the number of every answer, and of every verdict, among those of its micro-batch."""
        answers: dict[Number, int] = {}
        verdicts: dict[Number, int] = {}
        for cell, rows in enumerate(dealt.cells):
            device = cell // self.micro
            # The first two rows of a pair hold its answers; its last ones are judged.
            own = [(i, r) for i, r in rows if i < pairs]
            counted = [(i, r) for i, r in own if r < 2]
            answers |= {number: device * shape.answers + k for k, number in enumerate(counted)}
            judged = [(i, r) for i, r in own if r >= 2 * (len(self.pairs.groups) - self.pairs.asked)]
            verdicts |= {number: device * shape.verdicts + k for k, number in enumerate(judged)}
        return answers, verdicts

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
        rows = 2 * len(self.pairs.groups)
        asked = [verdicts[number, row] for row in range(rows - 2 * self.pairs.asked, rows)]
        one.verdict[:] = np.reshape(asked, one.verdict.shape)
        return one

    def _cell(
        self,
        packing: Packing,
        shape: Shape,
        numbers: Sequence[Number],
        pairs: Sequence[tuple[int, Pair] | None],
        targets: Supervised,
        encoder: Encoder | None,
    ) -> BinRows:
        """Makes the rows of one cell; without an encoder nothing is in it."""
        pad_id = encoder.chat.pad_id if encoder else 0
        ids = [np.full(group, pad_id, np.int32) for group in shape.groups]
        segments = [np.zeros(group, np.int32) for group in shape.groups]
        begins = np.cumsum([0, *(bins * tokens for bins, tokens in shape.groups)])
        at_A, tokens_A = np.zeros((2, shape.scored), np.int32)
        learned = {name: np.zeros(shape.scored, bool) for name, _ in self.targets}
        first_K, length_K = np.zeros((2, shape.answers), np.int32)
        verdict_V = np.zeros(shape.verdicts, np.int32)
        made: dict[int, list[tuple[Row | Marked, RowSize]]] = {}
        for i in dict(numbers):
            if i < len(pairs):
                both = self.pairs.rows(pairs[i][1], encoder)
                made[i] = list(zip((row for two in both for row in two), self.pairs.item(both), strict=True))
            else:
                made[i] = [(targets[i - len(pairs)][1], *self.item(*targets[i - len(pairs)]))]
        rows = [made[i][r][0] for i, r in numbers]
        places = packing.places(shape, [made[i][r][1] for i, r in numbers])
        done = answers = verdicts = 0
        for segment, ((i, r), row, place) in enumerate(zip(numbers, rows, places, strict=True), start=1):
            end = place.offset + len(row.ids)
            ids[place.group][place.bin, place.offset : end] = row.ids
            segments[place.group][place.bin, place.offset : end] = segment
            begin = int(begins[place.group]) + place.bin * shape.groups[place.group][1] + place.offset
            if i >= len(pairs):
                # The first token of a row is behind none that could predict it.
                scored = np.flatnonzero(row.marks[1:]) + 1
                learned[targets[i - len(pairs)][0]][done : done + len(scored)] = True
            else:
                scored = row.start + np.arange(row.length) if r < 2 else np.arange(0)
                if r < 2:
                    first_K[answers], length_K[answers] = done, row.length
                    answers += 1
                if row.judged:
                    verdict_V[verdicts] = begin + len(row.ids) - 1
                    verdicts += 1
            at_A[done : done + len(scored)] = begin + scored - 1
            tokens_A[done : done + len(scored)] = [row.ids[place_] for place_ in scored]
            done += len(scored)
        one = (at_A[None], tokens_A[None], {name: x[None] for name, x in learned.items()})
        return BinRows(tuple(ids), tuple(segments), *one, first_K[None], length_K[None], verdict_V[None])

    def abstract(self, shape: Shape) -> TrainBatch:
        """Returns the shapes of a whole batch."""
        pairs = None if self.pairs is None else _stack([self.pairs.padding()] * self._each)
        empty = TrainBatch(self._cell(Packing("off", [shape]), shape, [], [], [], None), pairs)
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
