"""From rows to log-probabilities and verdicts: the one forward pass that training, scoring and judging share.

Shapes: P pairs, M = 2P rows, T tokens, R response tokens, D width, G templates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.data.rows import PairBatch, Rows, Targets, TrainBatch
from scir_jax.method.objective import Pairs
from scir_jax.model.decoder import Model, Params
from scir_jax.model.logprobs import token_logprobs, verdict_logits, verdict_mass

Array = jax.Array


class Judged(NamedTuple):
    """verdicts [P, G, 2, 2] float32 logits of (A, B); mass [P, G, 2] P(A) + P(B)."""

    verdicts: Array
    mass: Array


def response_logps(model: Model, params: Params, rows: Rows, response_tokens: int) -> Array:
    """log pi(y|x) of each row's scored span, summed over its tokens in float32; rows' leading shape.

    The head is applied at response positions only: `response_tokens` bounds every span.
    """
    flat = _flat(rows)
    logps = _span_logps(model, params, model.hidden(params, flat.ids), flat, response_tokens)
    return logps.reshape(rows.start.shape)


def judge_verdicts(
    model: Model, params: Params, judges: tuple[Rows, ...], verdict_ids: tuple[tuple[int, int], ...]
) -> Judged:
    """Verdicts of judge rows [P, 2, T], one element of `judges` a template."""
    flat = [_flat(rows) for rows in judges]
    hidden = model.hidden_of(params, [rows.ids for rows in flat])
    read = [_verdict(model, params, *one) for one in zip(hidden, flat, verdict_ids, strict=True)]
    return _stack(read, judges[0].start.shape[0])


class Outputs(NamedTuple):
    """Of a training batch: log-probabilities [P, 2] and verdicts of its pairs (None without pairs), and the sums of its
    supervised parts by name, (negative log-likelihood in nats, number of tokens), float32 scalars."""

    logps: Array | None
    judged: Judged | None
    sft: dict[str, tuple[Array, Array]]


def outputs(
    model: Model,
    params: Params,
    batch: TrainBatch,
    *,
    verdict_ids: tuple[tuple[int, int], ...],
    continued: bool,
    response_tokens: int,
    key: Array | None = None,
) -> Outputs:
    """Everything that a training step computes with the model, in one pass over its layers.

    Args:
      key: of the adapters' dropout.
    """
    supervised = {name: part for name, part in (("ift", batch.ift), ("eft", batch.eft)) if part is not None}
    pairs = [] if batch.pairs is None else [_flat(rows) for rows in (batch.pairs.responses, *batch.pairs.judges)]
    ids = [rows.ids for rows in pairs] + [targets.ids for targets in supervised.values()]
    hidden = model.hidden_of(params, ids, key)
    sft = {
        name: _sft_sums(model, params, hidden_BTD, targets)
        for hidden_BTD, (name, targets) in zip(hidden[len(pairs) :], supervised.items(), strict=True)
    }
    if batch.pairs is None:
        return Outputs(None, None, sft)
    logps = _span_logps(model, params, hidden[0], pairs[0], response_tokens)
    # A template that continues the conversation is read in the response rows.
    asked = pairs if continued else pairs[1:]
    read = [
        _verdict(model, params, *one)
        for one in zip(hidden[len(pairs) - len(asked) : len(pairs)], asked, verdict_ids, strict=True)
    ]
    count = batch.pairs.responses.start.shape[0]
    return Outputs(logps.reshape(count, 2), _stack(read, count), sft)


def objective_inputs(batch: PairBatch, logps: Array, judged: Judged) -> Pairs:
    """The freshly computed and the cached quantities of a batch, as the method takes them."""
    return Pairs(
        logps=logps,
        verdicts=judged.verdicts,
        verdict_mass=judged.mass,
        lengths=batch.responses.length,
        preference_logps=batch.preference_logps,
        implicit_logps=batch.implicit_logps,
        start_logps=batch.start_logps,
        length_penalty=batch.length_penalty,
        frozen_logits=batch.frozen_logits,
        external=batch.external,
        weight=batch.weight,
    )


def _sft_sums(model: Model, params: Params, hidden_BTD: Array, targets: Targets) -> tuple[Array, Array]:
    # The next token at every place; at the last, which has none, nothing is marked.
    logps = token_logprobs(hidden_BTD, model.head(params), jnp.roll(targets.ids, -1, axis=1), **_head(model))
    marked = jnp.roll(targets.mask, -1, axis=1).at[:, -1].set(0) > 0
    return -jnp.where(marked, logps, 0).sum(), marked.sum().astype(jnp.float32)


def _flat(rows: Rows) -> Rows:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[rows.start.ndim :]), rows)


def _span_logps(model: Model, params: Params, hidden_MTD: Array, rows: Rows, response_tokens: int) -> Array:
    offsets_R = jnp.arange(response_tokens)
    places_MR = jnp.minimum(rows.start[:, None] + offsets_R, rows.ids.shape[1] - 1)
    scored_MR = offsets_R < rows.length[:, None]
    targets_MR = jnp.take_along_axis(rows.ids, places_MR, axis=1)
    # A token is predicted by the hidden state before it.
    before_MRD = jnp.take_along_axis(hidden_MTD, jnp.maximum(places_MR - 1, 0)[..., None], axis=1)
    logps_MR = token_logprobs(before_MRD, model.head(params), targets_MR, **_head(model))
    return jnp.where(scored_MR, logps_MR, 0).sum(axis=1)


def _verdict(
    model: Model, params: Params, hidden_MTD: Array, rows: Rows, verdict_ids: tuple[int, int]
) -> tuple[Array, Array]:
    at_MD = jnp.take_along_axis(hidden_MTD, rows.verdict[:, None, None], axis=1)[:, 0]
    ids = jnp.asarray(verdict_ids, jnp.int32)
    head = model.head(params)
    return verdict_logits(at_MD, head, ids, cap=model.arch.final_cap), verdict_mass(at_MD, head, ids, **_head(model))


def _head(model: Model) -> dict[str, Any]:
    return {"cap": model.arch.final_cap, "layout": model.layout}


def _stack(read: list[tuple[Array, Array]], pairs: int) -> Judged:
    return Judged(
        verdicts=jnp.stack([logits.reshape(pairs, 2, 2) for logits, _ in read], axis=1),
        mass=jnp.stack([mass.reshape(pairs, 2) for _, mass in read], axis=1),
    )
