"""From rows to log-probabilities and verdicts: the one forward pass that training, scoring and judging share.

Shapes: P pairs, M = 2P rows, T tokens, R response tokens, D width, G templates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.data.rows import PairBatch, Rows, Targets
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
    hidden, flat = _hidden(model, params, rows)
    return _span_logps(model, params, hidden, flat, response_tokens).reshape(rows.start.shape)


def judge_verdicts(
    model: Model, params: Params, judges: tuple[Rows, ...], verdict_ids: tuple[tuple[int, int], ...]
) -> Judged:
    """Verdicts of judge rows [P, 2, T], one element of `judges` a template."""
    read = []
    for rows, ids in zip(judges, verdict_ids, strict=True):
        hidden, flat = _hidden(model, params, rows)
        read.append(_verdict(model, params, hidden, flat, ids))
    return _stack(read, judges[0].start.shape[0])


def pair_outputs(
    model: Model,
    params: Params,
    batch: PairBatch,
    *,
    verdict_ids: tuple[tuple[int, int], ...],
    continued: bool,
    response_tokens: int,
    key: Array | None = None,
) -> tuple[Array, Judged]:
    """Log-probabilities [P, 2] and verdicts of a batch of pairs. `key`: of the adapters' dropout."""
    keys = [None] * (1 + len(batch.judges)) if key is None else jax.random.split(key, 1 + len(batch.judges))
    hidden, flat = _hidden(model, params, batch.responses, keys[0])
    logps = _span_logps(model, params, hidden, flat, response_tokens)
    read = []
    remaining = verdict_ids
    if continued:
        read.append(_verdict(model, params, hidden, flat, verdict_ids[0]))
        remaining = verdict_ids[1:]
    for rows, ids, rows_key in zip(batch.judges, remaining, keys[1:], strict=True):
        hidden, flat = _hidden(model, params, rows, rows_key)
        read.append(_verdict(model, params, hidden, flat, ids))
    pairs = batch.responses.start.shape[0]
    return logps.reshape(pairs, 2), _stack(read, pairs)


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


def sft_sums(model: Model, params: Params, targets: Targets, key: Array | None = None) -> tuple[Array, Array]:
    """Negative log-likelihood of the marked tokens: (sum in nats, number of tokens), float32 scalars."""
    hidden = model.hidden(params, targets.ids, key)
    logps = token_logprobs(hidden[:, :-1], model.head(params), targets.ids[:, 1:], cap=model.arch.final_cap)
    marked = targets.mask[:, 1:] > 0
    return -jnp.where(marked, logps, 0).sum(), marked.sum().astype(jnp.float32)


def _hidden(model: Model, params: Params, rows: Rows, key: Array | None = None) -> tuple[Array, Rows]:
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[rows.start.ndim :]), rows)
    return model.hidden(params, flat.ids, key), flat


def _span_logps(model: Model, params: Params, hidden_MTD: Array, rows: Rows, response_tokens: int) -> Array:
    offsets_R = jnp.arange(response_tokens)
    places_MR = jnp.minimum(rows.start[:, None] + offsets_R, rows.ids.shape[1] - 1)
    scored_MR = offsets_R < rows.length[:, None]
    targets_MR = jnp.take_along_axis(rows.ids, places_MR, axis=1)
    # A token is predicted by the hidden state before it.
    before_MRD = jnp.take_along_axis(hidden_MTD, jnp.maximum(places_MR - 1, 0)[..., None], axis=1)
    logps_MR = token_logprobs(before_MRD, model.head(params), targets_MR, cap=model.arch.final_cap)
    return jnp.where(scored_MR, logps_MR, 0).sum(axis=1)


def _verdict(
    model: Model, params: Params, hidden_MTD: Array, rows: Rows, verdict_ids: tuple[int, int]
) -> tuple[Array, Array]:
    at_MD = jnp.take_along_axis(hidden_MTD, rows.verdict[:, None, None], axis=1)[:, 0]
    ids = jnp.asarray(verdict_ids, jnp.int32)
    head, cap = model.head(params), model.arch.final_cap
    return verdict_logits(at_MD, head, ids, cap=cap), verdict_mass(at_MD, head, ids, cap=cap)


def _stack(read: list[tuple[Array, Array]], pairs: int) -> Judged:
    return Judged(
        verdicts=jnp.stack([logits.reshape(pairs, 2, 2) for logits, _ in read], axis=1),
        mass=jnp.stack([mass.reshape(pairs, 2) for _, mass in read], axis=1),
    )
