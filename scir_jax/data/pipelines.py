"""Grain pipelines: what a training step takes at place i. Access is random, so that a position is one number.

Each of several hosts makes only its own rows of a batch: `share` maps a batch's size to the numbers of these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from scir_jax.data.batches import Share
from scir_jax.data.bins import Laid
from scir_jax.data.encode import Encoder, Marked
from scir_jax.data.packing import SPARE, Dealt, Item, Packing, RowSize, Shape, deal
from scir_jax.data.pairs import Pair
from scir_jax.data.steps import TrainBatch, TrainSpec
from scir_jax.errors import InputError


class Way(NamedTuple):
    """How rows are packed.

    Attributes:
      kind: of a scir_jax.data.packing.Packing.
      bin: the most tokens of a bin.
      share: rows of a pair that begin alike lie together: "never", "always", or "auto", where it makes steps shorter.
    """

    kind: str = "off"
    bin: int = 0
    share: str = "never"

    @property
    def segmented(self) -> bool:
        """Whether several rows share a bin."""
        return self.kind == "bins"


class Batches(NamedTuple):
    """The batches of a stage.

    Attributes:
      dataset: what each step takes, a scir_jax.data.steps.TrainBatch.
      shapes: compiled shapes of its steps.
      tokens: number of a step -> the tokens of its rows by part, over all devices: "policy", prompts with their answers;
        "judge", the judge's questions about the pairs; and each supervised part by its name.
    """

    dataset: grain.MapDataset
    shapes: tuple[Shape, ...]
    tokens: Callable[[int], dict[str, int]]


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
    shuffled = {}
    for name, group in spec.targets:
        order = grain.MapDataset.source(np.arange(len(rows[name]))).seed(seeds[name]).shuffle().repeat()
        shuffled[name] = [int(order[place]) for place in range(steps * group.rows)]
    row_items = {name: [(spec.laid(name, row).size,) for row in rows[name]] for name, _ in spec.targets}
    check_bins(
        way,
        (
            (len(row.ids), pair.prompt.where)
            for index, pair in enumerate(pairs)
            for group in spec.pairs.rows(pair, encoder, index)
            for row in group
        ),
    )
    check_bins(way, ((len(row.ids), row.where) for name, _ in spec.targets for row in rows[name]))

    def beside_pairs(number: int) -> list[tuple[str, int]]:
        return [
            (name, shuffled[name][place])
            for name, group in spec.targets
            for place in range(number * group.rows, (number + 1) * group.rows)
        ]

    def planned(most: int) -> _Plan:
        """Lays the stage out, where rows of up to `most` tokens share their beginning."""
        pair_items: list[Item] = []
        pair_tokens = []
        for index, pair in enumerate(pairs):
            both = spec.pairs.laid(pair, encoder, most, index)
            pair_items.append(tuple(one.size for one in both))
            policy = sum(one.policy for one in both)
            pair_tokens.append({"policy": policy, "judge": sum(one.size.tokens for one in both) - policy})

        def step(number: int) -> _Step:
            mine, beside = taken(number), beside_pairs(number)
            items = [() if i is None else pair_items[i] for i in mine] + [row_items[name][i] for name, i in beside]
            dealt = spec.own(items) if way.kind == "off" else deal(items, len(mine), spec.devices, spec.micro)
            return _Step(mine, beside, items, dealt, [[items[i][r] for i, r in cell] for cell in dealt.cells])

        sizes = [step(number).sizes for number in range(steps)]
        packing = Packing.of(way.kind, sizes, spec.bound, way.bin)
        return _Plan(most, packing, step, pair_tokens, sum(packing.shape(cells).tokens for cells in sizes))

    plan = planned(0)
    if pairs and way.share != "never":
        shorter = planned(way.bin)
        if way.share == "always" or shorter.places < (1 - SPARE) * plan.places:
            plan = shorter
    most, packing = plan.most, plan.packing

    def batch(number: int) -> TrainBatch:
        mine, beside, items, dealt, sizes = plan.step(number)

        def laid(item: int) -> Sequence[Laid]:
            if item < len(mine):
                return spec.pairs.laid(pairs[mine[item]], encoder, most, mine[item])
            name, i = beside[item - len(mine)]
            return [spec.laid(name, rows[name][i])]

        numbered = [None if i is None else (i, pairs[i]) for i in mine]
        return spec.batch(packing, packing.shape(sizes), dealt, items, laid, numbered, encoder.chat.pad_id, share)

    def tokens(number: int) -> dict[str, int]:
        found = dict.fromkeys((*(("policy", "judge") if spec.pairs else ()), *(name for name, _ in spec.targets)), 0)
        for part in [plan.pair_tokens[i] for i in taken(number) if i is not None]:
            for name, count in part.items():
                found[name] += count
        for name, i in beside_pairs(number):
            found[name] += len(rows[name][i].ids)
        return found

    return Batches(grain.MapDataset.range(steps).map(batch), packing.shapes, tokens)


class _Plan(NamedTuple):
    """How a stage is laid out.

    Attributes:
      most: rows of up to so many tokens share their beginning.
      packing: its shapes.
      step: number of a step -> what lies where.
      pair_tokens: of each pair's rows by part, see `Batches.tokens`.
      places: token places of all steps.
    """

    most: int
    packing: Packing
    step: Callable[[int], _Step]
    pair_tokens: list[dict[str, int]]
    places: int


class _Step(NamedTuple):
    """Numbers of a step's pairs, and of its supervised rows; their sizes; what lies where; the sizes in each cell."""

    pairs: list[int | None]
    supervised: list[tuple[str, int]]
    items: list[Item]
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
