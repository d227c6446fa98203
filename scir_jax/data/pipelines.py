"""Grain pipelines: what a training step takes at place i. Access is random, so that a position is one number.

Each of several hosts makes only its own rows of a batch: `share` maps a batch's size to the numbers of these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from scir_jax.data.batches import Share
from scir_jax.data.encode import Encoder, Marked
from scir_jax.data.packing import Dealt, Item, Packing, RowSize, Shape, deal
from scir_jax.data.pairs import Pair
from scir_jax.data.steps import TrainBatch, TrainSpec
from scir_jax.errors import InputError


class Way(NamedTuple):
    """How rows are packed: the kind of a scir_jax.data.packing.Packing, and the most tokens of a bin."""

    kind: str = "off"
    bin: int = 0

    @property
    def segmented(self) -> bool:
        """Whether several rows share a bin."""
        return self.kind == "bins"


class Batches(NamedTuple):
    """The batches of a stage.

    Attributes:
      dataset: what each step takes, a scir_jax.data.steps.TrainBatch.
      shapes: compiled shapes of its steps.
    """

    dataset: grain.MapDataset
    shapes: tuple[Shape, ...]


def supervised_batches(
    spec: TrainSpec,
    encoder: Encoder,
    rows: Mapping[str, Sequence[Marked]],
    *,
    steps: int,
    seeds: Mapping[str, int],
    share: Share = np.arange,
    way: Way = Way(),
) -> Batches:
    """Makes `steps` batches of supervised rows.

    Args:
      rows: rows by name, those of `spec.targets` at least.
      seeds: seed of the shuffling of each name's rows.

    Raises:
      InputError: a row is longer than a bin.
    """
    return _batches(spec, encoder, (), rows, lambda number: [], steps, seeds, share, way)


def pair_batches(
    spec: TrainSpec,
    encoder: Encoder,
    pairs: Sequence[Pair],
    rows: Mapping[str, Sequence[Marked]],
    *,
    epochs: int,
    seed: int,
    seeds: Mapping[str, int],
    share: Share = np.arange,
    way: Way = Way(),
) -> Batches:
    """Makes batches of pairs beside replayed rows: every pair once in each epoch, the last batch filled with padding.

    Args:
      seed: of the shuffling of the pairs, which is another one in each epoch.
      rows, seeds: as in `supervised_batches`.

    Raises:
      InputError: a pair lacks a value that the batches hold, or a row is longer than a bin.
    """
    for pair in pairs:
        spec.pairs.known(pair)
    order = grain.MapDataset.source(np.arange(len(pairs))).seed(seed).shuffle().repeat(epochs)
    size = spec.pairs.pairs

    def taken(number: int) -> list[int | None]:
        places = range(number * size, (number + 1) * size)
        return [int(order[place]) if place < len(order) else None for place in places]

    return _batches(spec, encoder, pairs, rows, taken, -(-len(order) // size), seeds, share, way)


def iterator(dataset: grain.MapDataset, state: dict | None = None):
    """Iterates over batches and prepares a few ahead.

    Args:
      state: position to go on from.

    Returns:
      An iterator whose get_state() is the position of what was taken.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    result = iter(dataset.to_iter_dataset(options))
    if state is not None:
        result.set_state(state)
    return result


def _batches(
    spec: TrainSpec,
    encoder: Encoder,
    pairs: Sequence[Pair],
    rows: Mapping[str, Sequence[Marked]],
    taken: Callable[[int], list[int | None]],
    steps: int,
    seeds: Mapping[str, int],
    share: Share,
    way: Way,
) -> Batches:
    """Lays out the batches of a stage.

    Args:
      taken: number of a step -> numbers of its pairs, None where it is not full.
    """
    shuffled = {
        name: grain.MapDataset.source(np.arange(len(rows[name]))).seed(seeds[name]).shuffle().repeat()
        for name, _ in spec.targets
    }
    pair_items = [spec.pairs.item(spec.pairs.rows(pair, encoder)) for pair in pairs]
    row_items = {name: [spec.item(name, row) for row in rows[name]] for name, _ in spec.targets}
    check_bins(way, ((row.tokens, pair.prompt.where) for pair, item in zip(pairs, pair_items) for row in item))
    check_bins(way, ((len(row.ids), row.where) for name, _ in spec.targets for row in rows[name]))

    def step(number: int) -> _Step:
        mine = taken(number)
        beside = [
            (name, int(shuffled[name][place]))
            for name, group in spec.targets
            for place in range(number * group.rows, (number + 1) * group.rows)
        ]
        items = [() if i is None else pair_items[i] for i in mine] + [row_items[name][i] for name, i in beside]
        dealt = spec.own(items) if way.kind == "off" else deal(items, len(mine), spec.devices, spec.micro)
        return _Step(mine, beside, dealt, [[items[i][r] for i, r in cell] for cell in dealt.cells])

    packing = Packing.of(way.kind, (step(number).sizes for number in range(steps)), spec.bound, way.bin)

    def batch(number: int) -> TrainBatch:
        mine, beside, dealt, sizes = step(number)
        numbered = [None if i is None else (i, pairs[i]) for i in mine]
        supervised = [(name, rows[name][i]) for name, i in beside]
        return spec.batch(packing, packing.shape(sizes), dealt, numbered, supervised, encoder, share)

    return Batches(grain.MapDataset.range(steps).map(batch), packing.shapes)


class _Step(NamedTuple):
    """Numbers of a step's pairs, and of its supervised rows; what lies where; the sizes of each cell's rows."""

    pairs: list[int | None]
    supervised: list[tuple[str, int]]
    dealt: Dealt
    sizes: list[list[RowSize]]


def check_bins(way: Way, rows: Iterable[tuple[int, str]]) -> None:
    """Checks that bins are long enough, where there are some.

    Args:
      rows: tokens of each row, and where it comes from.

    Raises:
      InputError: a row is longer than a bin.
    """
    if way.segmented:
        longest, where = max(rows, default=(0, ""))
        if longest > way.bin:
            raise InputError(
                f"{where or 'a row'}: has a row of {longest} tokens, which does not fit into a bin of text.bin_tokens "
                f"{way.bin}; set it to {longest} at least, or to 0"
            )
