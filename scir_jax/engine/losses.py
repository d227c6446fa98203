"""The losses that a trainer is given: sums and counts of a (micro-)batch, and the loss of the whole batch's sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.config.schema import Config
from scir_jax.data.steps import TrainBatch, TrainSpec
from scir_jax.engine import forward
from scir_jax.method import objective
from scir_jax.method.objective import Sums
from scir_jax.model.decoder import Model, Params

Array = jax.Array


class Loss(NamedTuple):
    """A loss in two steps, so that micro-batches cannot change it.

    Attributes:
      sums: (all parameters, batch, key of the dropout or None) -> (name -> (sum, count), decisions of each pair).
      total: the sums of the global batch -> scalar float32.
      heads: how often the vocabulary's logits are taken at an answer's token.
      counts: batch -> name -> count, where no count depends on the parameters and the loss is the sum of sum / count;
        the gradient of a micro-batch then waits for no other. None: they do.
    """

    sums: Callable[[Params, TrainBatch, Array | None], tuple[Sums, dict[str, Array]]]
    total: Callable[[Sums], Array]
    heads: int = 1
    counts: Callable[[TrainBatch], dict[str, Array]] | None = None


def supervised(model: Model, *, segmented: bool = False) -> Loss:
    """Makes the loss of SFT: the mean negative log-likelihood per token of each supervised part, summed.

    Args:
      segmented: a bin of a batch may hold several rows.
    """

    def sums(params: Params, batch: TrainBatch, key: Array | None) -> tuple[Sums, dict[str, Array]]:
        return _terms(forward.outputs(model, params, batch, segmented=segmented, key=key).sft), {}

    def total(found: Sums) -> Array:
        return sum(objective.divide(*pair) for pair in found.values())  # type: ignore[return-value]

    def counts(batch: TrainBatch) -> dict[str, Array]:
        return {f"sft/{name}": marked.sum().astype(jnp.float32) for name, marked in batch.rows.learned.items()}

    return Loss(sums, total, counts=counts)


def scir(
    model: Model,
    config: Config,
    spec: TrainSpec,
    verdict_ids: Sequence[Sequence[int]],
    *,
    segmented: bool = False,
) -> Loss:
    """Makes the loss of SCIR training, see scir_jax.method.objective.

    Args:
      spec: describes the batches.
      segmented: a bin of a batch may hold several rows.
      verdict_ids: ids of the two verdicts of every judge template.
    """
    wanted = objective.needs(config)
    settings: dict[str, Any] = dict(
        segmented=segmented,
        verdict_ids=tuple(verdict_ids) if wanted.asks_judge else (),
        answer_tokens=spec.pairs.answers.scored,
        wanted=tuple(name for name in wanted.fresh if name in forward.SPANS),
    )

    def sums(params: Params, batch: TrainBatch, key: Array | None) -> tuple[Sums, dict[str, Array]]:
        found = forward.outputs(model, params, batch, **settings, key=key)
        terms, decisions = objective.objective(forward.evidence(batch.pairs, found.fresh), config)
        return terms | _terms(found.sft), decisions | {"pair": batch.pairs.index, "place": batch.pairs.place}

    return Loss(sums, lambda found: objective.total(found, config, sft_terms(found)), len(settings["wanted"]))


def sft_terms(sums: Sums) -> tuple[str, ...]:
    """Returns the names of the supervised parts among the sums."""
    return tuple(name for name in sums if name.startswith("sft/"))


def _terms(sft: dict[str, tuple[Array, Array]]) -> Sums:
    return {f"sft/{name}": pair for name, pair in sft.items()}
