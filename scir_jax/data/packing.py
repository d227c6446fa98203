"""Where the rows of a training step lie: bins of few compiled shapes, chosen from nothing but the rows' lengths.

A step's rows are dealt out to cells, one for each device and micro-batch, so that all have about as much to do. In a
cell the rows lie in bins, one row behind another. All of it follows from lengths alone, so that every host finds the
same, and a position in the data stays one number.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

SHAPES = 4
"""compiled shapes of a stage's step at the most"""
SPARE = 0.03
"""share of a stage's tokens that must be saved for another shape to be compiled"""
LENGTHS = 4
"""lengths of rows in a step at the most, where the attention knows no segments"""


class RowSize(NamedTuple):
    """What is known of a row, or of rows that share their beginning, where they are laid out.

    Attributes:
      kind: rows of one kind go through the model together where nothing is packed.
      tokens: its length.
      scored: its places at which the vocabulary's logits are taken.
      answers: answers of a pair that it holds and that are scored.
      verdicts: that are read off it.
      rows: that lie in it.
    """

    kind: int
    tokens: int
    scored: int = 0
    answers: int = 0
    verdicts: int = 0
    rows: int = 1


Rows = Sequence[RowSize]
Item = tuple[RowSize, ...]
"""rows that stay in one micro-batch: those of a pair, or a supervised one"""
Number = tuple[int, int]
"""number of an item in its step, and of a row in it"""


class Shape(NamedTuple):
    """A compiled shape of a training step: what each of its cells holds.

    Attributes:
      groups: (bins, tokens of a bin) of each group of bins.
      scored: places at which the vocabulary's logits are taken.
      answers: that are scored.
      verdicts: that are read.
    """

    groups: tuple[tuple[int, int], ...]
    scored: int
    answers: int = 0
    verdicts: int = 0

    @property
    def tokens(self) -> int:
        return sum(bins * tokens for bins, tokens in self.groups)


class Place(NamedTuple):
    """Where a row lies in its cell."""

    group: int
    bin: int
    offset: int


class Dealt(NamedTuple):
    """What lies where in a step.

    Attributes:
      pairs: numbers of the pairs of each micro-batch, as many in each.
      cells: rows of each cell; cell number device times micro-batches + micro-batch.
    """

    pairs: list[list[int]]
    cells: list[list[Number]]


def rows_of(item: Item, number: int) -> range:
    """Returns which of an item's rows lie in the one of this number."""
    first = sum(size.rows for size in item[:number])
    return range(first, first + item[number].rows)


def deal(items: Sequence[Item], pairs: int, devices: int, micro: int) -> Dealt:
    """Deals a step out: pairs and supervised rows to micro-batches, the rows of each to devices.

    The largest come first, each to the one that has least, and pairs are exchanged then. The rows of a pair may lie on
    several devices.

    Args:
      pairs: so many of the first items are pairs.
    """
    sizes = [sum(row.tokens for row in item) for item in items]
    load = [0] * micro
    parts: list[list[int]] = [[] for _ in range(micro)]
    for first, end, most in ((0, pairs, pairs // micro), (pairs, len(items), len(items))):
        for number in sorted(range(first, end), key=lambda i: -sizes[i]):
            to = min((m for m in range(micro) if len(parts[m]) < most), key=lambda m: load[m])
            parts[to].append(number)
            load[to] += sizes[number]
        if not first:
            _exchange(parts, load, sizes)
            dealt = [sorted(part) for part in parts]
    cells: list[list[Number]] = [[] for _ in range(devices * micro)]
    for m, part in enumerate(parts):
        rows = [(i, r, row.tokens) for i in sorted(part) for r, row in enumerate(items[i])]
        load = [0] * devices
        for i, r, tokens in sorted(rows, key=lambda row: -row[2]):
            device = min(range(devices), key=lambda d: load[d])
            cells[device * micro + m].append((i, r))
            load[device] += tokens
    return Dealt(dealt, [sorted(cell) for cell in cells])


def _exchange(parts: list[list[int]], load: list[int], sizes: Sequence[int]) -> None:
    """Exchanges items between the part that has most and others while that makes the most less."""
    for _ in range(2 * len(parts)):
        most = max(range(len(parts)), key=lambda m: load[m])
        found = None
        least = load[most]
        for other in range(len(parts)):
            if other == most:
                continue
            for i, a in enumerate(parts[most]):
                for j, b in enumerate(parts[other]):
                    less = sizes[a] - sizes[b]
                    if less > 0 and (higher := max(load[most] - less, load[other] + less)) < least:
                        least, found = higher, (other, i, j, less)
        if found is None:
            return
        other, i, j, less = found
        parts[most][i], parts[other][j] = parts[other][j], parts[most][i]
        load[most], load[other] = load[most] - less, load[other] + less


def best_fit(tokens: Sequence[int], size: int, rows: Sequence[int] = (), most: int = 0) -> list[tuple[int, int]]:
    """Puts rows into bins: the longest first, each into the fullest bin that still holds it.

    Args:
      size: of a bin, tokens.
      rows: how many rows each of them stands for.
      most: rows of a bin; 0: any number.

    Returns:
      Bin and offset of each row.

    Raises:
      ValueError: a row is longer than a bin.
    """
    room: list[tuple[int, int]] = []  # (tokens, bin), rising
    held: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(tokens)
    for number in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        length, count = tokens[number], rows[number] if rows else 1
        if length > size:
            raise ValueError(f"a row of {length} tokens does not fit into a bin of {size}")
        at = bisect.bisect_left(room, (length, 0))
        while most and at < len(room) and held[room[at][1]] + count > most:
            at += 1
        if at < len(room):
            left, found = room.pop(at)
        else:
            left, found = size, len(held)
            held.append(0)
        places[number] = found, size - left
        held[found] += count
        bisect.insort(room, (left - length, found))
    return places


def rungs(sizes: Iterable[int], most: int, spare: float = 0.0) -> list[int]:
    """Chooses at most so many of the sizes that all, each raised to the next chosen one, sum to least.

    Args:
      spare: fewer are chosen where the sum is greater by this share of it at most.

    Returns:
      The chosen sizes, rising; the last is the largest of all.
    """
    values, counts = np.unique(np.fromiter(sizes, int), return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # best[k][j]: least sum of the first j values with k rungs, the last of them at value j - 1.
    number = len(values)
    best = np.full((most + 1, number + 1), np.inf)
    best[0, 0] = 0
    came = np.zeros((most + 1, number + 1), int)
    for k in range(1, most + 1):
        for j in range(1, number + 1):
            sums = best[k - 1, :j] + values[j - 1] * (before[j] - before[:j])
            came[k, j] = int(np.argmin(sums))
            best[k, j] = sums[came[k, j]]
    if not number:
        return []
    k, j = int(np.flatnonzero(best[:, number] <= (1 + spare) * best[:, number].min())[0]), number
    chosen = []
    while j:
        chosen.append(int(values[j - 1]))
        j, k = came[k, j], k - 1
    return chosen[::-1]


def coarse(size: int) -> int:
    """Rounds up to a multiple of 8, of 128 above 256, and to about a thirty-second of large sizes.

    Stages then have shapes in common, which are compiled once.
    """
    unit = 8 if size <= 256 else max(128, 1 << (size.bit_length() - 6))
    return -(-size // unit) * unit


class Packing:
    """A way to lay out the rows of steps.

    Attributes:
      kind: "bins", where several rows share a bin; "lengths", where each has one of its own, of few lengths; "off",
        where the bins of each kind are as many and as long as the limits ask for.
      shapes: of the steps, the smallest first.
      sizes: of kind "lengths": the largest step of each shape, in tokens of its largest cell.
      bin: of kind "bins": the most tokens of a bin.
    """

    def __init__(self, kind: str, shapes: Sequence[Shape], sizes: Sequence[int] = (), bin: int = 0):
        self.kind = kind
        self.shapes = tuple(shapes)
        self.sizes = tuple(sizes)
        self.bin = bin

    @classmethod
    def of(cls, kind: str, steps: Iterable[Sequence[Rows]], bound: Shape, bin: int = 0) -> Packing:
        """Finds the shapes of a stage.

        Args:
          steps: the rows of every cell of every step.
          bound: what holds the longest rows; the shape where nothing is packed.
        """
        if kind == "off":
            return cls(kind, [bound])
        steps = list(steps)
        if kind == "lengths":
            sizes = [_total(step) for step in steps]
            found = rungs(sizes, SHAPES, SPARE)
            parts: list[list[Rows]] = [[] for _ in found]
            for step, size in zip(steps, sizes, strict=True):
                parts[bisect.bisect_left(found, size)].extend(step)
            return cls(kind, [Shape(_lengths(part), *_most(part)) for part in parts], found)
        needs = [_bins(step, bin) for step in steps]
        sizes = [math.prod(need) for need in needs]
        groups = {needs[sizes.index(rung)] for rung in rungs(sizes, SHAPES, SPARE)}
        # Fewer tokens hardly ever need more bins; a step where they do has a shape of its own.
        groups |= {need for step, need in zip(steps, needs) if not any(_fits(step, *group) for group in groups)}
        taken: dict[tuple[int, int], list[Rows]] = {group: [] for group in sorted(groups, key=math.prod)}
        for step in steps:
            taken[next(group for group in taken if _fits(step, *group))].extend(step)
        return cls(kind, [Shape((group,), *_most(cells)) for group, cells in taken.items() if cells], bin=bin)

    def shape(self, cells: Sequence[Rows]) -> Shape:
        """Returns the shape of a step of the stage."""
        if self.kind == "off":
            return self.shapes[0]
        if self.kind == "lengths":
            size = _total(cells)
            return next(shape for shape, most in zip(self.shapes, self.sizes, strict=True) if most >= size)
        return next(shape for shape in self.shapes if _fits(cells, *shape.groups[0]))

    def places(self, shape: Shape, rows: Rows) -> list[Place]:
        """Returns where each row of a cell lies.

        Raises:
          ValueError: a row does not fit.
        """
        if self.kind == "bins":
            return [Place(0, *place) for place in best_fit([row.tokens for row in rows], shape.groups[0][1])]
        return self._separate(shape, rows)

    def _separate(self, shape: Shape, rows: Rows) -> list[Place]:
        """Gives each row a bin: of its own kind, or the shortest that holds it, the longest row first."""
        taken = [0] * len(shape.groups)
        places = [Place(0, 0, 0)] * len(rows)
        order = range(len(rows))
        for number in order if self.kind == "off" else sorted(order, key=lambda i: -rows[i].tokens):
            kind, tokens, *_ = rows[number]
            groups = [kind] if self.kind == "off" else range(len(shape.groups))
            fitting = [g for g in groups if shape.groups[g][1] >= tokens and taken[g] < shape.groups[g][0]]
            if not fitting:
                raise ValueError(f"a row of {tokens} tokens does not fit into {shape.groups}")
            places[number] = Place(fitting[0], taken[fitting[0]], 0)
            taken[fitting[0]] += 1
        return places


def _total(cells: Sequence[Rows]) -> int:
    """Returns the tokens of a step's largest cell."""
    return max(sum(row.tokens for row in cell) for cell in cells)


def _fits(cells: Sequence[Rows], bins: int, tokens: int) -> bool:
    """Checks whether so many bins of so many tokens hold each cell."""
    if any(row.tokens > tokens for cell in cells for row in cell):
        return False
    placed = (best_fit([row.tokens for row in cell], tokens) for cell in cells)
    return all(number < bins for cell in placed for number, _ in cell)


def _bins(cells: Sequence[Rows], most: int) -> tuple[int, int]:
    """Finds as few and as short bins, of `most` tokens at the most, as hold each cell of a step.

    Raises:
      ValueError: a row is longer than `most`.
    """
    total = max(_total(cells), 1)
    longest = max((row.tokens for cell in cells for row in cell), default=1)
    if longest > most:
        raise ValueError(f"a row of {longest} tokens does not fit into a bin of {most}")
    bins = -(-total // most)
    while True:
        tokens = min(coarse(max(longest, -(-total // bins))), most)
        while True:
            if _fits(cells, bins, tokens):
                return bins, tokens
            if tokens == most:
                break
            tokens = min(coarse(tokens + 1), most)
        bins += 1


def _most(cells: Sequence[Rows]) -> tuple[int, int, int]:
    """Returns the most scored places, answers and verdicts of a cell."""
    scored = max(sum(row.scored for row in cell) for cell in cells)
    answers = max(sum(row.answers for row in cell) for cell in cells)
    verdicts = max(sum(row.verdicts for row in cell) for cell in cells)
    return coarse(max(scored, 1)), answers, verdicts


def _lengths(cells: Sequence[Rows]) -> tuple[tuple[int, int], ...]:
    """Finds few lengths of rows, and how many of each suffice for every one of these cells."""
    rows = [[coarse(row.tokens) for row in cell] for cell in cells]
    lengths = rungs((tokens for cell in rows for tokens in cell), LENGTHS, SPARE) or [8]
    # So many rows are longer than each next shorter length, and need this one or a longer one.
    longer = [max(sum(tokens > length for tokens in cell) for cell in rows) for length in [0, *lengths]]
    longer[0] = max(longer[0], 1)
    groups = [(longer[i] - longer[i + 1], length) for i, length in enumerate(lengths)]
    return tuple(group for group in groups if group[0])
