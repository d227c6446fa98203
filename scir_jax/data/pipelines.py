"""Grain pipelines: what a training step takes at place i. Random access, so that a position is one number.

Of a batch, a host of several makes its own rows only: `share` maps a batch's size to the numbers of these rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from scir_jax.data.encode import Encoder, Shapes
from scir_jax.data.messages import prompt_messages
from scir_jax.data.records import external_label
from scir_jax.data.rows import (
    PairBatch,
    Targets,
    TrainBatch,
    pad,
    pad_rows,
    stack,
)
from scir_jax.errors import InputError

MarkedIds = tuple[tuple[int, ...], tuple[bool, ...]]
Share = Callable[[int], np.ndarray]


def targets_dataset(
    rows: Sequence[MarkedIds], tokens: int, batch_size: int, pad_id: int, seed: int, share: Share = np.arange
) -> grain.MapDataset | None:
    """Endless batches of supervised rows, shuffled anew each pass. None where there is nothing to take."""
    if not rows or not batch_size:
        return None

    def example(i: int) -> Targets:
        ids, marks = rows[i]
        mask = np.zeros(tokens, np.float32)
        mask[: len(marks)] = marks
        return Targets(pad(ids, tokens, pad_id), mask)

    indices = grain.MapDataset.source(np.arange(len(rows))).seed(seed).shuffle().repeat()
    mine = share(batch_size)
    batches = grain.MapDataset.range(sys.maxsize // batch_size)
    return batches.map(lambda b: stack([example(indices[b * batch_size + int(row)]) for row in mine]))


def sft_dataset(ift: grain.MapDataset | None, eft: grain.MapDataset | None, steps: int) -> grain.MapDataset:
    """`steps` batches of conversations and judge questions side by side."""
    return grain.MapDataset.source(np.arange(steps)).map(
        lambda i: TrainBatch(None, ift[i] if ift is not None else None, eft[i] if eft is not None else None)
    )


def pairs_dataset(
    rows: Sequence[tuple[str, dict]],
    encoder: Encoder,
    shapes: Shapes,
    *,
    rewards: int,
    need_label: tuple[str, ...] | None,
    batch_size: int,
    epochs: int,
    seed: int,
    ift: grain.MapDataset | None,
    eft: grain.MapDataset | None,
    share: Share = np.arange,
) -> grain.MapDataset:
    """Batches of SCIR training: every pair once an epoch, the last batch filled up with weight 0, and replay.

    Args:
      rows: (where, row) of pairs.jsonl.
      rewards: R, the number of reward models.
      need_label: the column that must hold an external label (of several the first that a row has), or None.
    """
    examples = [_pair_source(row, where, encoder, rewards, need_label) for where, row in rows]

    def example(i: int) -> PairBatch:
        prompt, a, b, values = examples[i]
        responses, judged = encoder.pair_rows(prompt, a, b)
        separate = shapes.judges[1:] if encoder.continued else shapes.judges
        return PairBatch(
            responses=pad_rows(responses, shapes.row, encoder.chat.pad_id),
            judges=tuple(pad_rows(r, t, encoder.chat.pad_id) for r, t in zip(judged, separate, strict=True)),
            index=np.int32(i),
            **values,
        )

    indices = grain.MapDataset.source(np.arange(len(rows))).seed(seed).shuffle().repeat(epochs)
    mine = share(batch_size)

    def batch(number: int) -> TrainBatch:
        first = number * batch_size
        places = [first + int(row) for row in mine]
        pairs = [example(indices[p]) if p < len(indices) else filler(example(indices[first])) for p in places]
        return TrainBatch(
            stack(pairs), ift[number] if ift is not None else None, eft[number] if eft is not None else None
        )

    return grain.MapDataset.range(-(-len(indices) // batch_size)).map(batch)


def iterator(dataset: grain.MapDataset, state: dict | None = None):
    """An iterator that prepares a few batches ahead; its get_state() is the position of what was taken."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    result = iter(dataset.to_iter_dataset(options))
    if state is not None:
        result.set_state(state)
    return result


def filler(pair: PairBatch) -> PairBatch:
    """A pair that counts for nothing."""
    return pair._replace(weight=np.zeros_like(pair.weight), index=np.full_like(pair.index, -1))


def _pair_source(row: dict, where: str, encoder: Encoder, rewards: int, need_label: tuple[str, ...] | None):
    prompt = encoder.prompt(prompt_messages(row["messages"], f"{where}: messages"))
    a, b = (encoder.sampled(row[f"response_{side}_ids"]) for side in "ab")
    label = external_label(row, need_label or ("label",), where)
    if need_label and label is None:
        raise InputError(
            f"{where}: lacks the external label {need_label[0]!r} (1 where response_a is better, 0 where response_b is)"
            "; add it to every row and run the same command again"
        )
    lengths = np.array([len(a.ids), len(b.ids)], np.float32)
    frozen = row.get("frozen_logits")
    if frozen is not None and len(frozen) != rewards:
        raise InputError(f"{where}: frozen_logits has {len(frozen)} values for {rewards} reward models")
    values = {
        f"{role}_logps": np.array(row[f"{role}_logps"], np.float32) for role in ("preference", "implicit", "start")
    }
    values["length_penalty"] = np.float32(row.get("length_penalty", 0.0)) * lengths
    values["frozen_logits"] = np.array(frozen if frozen is not None else [0.0] * rewards, np.float32)
    values["external"] = np.float32(0.5 if label is None else label)
    values["weight"] = np.float32(1.0)
    return prompt, a, b, values
