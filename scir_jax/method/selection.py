"""Selection: how much each pair counts in the preference loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.config.schema import SelectionConfig
from scir_jax.method import consistency
from scir_jax.method.rewards import REWARDS, Evidence, single_verdicts

Array = jax.Array


class Rule(NamedTuple):
    """An entry of SELECTION.

    Attributes:
      weight: (logits [P, R] of the reward models, evidence, settings) -> [P] float32 from 0 to 1, without gradient.
      rewards: it looks at the logits, which must then be computed in every step; else it is given None.
      verdicts: it looks at `Evidence.verdicts`.
      reads: names in `Evidence.fresh` that it looks at.
      drawn: pairs are drawn before training, see `draw`.
    """

    weight: Callable[[Array | None, Evidence, SelectionConfig], Array]
    rewards: bool = False
    verdicts: bool = False
    reads: tuple[str, ...] = ()
    drawn: bool = False


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


def certainty(verdicts_PS: Array, power: float) -> Array:
    """Returns the weight (1 - uncertainty)^power of each pair, [P] from 0 to 1."""
    return jnp.clip(1 - uncertainty(verdicts_PS), 0, 1) ** power


def both_orders(logits_PR: Array, verdicts_PG22: Array, confidence: float = 0.0) -> Array:
    """Checks where all reward models agree, and the judge names the same answer in each order of each template.

    Returns:
      [P] bool.
    """
    return agreed(logits_PR, confidence) & agreed(single_verdicts(verdicts_PG22))


def draw(verdicts: np.ndarray, labels: np.ndarray, power: float, rng: np.random.Generator) -> np.ndarray:
    """Draws pairs, each with the probability (1 - B)^power over the sum of all, B the judge's uncertainty.

    A pair without a label, or whose label more than half of the judge's predictions contradict, is never drawn. There
    are as many draws as other pairs, each from all of them. Source: UPO, arXiv 2409.11212.

    Args:
      verdicts: [P, S] logits of the predictions that the first answer is better.
      labels: [P] probability that the first answer is better.

    Returns:
      [P] how often each pair was drawn, int.
    """
    side = np.sign(labels - 0.5)
    contradicted = (np.sign(verdicts) == -side[:, None]).sum(axis=1) > verdicts.shape[1] / 2
    kept = (side != 0) & ~contradicted
    weights = np.where(kept, np.asarray(certainty(jnp.asarray(verdicts, jnp.float32), power), np.float64), 0)
    total = weights.sum()
    return rng.multinomial(int(kept.sum()), weights / total) if total > 0 else np.zeros(len(labels), int)


SELECTION = {
    "agreement": Rule(
        lambda logits, _, settings: agreed(logits, settings.confidence).astype(jnp.float32), rewards=True
    ),
    "both_orders": Rule(
        lambda logits, evidence, settings: both_orders(logits, evidence.fresh["verdicts"], settings.confidence).astype(
            jnp.float32
        ),
        rewards=True,
        reads=REWARDS["generative"].reads,
    ),
    "certainty": Rule(lambda _, evidence, settings: certainty(evidence.verdicts, settings.power), verdicts=True),
    # What a pair counts is how often it was drawn, the weight that it comes with.
    "sampled": Rule(lambda _, evidence, settings: jnp.ones_like(evidence.weight), verdicts=True, drawn=True),
    "all": Rule(lambda logits, evidence, settings: jnp.ones_like(evidence.weight)),
}
"""The selections by name."""
