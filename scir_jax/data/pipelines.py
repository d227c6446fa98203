"""Grain pipelines: what a training step takes at place i. Access is random, so that a position is one number.

Each of several hosts makes only its own rows of a batch: `share` maps a batch's size to the numbers of these rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grain
import numpy as np

from scir_jax.data.batches import Share, TrainSpec
from scir_jax.data.encode import Encoder, Marked
from scir_jax.data.pairs import Pair


def supervised_batches(
    spec: TrainSpec,
    encoder: Encoder,
    rows: Mapping[str, Sequence[Marked]],
    *,
    steps: int,
    seeds: Mapping[str, int],
    share: Share = np.arange,
) -> grain.MapDataset:
    """Makes `steps` batches of supervised rows.

    Args:
      rows: rows by name, those of `spec.targets` at least.
      seeds: seed of the shuffling of each name's rows.
    """
    parts = _shuffled(spec, rows, seeds)
    return grain.MapDataset.range(steps).map(
        lambda number: spec.arrays((), _taken(spec, rows, parts, number), encoder, share)
    )


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
) -> grain.MapDataset:
    """Makes batches of pairs beside replayed rows: every pair once in each epoch, the last batch filled with padding.

    Args:
      seed: of the shuffling of the pairs, which is another one in each epoch.
      rows, seeds: as in `supervised_batches`.

    Raises:
      InputError: a pair lacks a value that the batches hold.
    """
    for pair in pairs:
        spec.pairs.known(pair)
    parts = _shuffled(spec, rows, seeds)
    order = grain.MapDataset.source(np.arange(len(pairs))).seed(seed).shuffle().repeat(epochs)
    size = spec.pairs.pairs

    def batch(number: int):
        places = range(number * size, (number + 1) * size)
        taken = [int(order[place]) if place < len(order) else None for place in places]
        numbered = [None if i is None else (i, pairs[i]) for i in taken]
        return spec.arrays(numbered, _taken(spec, rows, parts, number), encoder, share)

    return grain.MapDataset.range(-(-len(order) // size)).map(batch)


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


def _shuffled(spec: TrainSpec, rows: Mapping[str, Sequence], seeds: Mapping[str, int]) -> dict[str, grain.MapDataset]:
    """Returns endless orders of each name's rows, shuffled anew in each pass."""
    return {
        name: grain.MapDataset.source(np.arange(len(rows[name]))).seed(seeds[name]).shuffle().repeat()
        for name, _ in spec.targets
    }


def _taken(spec: TrainSpec, rows: Mapping[str, Sequence[Marked]], parts: dict[str, grain.MapDataset], number: int):
    return {
        name: [rows[name][int(parts[name][place])] for place in range(number * group.rows, (number + 1) * group.rows)]
        for name, group in spec.targets
    }
