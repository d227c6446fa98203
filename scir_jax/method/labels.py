"""Labels: who says which answer of a pair is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.config.schema import Config
from scir_jax.method.rewards import REWARDS, consensus

Array = jax.Array


class Label(NamedTuple):
    """An entry of LABELS.

    Attributes:
      logit: (logits by reward model [P, C], config) -> [P]; None where the pairs' own labels are taken.
      rewards: config -> the reward models that are asked.
    """

    logit: Callable[[dict[str, Array], Config], Array] | None = None
    rewards: Callable[[Config], tuple[str, ...]] = lambda config: ()


def _all(config: Config) -> tuple[str, ...]:
    return tuple(config.rewards.models)


def _alone(name: str) -> Label:
    return Label(lambda logits, _: logits[name].mean(axis=1), lambda _: (name,))


LABELS = {
    # Where all columns are on one side their mean is too.
    "agreement": Label(lambda logits, _: jnp.concatenate(list(logits.values()), axis=1).mean(axis=1), _all),
    **{name: _alone(name) for name in REWARDS},
    "consensus": Label(lambda logits, config: consensus(logits, config.rewards.weights), _all),
    "external": Label(),
    "cream": Label(),
    "dice": Label(),
}
"""The labels by name."""


def probability(logits_P: Array, *, soft: bool) -> Array:
    """Returns the probability that the first answer is better, [P]: sigmoid(logits), or 1, 1/2 or 0; no gradient."""
    logits_P = jax.lax.stop_gradient(logits_P)
    return jax.nn.sigmoid(logits_P) if soft else 0.5 * (1 + jnp.sign(logits_P))
