"""From rows to log-probabilities and verdicts: the one forward pass that training, scoring and judging share.

Shapes: P pairs, M rows, T tokens, R answer tokens, D width, G templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.data.batches import PairBatch, Rows, Targets, TrainBatch
from scir_jax.method.rewards import Evidence
from scir_jax.model.decoder import Model, Params
from scir_jax.model.logprobs import token_entropies, token_logprobs, verdict_logits, verdict_mass

Array = jax.Array


class Judged(NamedTuple):
    """verdicts [P, G, 2, 2] float32 logits of (A, B); mass [P, G, 2] P(A) + P(B)."""

    verdicts: Array
    mass: Array


class Outputs(NamedTuple):
    """What a training step reads off the model.

    Attributes:
      fresh: readings of the pairs, see method.rewards.Evidence; empty without pairs.
      sft: supervised part -> (negative log-likelihood in nats, number of tokens), float32 scalars.
    """

    fresh: dict[str, Array]
    sft: dict[str, tuple[Array, Array]]


def _logps(model: Model, params: Params, hidden_MRD: Array, targets_MR: Array, scored_MR: Array) -> Array:
    logps_MR = token_logprobs(hidden_MRD, model.head(params), targets_MR, **_head(model))
    return jnp.where(scored_MR, logps_MR, 0).sum(axis=1)


def _entropy(model: Model, params: Params, hidden_MRD: Array, targets_MR: Array, scored_MR: Array) -> Array:
    entropies_MR = token_entropies(hidden_MRD, model.head(params), **_head(model))
    return jnp.where(scored_MR, entropies_MR, 0).sum(axis=1) / jnp.maximum(scored_MR.sum(axis=1), 1)


SPANS = {"logps": _logps, "entropy": _entropy}
"""Readings of a row's scored span: (model, params, hidden states [M, R, D] before the tokens, the tokens [M, R] int32,
which of them are scored [M, R] bool) -> [M] float32."""


def read_spans(
    model: Model, params: Params, hidden_MTD: Array, rows: Rows, answer_tokens: int, wanted: Sequence[str]
) -> dict[str, Array]:
    """Reads values of each row's scored span.

    The head is applied at answer positions only.

    Args:
      hidden_MTD: hidden states of `rows`, whose leading axes are flattened to [M].
      answer_tokens: bound of every span.
      wanted: keys of SPANS.

    Returns:
      [M] float32 by key.
    """
    offsets_R = jnp.arange(answer_tokens)
    places_MR = jnp.minimum(rows.start[:, None] + offsets_R, rows.ids.shape[1] - 1)
    scored_MR = offsets_R < rows.length[:, None]
    targets_MR = jnp.take_along_axis(rows.ids, places_MR, axis=1)
    # A token is predicted by the hidden state before it.
    before_MRD = jnp.take_along_axis(hidden_MTD, jnp.maximum(places_MR - 1, 0)[..., None], axis=1)
    return {name: SPANS[name](model, params, before_MRD, targets_MR, scored_MR) for name in wanted}


def score(
    model: Model, params: Params, rows: Rows, answer_tokens: int, wanted: Sequence[str] = ("logps",)
) -> dict[str, Array]:
    """Computes readings of each row's scored span; "logps" is log pi(y|x) summed over tokens.

    Args:
      answer_tokens: bound of every span.
      wanted: keys of SPANS.

    Returns:
      Float32 arrays by key, in the rows' leading shape.
    """
    flat = _flat(rows)
    read = read_spans(model, params, model.hidden(params, flat.ids), flat, answer_tokens, wanted)
    return jax.tree.map(lambda x: x.reshape(rows.start.shape), read)


def judge(
    model: Model,
    params: Params,
    judges: Sequence[Rows],
    verdict_ids: Sequence[tuple[int, int]],
    key: Array | None = None,
) -> Judged:
    """Reads verdicts off judge rows.

    Args:
      judges: rows [P, 2, T] of each template.
      verdict_ids: ids of the two verdicts of each template.
      key: key of the adapters' dropout; None drops nothing.
    """
    flat = [_flat(rows) for rows in judges]
    hidden = model.hidden_of(params, [rows.ids for rows in flat], key)
    read = [_verdict(model, params, *one) for one in zip(hidden, flat, verdict_ids, strict=True)]
    return _stack(read, judges[0].start.shape[0])


def outputs(
    model: Model,
    params: Params,
    batch: TrainBatch,
    *,
    verdict_ids: Sequence[tuple[int, int]] = (),
    continued: bool = False,
    answer_tokens: int = 0,
    wanted: Sequence[str] = (),
    key: Array | None = None,
) -> Outputs:
    """Computes everything that a training step reads off the model, in one pass over its layers.

    Args:
      verdict_ids: ids of the two verdicts of each template that the batch asks.
      continued: the answers' rows carry the first template's verdict.
      answer_tokens: bound of every answer.
      wanted: keys of SPANS to read off the answers.
      key: key of the adapters' dropout; None drops nothing.
    """
    pairs = [] if batch.pairs is None else [_flat(rows) for rows in (batch.pairs.answers, *batch.pairs.judges)]
    ids = [rows.ids for rows in pairs] + [targets.ids for targets in batch.targets.values()]
    hidden = model.hidden_of(params, ids, key)
    sft = {
        name: _sft_sums(model, params, hidden_BTD, targets)
        for hidden_BTD, (name, targets) in zip(hidden[len(pairs) :], batch.targets.items(), strict=True)
    }
    if batch.pairs is None:
        return Outputs({}, sft)
    count = batch.pairs.weight.shape[0]
    spans = read_spans(model, params, hidden[0], pairs[0], answer_tokens, wanted)
    fresh = {name: values.reshape(count, 2) for name, values in spans.items()}
    first = 0 if continued else 1
    asked = list(zip(hidden[first : len(pairs)], pairs[first:], verdict_ids, strict=True)) if verdict_ids else []
    if asked:
        judged = _stack([_verdict(model, params, *one) for one in asked], count)
        fresh |= {"verdicts": judged.verdicts, "verdict_mass": judged.mass}
    return Outputs(fresh, sft)


def evidence(batch: PairBatch, fresh: dict[str, Array]) -> Evidence:
    """Puts the freshly computed and the cached quantities of a batch together, as the method takes them."""
    return Evidence(
        fresh=fresh,
        cached=batch.cached,
        frozen=batch.frozen,
        lengths=batch.answers.length,
        length_penalty=batch.length_penalty,
        verdicts=batch.verdicts,
        label=batch.label,
        weight=batch.weight,
    )


def _sft_sums(model: Model, params: Params, hidden_BTD: Array, targets: Targets) -> tuple[Array, Array]:
    # The target of every place is the next token; nothing is marked at the last place, which has none.
    logps = token_logprobs(hidden_BTD, model.head(params), jnp.roll(targets.ids, -1, axis=1), **_head(model))
    marked = jnp.roll(targets.mask, -1, axis=1).at[:, -1].set(0) > 0
    return -jnp.where(marked, logps, 0).sum(), marked.sum().astype(jnp.float32)


def _flat(rows: Rows) -> Rows:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[rows.start.ndim :]), rows)


def _verdict(
    model: Model, params: Params, hidden_MTD: Array, rows: Rows, verdict_ids: tuple[int, int]
) -> tuple[Array, Array]:
    at_MD = jnp.take_along_axis(hidden_MTD, rows.verdict[:, None, None], axis=1)[:, 0]
    ids = jnp.asarray(verdict_ids, jnp.int32)
    head = model.head(params)
    return verdict_logits(at_MD, head, ids, cap=model.arch.final_cap), verdict_mass(at_MD, head, ids, **_head(model))


def _head(model: Model) -> dict[str, Any]:
    return {"cap": model.arch.final_cap, "layout": model.layout}


def _stack(read: Sequence[tuple[Array, Array]], pairs: int) -> Judged:
    return Judged(
        verdicts=jnp.stack([logits.reshape(pairs, 2, 2) for logits, _ in read], axis=1),
        mass=jnp.stack([mass.reshape(pairs, 2) for _, mass in read], axis=1),
    )
