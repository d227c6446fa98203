"""Where the rows of a training step lie: bins of few compiled shapes, chosen from nothing but the rows' lengths.

A step's rows are dealt out to cells, one for each device and micro-batch, so that all have about as much to do. In a
cell the rows lie in bins, one row behind another. All of it follows from lengths alone, so that every host finds the
same, and a position in the data stays one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

SHAPES = 4
"""compiled shapes of a stage's step at the most"""
LENGTHS = 4
"""lengths of rows in a step at the most, where the attention knows no segments"""


class Item(NamedTuple):
    """Rows that stay in one cell: those of a pair, or a supervised one.

    Attributes:
      rows: kind and tokens of each row. Rows of one kind go through the model together where nothing is packed.
      scored: places at which the vocabulary's logits are taken.
    """

    rows: tuple[tuple[int, int], ...] = ()
    scored: int = 0

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.rows)


class Shape(NamedTuple):
    """A compiled shape of a training step: what each of its cells holds.

    Attributes:
      groups: (bins, tokens of a bin) of each group of bins.
      scored: places at which the vocabulary's logits are taken.
    """

    groups: tuple[tuple[int, int], ...]
    scored: int

    @property
    def tokens(self) -> int:
        return sum(bins * tokens for bins, tokens in self.groups)


class Place(NamedTuple):
    """Where a row lies in its cell."""

    group: int
    bin: int
    offset: int


def deal(pairs: Sequence[Item], rows: Sequence[Item], cells: int) -> tuple[list[list[int]], list[list[int]]]:
    """Deals items out to cells, the largest first, each to the cell that has least; then pairs are exchanged.

    Args:
      pairs: as many of them come to each cell.
      rows: of them there may be more in one cell than in another.

    Returns:
      The numbers of the pairs of each cell, and of the rows, in rising order.
    """
    sizes = [item.tokens for item in pairs]
    load = [0] * cells
    dealt: tuple[list[list[int]], list[list[int]]] = tuple([[] for _ in range(cells)] for _ in range(2))
    for items, taken, most in ((pairs, dealt[0], len(pairs) // cells), (rows, dealt[1], len(rows))):
        for number in sorted(range(len(items)), key=lambda i: -items[i].tokens):
            cell = min((c for c in range(cells) if len(taken[c]) < most), key=lambda c: load[c])
            taken[cell].append(number)
            load[cell] += items[number].tokens
        if items is pairs:
            _exchange(dealt[0], load, sizes)
    return tuple([sorted(numbers) for numbers in taken] for taken in dealt)


def _exchange(taken: list[list[int]], load: list[int], sizes: Sequence[int]) -> None:
    """Exchanges items between the cell that has most and others while that makes the most less."""
    for _ in range(2 * len(taken)):
        most = max(range(len(taken)), key=lambda c: load[c])
        found = None
        least = load[most]
        for other in range(len(taken)):
            if other == most:
                continue
            for i, a in enumerate(taken[most]):
                for j, b in enumerate(taken[other]):
                    less = sizes[a] - sizes[b]
                    if less > 0 and (higher := max(load[most] - less, load[other] + less)) < least:
                        least, found = higher, (other, i, j, less)
        if found is None:
            return
        other, i, j, less = found
        taken[most][i], taken[other][j] = taken[other][j], taken[most][i]
        load[most], load[other] = load[most] - less, load[other] + less


def best_fit(tokens: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Puts rows into bins: the longest first, each into the fullest bin that still holds it.

    Returns:
      Bin and offset of each row.

    Raises:
      ValueError: a row is longer than a bin.
    """
    room: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(tokens)
    for number in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        length = tokens[number]
        if length > size:
            raise ValueError(f"a row of {length} tokens does not fit into a bin of {size}")
        fitting = [b for b, left in enumerate(room) if left >= length]
        if fitting:
            found = min(fitting, key=lambda b: room[b])
        else:
            found = len(room)
            room.append(size)
        places[number] = found, size - room[found]
        room[found] -= length
    return places


def rungs(sizes: Iterable[int], most: int) -> list[int]:
    """Chooses at most so many of the sizes that all, each raised to the next chosen one, sum to least.

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
    k, j = int(np.argmin(best[:, number])), number
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
      sizes: the largest step of each shape, in tokens of its largest cell.
      bin: tokens of a bin where there are several; of kind "bins".
    """

    def __init__(self, kind: str, shapes: Sequence[Shape], sizes: Sequence[int] = (), bin: int = 0):
        self.kind = kind
        self.shapes = tuple(shapes)
        self.sizes = tuple(sizes)
        self.bin = bin

    @classmethod
    def of(cls, kind: str, steps: Iterable[Sequence[Sequence[Item]]], bound: Shape, bin: int = 0) -> Packing:
        """Finds the shapes of a stage.

        Args:
          steps: the items of every cell of every step.
          bound: what holds the longest rows; the shape where nothing is packed.
        """
        if kind == "off":
            return cls(kind, [bound])
        steps = list(steps)
        sizes = [_size(kind, step, bin) for step in steps]
        found = rungs(sizes, SHAPES)
        at = [next(i for i, rung in enumerate(found) if rung >= size) for size in sizes]
        shapes = []
        for number, rung in enumerate(found):
            cells = [cell for step, i in zip(steps, at, strict=True) if i == number for cell in step]
            scored = coarse(max(max(sum(item.scored for item in cell) for cell in cells), 1))
            if kind == "lengths":
                groups = _lengths(cells)
            else:
                groups = ((1, rung),) if rung <= bin else ((rung // bin, bin),)
            shapes.append(Shape(groups, scored))
        return cls(kind, shapes, found, bin)

    @property
    def segmented(self) -> bool:
        """Whether several rows share a bin."""
        return self.kind == "bins"

    def shape(self, cells: Sequence[Sequence[Item]]) -> Shape:
        """Returns the shape of a step of the stage."""
        if self.kind == "off":
            return self.shapes[0]
        size = _size(self.kind, cells, self.bin)
        return next(shape for shape, most in zip(self.shapes, self.sizes, strict=True) if most >= size)

    def places(self, shape: Shape, items: Sequence[Item]) -> list[list[Place]]:
        """Returns where each row of each item of a cell lies.

        Raises:
          ValueError: a row does not fit.
        """
        rows = [(kind, tokens) for item in items for kind, tokens in item.rows]
        if self.kind == "bins":
            found = [Place(0, *place) for place in best_fit([tokens for _, tokens in rows], shape.groups[0][1])]
        else:
            found = self._separate(shape, rows)
        each = iter(found)
        return [[next(each) for _ in item.rows] for item in items]

    def _separate(self, shape: Shape, rows: Sequence[tuple[int, int]]) -> list[Place]:
        """Gives each row a bin: of its own kind, or the shortest that holds it, the longest row first."""
        taken = [0] * len(shape.groups)
        places = [Place(0, 0, 0)] * len(rows)
        order = range(len(rows))
        for number in order if self.kind == "off" else sorted(order, key=lambda i: -rows[i][1]):
            kind, tokens = rows[number]
            groups = [kind] if self.kind == "off" else range(len(shape.groups))
            fitting = [g for g in groups if shape.groups[g][1] >= tokens and taken[g] < shape.groups[g][0]]
            if not fitting:
                raise ValueError(f"a row of {tokens} tokens does not fit into {shape.groups}")
            places[number] = Place(fitting[0], taken[fitting[0]], 0)
            taken[fitting[0]] += 1
        return places


def _size(kind: str, cells: Sequence[Sequence[Item]], bin: int) -> int:
    """Returns the tokens of a step's largest cell; of its bins: one as long as it must be, or several full ones."""

    def size(items: Sequence[Item]) -> int:
        tokens = sum(item.tokens for item in items)
        if kind == "lengths" or tokens <= bin:
            return min(coarse(max(tokens, 8)), bin or tokens)
        placed = best_fit([length for item in items for _, length in item.rows], bin)
        return (max(number for number, _ in placed) + 1) * bin

    return max(map(size, cells))


def _lengths(cells: Sequence[Sequence[Item]]) -> tuple[tuple[int, int], ...]:
    """Finds few lengths of rows, and how many of each suffice for every one of these cells."""
    rows = [[coarse(tokens) for item in cell for _, tokens in item.rows] for cell in cells]
    lengths = rungs((tokens for cell in rows for tokens in cell), LENGTHS) or [8]
    # So many rows are longer than each next shorter length, and need this one or a longer one.
    longer = [max(sum(tokens > length for tokens in cell) for cell in rows) for length in [0, *lengths]]
    longer[0] = max(longer[0], 1)
    groups = [(longer[i] - longer[i + 1], length) for i, length in enumerate(lengths)]
    return tuple(group for group in groups if group[0])
