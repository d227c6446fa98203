"""What the scorer and the judge take: bins of rows that answers' log-probabilities or verdicts are read off.

Rows that begin alike lie together, so that what they have in common is computed once. Where attention knows no segments,
each row has a bin of its own, of few lengths.

Axes: B bins of a call, T tokens of a bin, A scored places, K answers and V verdicts of a bin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import numpy as np

from scir_jax.data.batches import RowGroup, abstract_of, by_length
from scir_jax.data.bins import BinRows, Laid, fill
from scir_jax.data.encode import Row
from scir_jax.data.jsonl import batched
from scir_jax.data.packing import Packing, RowSize, Shape, best_fit


@dataclasses.dataclass(frozen=True)
class ReadSpec:
    """Describes a call of the scorer or the judge.

    Attributes:
      bins: B.
      tokens: T.
      scored: A.
      answers: K.
      verdicts: V.
      heads: how often the logits are taken at each scored place.
      choices: tokens among which the verdicts of all templates choose.
    """

    bins: int
    tokens: int
    scored: int = 0
    answers: int = 0
    verdicts: int = 0
    heads: int = 1
    choices: int = 2

    @property
    def shape(self) -> Shape:
        """What each bin holds, which is a cell of its own."""
        return Shape(((1, self.tokens),), self.scored, self.answers, self.verdicts)

    @property
    def readings(self) -> int:
        """The most rows of a bin."""
        return max(self.answers, self.verdicts)

    @property
    def group(self) -> RowGroup:
        """The bins as rows that go through the model together."""
        return RowGroup((self.bins,), self.tokens, self.scored, self.verdicts, self.heads, self.choices)

    def holds(self, tokens: int) -> int:
        """Returns how many rows of this length a call holds."""
        return self.bins * min(self.tokens // tokens, self.readings)

    def arrays(self, laid: Sequence[Sequence[Laid]], pad_id: int) -> BinRows:
        """Returns what lies in bins as arrays.

        Raises:
          ValueError: a bin holds more than there is room for.
        """
        packing = Packing("bins", [self.shape], bin=self.tokens)
        cells = [fill(packing, self.shape, one, (), pad_id) for one in laid]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *cells)

    def abstract(self) -> BinRows:
        """Returns the shapes of `arrays` of a whole call."""
        return abstract_of(self.arrays([()], 0), self.bins)


@dataclasses.dataclass
class Together:
    """Rows that lie together in a bin.

    Attributes:
      kind: 0: their answers are scored; 1: a verdict is read off each.
      rows: their numbers.
      start: tokens that they begin with in common, or with which a single row begins.
      tails: tokens of each behind these.
    """

    kind: int
    rows: list[int]
    start: int
    tails: list[int]

    @property
    def tokens(self) -> int:
        """Of all of them, those in common once."""
        return self.start + sum(self.tails)

    @property
    def size(self) -> RowSize:
        number = len(self.rows)
        scored = sum(self.tails) if self.kind == 0 else 0
        return RowSize(self.kind, self.tokens, scored, number * (not self.kind), number * self.kind, number)

    def laid(self, row: Callable[[int], Row]) -> Laid:
        """Lays the rows.

        Args:
          row: number -> the row.
        """
        return Laid.of(self.kind, [row(number) for number in self.rows])


def together(
    kind: int, rows: Sequence[tuple[Hashable, int, int]], spec: ReadSpec, *, share: bool = True
) -> list[Together]:
    """Puts rows that begin alike together, in order, as many as a bin holds.

    Args:
      kind: of Together.
      rows: what tells beginnings apart, the beginning's tokens and all tokens of each.
      spec: of the bins.
      share: False: every row lies alone.
    """
    found: list[Together] = []
    current: dict[Hashable, Together] = {}
    for number, (key, start, tokens) in enumerate(rows):
        one = current.get(key) if share else None
        if one and one.tokens + tokens - start <= spec.tokens and len(one.rows) < spec.readings:
            one.rows.append(number)
            one.tails.append(tokens - start)
        else:
            found.append(Together(kind, [number], start, [tokens - start]))
            current[key] = found[-1]
    return found


def calls(
    specs: Sequence[ReadSpec], rows: Sequence[Together], *, segmented: bool
) -> Iterator[tuple[ReadSpec, list[list[Together]]]]:
    """Yields the calls that rows need, each with what lies in its bins; the last bins of a call may be left empty.

    Args:
      specs: from the smallest call to the largest, of bins of one length where they are `segmented`.
      segmented: several rows may lie in a bin. Otherwise each has the shortest that holds it.
    """
    if not segmented:
        fitting = by_length([(one.tokens,) for one in rows], [(spec.tokens,) for spec in specs])
        for spec, numbers in zip(specs, fitting, strict=True):
            for part in batched(numbers, spec.bins):
                yield spec, [[rows[number]] for number in part]
        return
    largest = specs[-1]
    places = best_fit([one.tokens for one in rows], largest.tokens, [len(one.rows) for one in rows], largest.readings)
    bins: list[list[Together]] = [[] for _ in range(max((bin for bin, _ in places), default=-1) + 1)]
    for one, (bin, _) in zip(rows, places, strict=True):
        bins[bin].append(one)
    while bins:
        spec = next((spec for spec in reversed(specs) if spec.bins <= len(bins)), specs[0])
        yield spec, bins[: spec.bins]
        bins = bins[spec.bins :]
