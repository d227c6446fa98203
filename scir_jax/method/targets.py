"""Targets: whom the consistency penalty compares the reward models with, where that is not each other.

A target is frozen at the start of the iteration, or given. It is a logit for each pair, and perhaps a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.config.schema import Config
from scir_jax.method.rewards import Evidence, consensus

Array = jax.Array
Frozen = dict[str, Array]
"""reward model, or a name of rewards.JUDGED -> [P, C] logits at the start of the iteration"""
CERTAIN = 16.0
"""nats; the logit of a label of 0 or 1, which has none: the probability is 1 to seven digits, and the loss is finite"""


class Target(NamedTuple):
    """An entry of TARGETS.

    Attributes:
      logits: (evidence, config) -> [P].
      frozen: config -> names in `Evidence.frozen` that it takes.
      weight: evidence -> [P] from 0 to 1, how much each pair counts in the penalty; None: all alike.
    """

    logits: Callable[[Evidence, Config], Array]
    frozen: Callable[[Config], tuple[str, ...]]
    weight: Callable[[Evidence], Array] | None = None


def _of_models(evidence: Evidence, config: Config) -> Array:
    return consensus({name: evidence.frozen[name] for name in config.rewards.models}, config.rewards.weights)


def _two_judges(frozen: Frozen) -> tuple[Array, Array]:
    return frozen["generative"].mean(axis=1), frozen["generative_before"].mean(axis=1)


def lagged(frozen: Frozen) -> Array:
    """Averages the verdict logits of M_t and M_{t-1}, [P]."""
    now_P, before_P = _two_judges(frozen)
    return (now_P + before_P) / 2


def agreement_of_judges(frozen: Frozen) -> Array:
    """Computes 1 - |p_t - p_{t-1}| of the verdicts of M_t and M_{t-1}, [P]: 1 where they say the same."""
    now_P, before_P = _two_judges(frozen)
    return 1 - jnp.abs(jax.nn.sigmoid(now_P) - jax.nn.sigmoid(before_P))


def of_labels(label_P: Array) -> Array:
    """Returns the logits of labels, the given probabilities that the first answer is better; [P], at most CERTAIN."""
    return jnp.clip(jax.scipy.special.logit(label_P), -CERTAIN, CERTAIN)


def transitive(places: Sequence[tuple[int, int]], logits: np.ndarray) -> np.ndarray:
    """Computes s_i - s_j of each pair (i, j), where s_i is the mean of answer i's logits against all others.

    The verdicts that the differences make contain no circle.

    Args:
      places: the two answers of each pair; all pairs of a prompt's answers are among them.
      logits: [P] that the first answer is better.

    Returns:
      [P] float64.
    """
    pairs = np.asarray(places, int).reshape(-1, 2)
    size = pairs.max(initial=-1) + 1
    total, count = np.zeros(size), np.zeros(size)
    for side, sign in ((0, 1), (1, -1)):
        np.add.at(total, pairs[:, side], sign * np.asarray(logits, np.float64))
        np.add.at(count, pairs[:, side], 1)
    scores = total / np.maximum(count, 1)
    return scores[pairs[:, 0]] - scores[pairs[:, 1]]


TARGETS: dict[str, Target | None] = {
    "mutual": None,
    "consensus": Target(_of_models, lambda config: tuple(config.rewards.models)),
    "lagged": Target(
        lambda evidence, _: lagged(evidence.frozen),
        lambda _: ("generative", "generative_before"),
        lambda evidence: agreement_of_judges(evidence.frozen),
    ),
    "transitive": Target(lambda evidence, _: evidence.frozen["transitive"][:, 0], lambda _: ("transitive",)),
    # A label of 1/2 says nothing, or that nothing is known.
    "labels": Target(
        lambda evidence, _: of_labels(evidence.label),
        lambda _: (),
        lambda evidence: (evidence.label != 0.5).astype(jnp.float32),
    ),
}
"""The targets by name; None: the reward models are compared with each other."""
