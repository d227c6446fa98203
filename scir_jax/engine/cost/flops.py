"""FLOPs of a run's programs, counted from sizes: a product of [m, k] and [k, n] is 2 m k n, all else is left out.

Two figures each, over all devices. *Model* FLOPs are those that the mathematics asks for, the numerator of MFU as in
PaLM (arXiv 2204.02311, appendix B): 2 per weight and position forward and 4 backward (2 where the weight is frozen), of
attention the query-key pairs that are visible, of the head the positions that are scored; padding is included where
rows are given by a length that they are padded to (`inference`, `training`), and not in `of_step`. *Hardware* FLOPs are
those that the programs of scir_jax.engine execute: besides, what rematerialisation and micro-batches compute again,
pairs that are masked, log-probabilities' second pass over the vocabulary, the probability mass of the verdicts.

Shapes: B rows, T tokens per row, N scored positions, V vocabulary, D width, r rank of adapters.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from scir_jax.data.batches import RowGroup
from scir_jax.model import logprobs
from scir_jax.model.architecture import Architecture
from scir_jax.model.cached import BLOCK, layer_places
from scir_jax.model.lora import Lora

Flash = Callable[[int], bool]
"""Whether attention over rows of this many tokens skips masked pairs (blocks, cuDNN, splash); XLA's does not."""


def never(tokens: int) -> bool:
    """Says that attention computes all pairs, as XLA's does."""
    return False


@dataclasses.dataclass(frozen=True)
class Flops:
    """Model and hardware FLOPs over all devices; the module says what they are."""

    model: int = 0
    hardware: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.hardware + other.hardware)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.model * times, self.hardware * times)


class Work(NamedTuple):
    """What rows ask for, over all devices; numbers or scalar arrays.

    Attributes:
      tokens: of the rows.
      seen: query-key pairs that are visible, over all layers.
      learned: tokens that supervised parts learn.
      scored: tokens of answers.
      verdicts: that are read.
    """

    tokens: Any
    seen: Any
    learned: Any
    scored: Any
    verdicts: Any


def of_step(arch: Architecture, work: Work, *, lora: Lora | None = None, heads: int = 1) -> int:
    """Counts the model FLOPs of a training step over all devices.

    Args:
      heads: how often the logits are taken at an answer's token.
    """
    sides = 1 if lora else 2
    weights, adapters, attention, head = _of_work(arch, work, lora, heads)
    return (1 + sides) * (weights + head) + 3 * (adapters + attention)


def of_pass(arch: Architecture, work: Work, *, lora: Lora | None = None, heads: int = 1) -> int:
    """Counts the model FLOPs of rows that go forward only, over all devices.

    Args:
      heads: as in `of_step`.
    """
    return sum(_of_work(arch, work, lora, heads))


def rows_work(arch: Architecture, lengths: Iterable[int], *, scored: int = 0, verdicts: int = 0) -> Work:
    """Returns what rows of these lengths, in tokens, ask for.

    Args:
      scored, verdicts: of all rows together.
    """
    counts = Counter(lengths)
    tokens = sum(length * count for length, count in counts.items())
    return Work(tokens, _seen(arch, counts), 0, scored, verdicts)


def branched_work(arch: Architecture, trunk: int, branches: Iterable[int]) -> Work:
    """Returns what rows that begin alike ask for: their beginning once, and each row's own tokens behind it.

    Args:
      trunk, branches: lengths in tokens.
    """
    counts = Counter(branches)
    before, number = _seen(arch, Counter([trunk])), counts.total()
    own = sum(length * count for length, count in counts.items())
    behind = _seen(arch, Counter({trunk + length: count for length, count in counts.items()})) - number * before
    return Work(trunk + own, before + behind, 0, 0, 0)


def inference(
    arch: Architecture, passes: Iterable[RowGroup], *, lora: Lora | None = None, flash: Flash = never
) -> Flops:
    """Counts the FLOPs of forward passes: scoring, judging."""
    return sum((_forward(arch, part, lora, flash, part.rows * part.scored) for part in passes), Flops())


def training(
    arch: Architecture,
    passes: Iterable[RowGroup],
    *,
    lora: Lora | None = None,
    remat: str = "none",
    accumulate: int = 1,
    repeated: bool = True,
    flash: Flash = never,
) -> Flops:
    """Counts the FLOPs of a training step.

    Args:
      passes: rows of the global batch, which go forward and backward.
      remat: of scir_jax.model.decoder.define.
      accumulate: micro-batches of the step.
      repeated: a micro-batch goes forward again before it goes backward.
    """
    total = Flops()
    parts = [part._replace(leading=(part.leading[0] // accumulate, *part.leading[1:])) for part in passes]
    # All scored positions of a micro-batch are taken together.
    places = sum(part.rows * part.scored for part in parts)
    for part in parts:
        forward = _forward(arch, part, lora, flash, places)
        again = _rematerialised(arch, part, lora, flash, remat)
        if accumulate > 1 and repeated:
            # But for what is only measured.
            again += forward.hardware - _mass(arch, part)
        step = forward + _backward(arch, part, lora, flash, places)
        total += Flops(step.model, step.hardware + again) * accumulate
    return total


def decoding(arch: Architecture, rows: int, steps: int, seen: int, places: int, *, lora: Lora | None = None) -> Flops:
    """Counts the FLOPs of decoding so many tokens of each row.

    Args:
      seen: places of the cache that a query sees in the mean, in a layer without a window.
      places: of the cache.
    """
    a_row = 2 * arch.num_layers * (_weights(arch) + _adapters(arch, lora)) + 2 * arch.vocab_size * arch.hidden_size
    pair = 4 * arch.num_heads * arch.head_dim
    visible = sum(min(seen, layer.window or seen) for layer in arch.layers)
    # A small cache is multiplied whole; of a large one those blocks that some row sees.
    held = [layer_places(layer, places) for layer in arch.layers]
    multiplied = sum(n if n <= BLOCK else min(-(-seen // BLOCK) * BLOCK, n) for n in held)
    return Flops(a_row + pair * visible, a_row + pair * multiplied) * (rows * steps)


def decode_bytes(
    arch: Architecture,
    rows: int,
    places: int,
    itemsize: int,
    *,
    lora: Lora | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    batch_shards: int = 1,
) -> int:
    """Counts the bytes that one device reads from its memory for a decoding step, at the least.

    These are the weights once and the cache once.

    Args:
      rows, places: of the cache, over all devices: responses, and tokens of prompt and response.
      itemsize: bytes of a number of the computation's dtype.
      fsdp, tensor: of the mesh. Decoding leaves the weights where they are, split over both.
      batch_shards: devices that share the rows.
    """
    weights = arch.parameter_count() + arch.num_layers * _adapters(arch, lora)
    if not arch.tie_embeddings:
        weights -= arch.vocab_size * arch.hidden_size  # only some rows of the embedding are looked up
    cache = cache_bytes(arch, rows, places, itemsize, tensor=tensor, batch_shards=batch_shards)
    return itemsize * math.ceil(weights / (fsdp * tensor)) + cache


def cache_bytes(
    arch: Architecture, rows: int, places: int, itemsize: int, *, tensor: int = 1, batch_shards: int = 1
) -> int:
    """Counts the bytes of one device's share of the keys and values of `rows` with `places` each, windows' with fewer."""
    heads = arch.num_kv_heads // tensor if arch.num_kv_heads % tensor == 0 else arch.num_kv_heads
    held = sum(layer_places(layer, places) for layer in arch.layers)
    return 2 * math.ceil(rows / batch_shards) * held * heads * arch.head_dim * itemsize


# --- parts ---------------------------------------------------------------------------------------------------------


def _of_work(arch: Architecture, work: Work, lora: Lora | None, heads: int) -> tuple[int, int, int, int]:
    """Counts the model FLOPs of a forward pass: of the layers' weights, adapters, attention, and the head."""
    tokens, seen, learned, scored, verdicts = (int(value) for value in work)
    layer = 2 * tokens * arch.num_layers
    logits = (learned + heads * scored) * arch.vocab_size + 2 * verdicts
    attention = 4 * arch.num_heads * arch.head_dim * seen
    return layer * _weights(arch), layer * _adapters(arch, lora), attention, 2 * arch.hidden_size * logits


def _seen(arch: Architecture, lengths: Counter[int]) -> int:
    """Counts the query-key pairs of causal rows over all layers: length -> number of rows."""
    return sum(n * _visible(length, layer.window) for length, n in lengths.items() for layer in arch.layers)


def _forward(arch: Architecture, part: RowGroup, lora: Lora | None, flash: Flash, places: int) -> Flops:
    readout = _readout(arch, part)
    return (
        _layers(arch, part.rows, part.tokens, lora, flash)
        + Flops(*_head(arch, part, places))
        + Flops(readout, readout + _mass(arch, part))
    )


def _backward(arch: Architecture, part: RowGroup, lora: Lora | None, flash: Flash, places: int) -> Flops:
    positions, layers = part.rows * part.tokens, arch.num_layers
    # Gradients with respect to inputs, and to weights where they are trained.
    linears = 2 * positions * layers * (_weights(arch) * (1 if lora else 2) + 2 * _adapters(arch, lora))
    model, hardware = _attention(arch, part.rows, part.tokens, flash)
    head, chunked = _head(arch, part, places)
    readout = _readout(arch, part)
    # Without saved weights of the pairs the scores are a fifth product beside the four.
    attention = Flops(2 * model, hardware * 5 // 2 if flash(part.tokens) else 2 * hardware)
    sides = 1 if lora else 2
    return attention + Flops(linears + sides * (head + readout), linears + (sides + 1) * chunked + sides * readout)


def _rematerialised(arch: Architecture, part: RowGroup, lora: Lora | None, flash: Flash, remat: str) -> int:
    """Counts the hardware FLOPs of the blocks' recomputation."""
    _, attention = _attention(arch, part.rows, part.tokens, flash)
    if remat == "none":
        return 0
    if remat == "dots":
        # A frozen product behind attention does not need its input again; only the softmax needs its scores.
        return attention // 2 if lora and "o_proj" not in lora.targets and not flash(part.tokens) else attention
    again = _weights(arch) + _adapters(arch, lora)
    if not arch.post_norms:
        # Nothing needs the output of the last product, which is only added.
        again -= arch.intermediate_size * arch.hidden_size
        again -= lora.rank * arch.hidden_size if lora and "down_proj" in lora.targets else 0
    return attention + 2 * part.rows * part.tokens * arch.num_layers * again


def _layers(arch: Architecture, rows: int, tokens: int, lora: Lora | None, flash: Flash) -> Flops:
    linears = 2 * rows * tokens * arch.num_layers * (_weights(arch) + _adapters(arch, lora))
    return Flops(linears, linears) + Flops(*_attention(arch, rows, tokens, flash))


def _attention(arch: Architecture, rows: int, tokens: int, flash: Flash) -> tuple[int, int]:
    """Counts scores and weighted sums of all layers: model FLOPs and hardware FLOPs."""
    pair = 4 * rows * arch.num_heads * arch.head_dim
    seen = pair * sum(_visible(tokens, layer.window) for layer in arch.layers)
    return seen, seen if flash(tokens) else pair * tokens * tokens * arch.num_layers


def _visible(tokens: int, window: int | None) -> int:
    """Counts the query-key pairs of a causal row: min(t, window) summed over t = 1 .. tokens."""
    within = min(tokens, window or tokens)
    return within * (within + 1) // 2 + (tokens - within) * within


def _head(arch: Architecture, part: RowGroup, places: int) -> tuple[int, int]:
    """Counts the logits of the scored positions: model FLOPs, and hardware FLOPs, in which the last chunk overlaps.

    Args:
      places: positions whose logits are taken together.
    """
    row = 2 * part.rows * part.scored * part.heads * arch.hidden_size
    chunk = logprobs.chunk_size(places, arch.vocab_size)
    return row * arch.vocab_size, row * math.ceil(arch.vocab_size / chunk) * chunk


def _readout(arch: Architecture, part: RowGroup) -> int:
    """Counts the model FLOPs of the verdicts."""
    return 2 * part.verdicts * part.rows * arch.hidden_size * part.verdict


def _mass(arch: Architecture, part: RowGroup) -> int:
    """Counts the hardware FLOPs of the verdicts' probability mass: those of the logits of the whole vocabulary."""
    chunk = min(logprobs.VERDICT_CHUNK, arch.vocab_size)
    columns = math.ceil(arch.vocab_size / chunk) * chunk
    return 2 * part.rows * arch.hidden_size * columns * part.verdict


def _weights(arch: Architecture) -> int:
    """Counts the weights of a layer's matrices."""
    return sum(math.prod(out) * math.prod(inputs) for out, inputs in arch.linear_axes().values())


def _adapters(arch: Architecture, lora: Lora | None) -> int:
    """Counts the weights of a layer's adapters."""
    if lora is None:
        return 0
    axes = arch.linear_axes()
    return lora.rank * sum(math.prod(axes[name][0]) + math.prod(axes[name][1]) for name in lora.targets)
