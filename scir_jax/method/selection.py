"""Selection: how much each pair counts in the preference loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.config.schema import SelectionConfig
from scir_jax.method import consistency
from scir_jax.method.rewards import Evidence

Array = jax.Array


class Rule(NamedTuple):
    """An entry of SELECTION.

    Attributes:
      weight: (logits [P, R] of the reward models, evidence, settings) -> [P] float32 from 0 to 1, without gradient.
      rewards: it looks at the logits, which must then be computed in every step; else it is given None.
      verdicts: it looks at `Evidence.verdicts`.
    """

    weight: Callable[[Array | None, Evidence, SelectionConfig], Array]
    rewards: bool = False
    verdicts: bool = False


def agreed(logits_PR: Array, confidence: float = 0.0) -> Array:
    """Checks where all p_r are on the same side of 1/2, each further than `confidence` from it.

    Returns:
      [P] bool.
    """
    p = jax.nn.sigmoid(logits_PR)
    # The side is the logit's sign: a small logit's probability rounds to 1/2.
    far = jnp.abs(p - 0.5) > confidence if confidence > 0 else True
    return jnp.all((logits_PR > 0) & far, axis=1) | jnp.all((logits_PR < 0) & far, axis=1)


def uncertainty(verdicts_PS: Array) -> Array:
    """Computes the judge's uncertainty about each pair from S of its predictions: H(mean p) - mean H(p), [P] in bits.

    It is 0 where all predictions are the same, however unsure, and 1 where they are certain of opposite sides. Source:
    UPO, arXiv 2409.11212, eq. for B (BALD).

    Args:
      verdicts_PS: logits of the predictions that the first answer is better, float32.
    """
    mean_P = jax.nn.sigmoid(verdicts_PS).mean(axis=1)
    entropy = -(jax.scipy.special.xlogy(mean_P, mean_P) + jax.scipy.special.xlogy(1 - mean_P, 1 - mean_P))
    return (entropy - consistency.entropy(verdicts_PS).mean(axis=1)) / jnp.log(2)


def certainty(evidence: Evidence, power: float) -> Array:
    """Returns the weight (1 - uncertainty)^power of each pair, [P] from 0 to 1."""
    return jnp.clip(1 - uncertainty(evidence.verdicts), 0, 1) ** power


SELECTION = {
    "agreement": Rule(
        lambda logits, _, settings: agreed(logits, settings.confidence).astype(jnp.float32), rewards=True
    ),
    "certainty": Rule(lambda _, evidence, settings: certainty(evidence, settings.power), verdicts=True),
    "all": Rule(lambda logits, evidence, settings: jnp.ones_like(evidence.weight)),
}
"""The selections by name."""
