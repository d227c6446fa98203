"""From rows to log-probabilities and verdicts: the one forward pass that training, scoring and judging share.

Shapes: P pairs, M rows, T tokens, R answer tokens, D width, G templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.data.batches import Rows
from scir_jax.data.bins import BinRows
from scir_jax.data.steps import PairBatch, TrainBatch, turned
from scir_jax.method.rewards import Evidence
from scir_jax.model.decoder import Model, Params
from scir_jax.model.logprobs import read_verdicts, token_entropies, token_logprobs

Array = jax.Array


class Judged(NamedTuple):
    """verdicts [P, G, O, 2] float32 logits of (A, B); mass [P, G, O] P(A) + P(B); P pairs in both orders.

    O = 1 where a step asks in one order: the logits are then those of the letters of the first and the second answer.
    """

    verdicts: Array
    mass: Array


class Rated(NamedTuple):
    """points [M, K] float32 logits of the K points; mass [M] their probability under the whole vocabulary."""

    points: Array
    mass: Array


class Outputs(NamedTuple):
    """What a training step reads off the model.

    Attributes:
      fresh: readings of the pairs, see method.rewards.Evidence; empty without pairs.
      sft: supervised part -> (negative log-likelihood in nats, number of tokens), float32 scalars.
    """

    fresh: dict[str, Array]
    sft: dict[str, tuple[Array, Array]]


def _logps(model: Model, params: Params, hidden: Array, targets: Array) -> Array:
    return token_logprobs(hidden, model.head(params), targets, **_head(model))


def _entropy(model: Model, params: Params, hidden: Array, targets: Array) -> Array:
    return token_entropies(hidden, model.head(params), **_head(model))


SPANS = {"logps": (_logps, False), "entropy": (_entropy, True)}
"""Readings of an answer's tokens. What is read at each token: (model, params, hidden states [..., D] before the
tokens, the tokens [...] int32) -> [...] float32; and whether the span's is the mean of it, else it is the sum."""


def _of_span(name: str, values_MR: Array, scored_MR: Array) -> Array:
    """Puts together what was read at each token of a span."""
    total_M = jnp.where(scored_MR, values_MR, 0).sum(axis=1)
    return total_M / jnp.maximum(scored_MR.sum(axis=1), 1) if SPANS[name][1] else total_M


def read_tokens(model: Model, params: Params, x_CND: Array, rows: BinRows, wanted: Sequence[str]) -> dict[str, Array]:
    """Reads values of each scored token. The head is applied at their places only.

    Args:
      x_CND: hidden states of C cells.
      wanted: keys of SPANS.

    Returns:
      [C, A] float32 by key.
    """
    before_CAD = jnp.take_along_axis(x_CND, rows.places[..., None], axis=1)
    return {name: SPANS[name][0](model, params, before_CAD, rows.targets) for name in wanted}


def read_answers(read: dict[str, Array], rows: BinRows, answer_tokens: int) -> dict[str, Array]:
    """Puts the values of each answer's tokens together.

    Args:
      read: of `read_tokens`.
      answer_tokens: bound of every answer.

    Returns:
      [C K] float32 by key.
    """
    # The tokens of an answer lie behind one another among the scored places of its cell.
    offsets_R = jnp.arange(answer_tokens)
    at_CKR = jnp.minimum(rows.first[..., None] + offsets_R, rows.places.shape[1] - 1)
    at_CN = at_CKR.reshape(len(at_CKR), -1)
    scored_MR = (offsets_R < rows.length[..., None]).reshape(-1, answer_tokens)
    return {
        name: _of_span(name, jnp.take_along_axis(values_CA, at_CN, axis=1).reshape(scored_MR.shape), scored_MR)
        for name, values_CA in read.items()
    }


def score(
    model: Model,
    params: Params,
    rows: BinRows,
    answer_tokens: int,
    wanted: Sequence[str] = ("logps",),
    *,
    segmented: bool = False,
) -> dict[str, Array]:
    """Computes readings of answers; "logps" is log pi(y|x) summed over tokens.

    Args:
      rows: of C cells, each a bin, with K answers.
      answer_tokens: bound of every answer.
      wanted: keys of SPANS.
      segmented: a bin may hold several rows.

    Returns:
      [C, K] float32 by key.
    """
    x_CND = _cells(model, params, rows, segmented)
    read = read_answers(read_tokens(model, params, x_CND, rows, wanted), rows, answer_tokens)
    return jax.tree.map(lambda x_M: x_M.reshape(rows.first.shape), read)


def judge(
    model: Model,
    params: Params,
    rows: BinRows,
    verdict_ids: Sequence[Sequence[int]],
    key: Array | None = None,
    *,
    segmented: bool = False,
) -> Judged:
    """Reads verdicts off judge's questions.

    Args:
      rows: of C cells, each a bin, with V questions.
      verdict_ids: ids of the two verdicts of each template.
      key: key of the adapters' dropout; None drops nothing.
      segmented: a bin may hold several rows.

    Returns:
      Every question's verdict as each template's: [C, V, G, 2] and [C, V, G].
    """
    x_CND = _cells(model, params, rows, segmented, key)
    read, shape = _read_verdicts(model, params, x_CND, rows.verdict, verdict_ids), rows.verdict.shape
    return Judged(
        verdicts=jnp.stack([logits_M2.reshape(*shape, 2) for logits_M2, _ in read], axis=2),
        mass=jnp.stack([mass_M.reshape(shape) for _, mass_M in read], axis=2),
    )


def rate(model: Model, params: Params, rows: Rows, point_ids: Sequence[int]) -> Rated:
    """Reads the points of one answer each off pointwise judge rows [M, T].

    Args:
      point_ids: ids of the points' tokens.
    """
    return Rated(*_verdict(model, params, model.hidden(params, rows.ids), rows, point_ids))


def outputs(
    model: Model,
    params: Params,
    batch: TrainBatch,
    *,
    segmented: bool = False,
    verdict_ids: Sequence[Sequence[int]] = (),
    answer_tokens: int = 0,
    wanted: Sequence[str] = (),
    key: Array | None = None,
) -> Outputs:
    """Computes everything that a training step reads off the model, in one pass over its layers.

    C cells of N places each have A scored places and P/C pairs.

    Args:
      segmented: a bin may hold several rows.
      verdict_ids: ids of the two verdicts of each template that the batch asks.
      answer_tokens: bound of every answer.
      wanted: keys of SPANS to read off the answers.
      key: key of the adapters' dropout; None drops nothing.
    """
    rows, pairs = batch.rows, batch.pairs
    x_CND = _cells(model, params, rows, segmented, key)
    names = dict.fromkeys((*(("logps",) if rows.learned else ()), *wanted))
    read = read_tokens(model, params, x_CND, rows, tuple(names))
    sft = {
        name: (-jnp.where(marked_CA, read["logps"], 0).sum(), marked_CA.sum().astype(jnp.float32))
        for name, marked_CA in rows.learned.items()
    }
    if pairs is None:
        return Outputs({}, sft)

    # An answer may lie on another device than its pair.
    spans = read_answers({name: read[name] for name in wanted}, rows, answer_tokens)
    fresh = {name: values_M[pairs.answer] for name, values_M in spans.items()}
    if verdict_ids:
        judged = _verdicts(model, params, x_CND, rows.verdict, pairs, verdict_ids)
        fresh |= {"verdicts": judged.verdicts, "verdict_mass": judged.mass}
    return Outputs(fresh, sft)


def evidence(batch: PairBatch, fresh: dict[str, Array]) -> Evidence:
    """Puts the freshly computed and the cached quantities of a batch together, as the method takes them."""
    return Evidence(
        fresh=fresh,
        cached=batch.cached,
        frozen=batch.frozen,
        lengths=batch.length,
        length_penalty=batch.length_penalty,
        verdicts=batch.verdicts,
        label=batch.label,
        weight=batch.weight,
    )


def _cells(model: Model, params: Params, rows: BinRows, segmented: bool, key: Array | None = None) -> Array:
    """Computes the hidden states of cells, [C, N, D]."""
    x_PND = model.hidden_of_bins(params, rows.ids, rows.segments if segmented else None, key)
    return x_PND.reshape(rows.places.shape[0], -1, x_PND.shape[-1])


def _verdict(
    model: Model, params: Params, hidden_MTD: Array, rows: Rows, verdict_ids: Sequence[int]
) -> tuple[Array, Array]:
    at_MD = jnp.take_along_axis(hidden_MTD, rows.verdict[:, None, None], axis=1)[:, 0]
    (read,) = read_verdicts(at_MD, model.head(params), [verdict_ids], **_head(model))
    return read


def _verdicts(
    model: Model,
    params: Params,
    x_CND: Array,
    places_CV: Array,
    pairs: PairBatch,
    verdict_ids: Sequence[Sequence[int]],
) -> Judged:
    """Puts the verdicts at places of cells together, those of each pair."""
    read = _read_verdicts(model, params, x_CND, places_CV, verdict_ids)
    numbers = [pairs.verdict[:, i] for i in range(len(read))]
    verdicts = jnp.stack([logits_M2[at] for (logits_M2, _), at in zip(read, numbers)], axis=1)
    if verdicts.shape[2] == 1:
        verdicts = jnp.where(turned(pairs.index)[:, None, None, None], verdicts[..., ::-1], verdicts)
    return Judged(
        verdicts=verdicts,
        mass=jnp.stack([mass_M[at] for (_, mass_M), at in zip(read, numbers)], axis=1),
    )


def _read_verdicts(
    model: Model, params: Params, x_CND: Array, places_CV: Array, verdict_ids: Sequence[Sequence[int]]
) -> list[tuple[Array, Array]]:
    """Reads the verdicts at places of cells: of each template [C V, 2] and [C V]."""
    at_CVD = jnp.take_along_axis(x_CND, places_CV[..., None], axis=1)
    # Every place is read as every template's, which costs two columns of the head more.
    return read_verdicts(at_CVD.reshape(-1, at_CVD.shape[-1]), model.head(params), verdict_ids, **_head(model))


def _head(model: Model) -> dict[str, Any]:
    return {"cap": model.arch.final_cap, "layout": model.layout}
