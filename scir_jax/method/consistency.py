"""The consistency penalty: how far the reward models' predictions for a pair are apart.

Everything is computed from logits with log_sigmoid and logaddexp, never from probabilities, so that certain
predictions keep finite values and gradients. The paper (arXiv 2502.08922) asks for consistency and confidence; its
formula could not be read, and the kinds below are this project's candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp

from scir_jax.config.schema import ConsistencyConfig

Array = jax.Array


def cross_entropy(target_P: Array, logits_P: Array) -> Array:
    """Computes -[q log p + (1-q) log(1-p)] with q = sigmoid(target), p = sigmoid(logits); [P] nats."""
    q = jax.nn.sigmoid(target_P)
    return -(q * jax.nn.log_sigmoid(logits_P) + (1 - q) * jax.nn.log_sigmoid(-logits_P))


def entropy(logits: Array) -> Array:
    """Computes the entropy of sigmoid(logits), in nats; the shape of `logits`."""
    return cross_entropy(logits, logits)


def kl(target_P: Array, logits_P: Array) -> Array:
    """Computes KL(sigmoid(target) || sigmoid(logits)), [P] nats."""
    q = jax.nn.sigmoid(target_P)
    return q * (jax.nn.log_sigmoid(target_P) - jax.nn.log_sigmoid(logits_P)) + (1 - q) * (
        jax.nn.log_sigmoid(-target_P) - jax.nn.log_sigmoid(-logits_P)
    )


def _mean_over_pairs(function, logits_PR: Array) -> Array:
    pairs = list(combinations(range(logits_PR.shape[1]), 2))
    if not pairs:
        return jnp.zeros(logits_PR.shape[0], logits_PR.dtype)
    both = [
        0.5 * (function(logits_PR[:, i], logits_PR[:, j]) + function(logits_PR[:, j], logits_PR[:, i]))
        for i, j in pairs
    ]
    return sum(both) / len(pairs)


def symmetric_kl(logits_PR: Array) -> Array:
    """Averages 1/2 [KL(p_i||p_j) + KL(p_j||p_i)] over the pairs of reward models: [P, R] -> [P]; 0 where all agree."""
    return _mean_over_pairs(kl, logits_PR)


def symmetric_cross_entropy(logits_PR: Array) -> Array:
    """Adds the mean entropy to the symmetric KL, so that confidence is asked for too: [P, R] -> [P]."""
    return _mean_over_pairs(cross_entropy, logits_PR)


def jensen_shannon(logits_PR: Array) -> Array:
    """Computes 1/R sum_r KL(p_r || mean p) from log-probabilities: [P, R] -> [P]; at most ln 2."""
    total = 0.0
    for sign in (1, -1):
        log_p = jax.nn.log_sigmoid(sign * logits_PR)
        log_mean = jax.nn.logsumexp(log_p, axis=1, keepdims=True) - jnp.log(logits_PR.shape[1])
        total = total + jnp.mean(jnp.exp(log_p) * (log_p - log_mean), axis=1)
    return total


def agreement(logits_PR: Array) -> Array:
    """Computes -log [prod_r p_r + prod_r (1 - p_r)]: [P, R] -> [P]; 0 only where all agree and all are certain."""
    return -jnp.logaddexp(jax.nn.log_sigmoid(logits_PR).sum(axis=1), jax.nn.log_sigmoid(-logits_PR).sum(axis=1))


def pseudo_label(logits_PR: Array, sharpen: float) -> Array:
    """Averages the cross-entropy to sigmoid(mean logit / sharpen), which gets no gradient: [P, R] -> [P]."""
    target_P = jax.lax.stop_gradient(logits_PR.mean(axis=1) / sharpen)
    return jnp.mean(jax.vmap(cross_entropy, in_axes=(None, 1), out_axes=1)(target_P, logits_PR), axis=1)


class Kind(NamedTuple):
    """An entry of KINDS.

    Attributes:
      mutual: (logits [P, R], settings) -> [P]: the reward models against each other.
      towards: (target [P], logits [P], settings) -> [P]: one reward model against a frozen target; None: `mutual` of
        both.
    """

    mutual: Callable[[Array, ConsistencyConfig], Array]
    towards: Callable[[Array, Array, ConsistencyConfig], Array] | None = None


KINDS = {
    # One-directional kinds teach towards the target itself.
    "kl": Kind(lambda logits, _: symmetric_kl(logits), lambda target, logits, _: kl(target, logits)),
    "js": Kind(lambda logits, _: jensen_shannon(logits)),
    "cross_entropy": Kind(
        lambda logits, _: symmetric_cross_entropy(logits), lambda target, logits, _: cross_entropy(target, logits)
    ),
    "agreement": Kind(lambda logits, _: agreement(logits)),
    "pseudo_label": Kind(lambda logits, settings: pseudo_label(logits, settings.sharpen)),
}
"""The kinds of penalty by name."""


def penalty(logits: dict[str, Array], settings: ConsistencyConfig, target_P: Array | None = None) -> Array:
    """Computes the consistency penalty of each pair.

    Args:
      logits: reward model -> [P, C] float32; every column counts as a reward model of its own.
      settings: with `target` "mutual" the reward models are compared with each other; else it is the mean over them of
        the penalty between each and the frozen target. The one that `stop_gradient` names teaches and does not learn.
        `entropy` times the mean entropy of their predictions is added.
      target_P: logits of the target, where it is not "mutual".

    Returns:
      [P] float32, nats.
    """
    kind = KINDS[settings.kind]
    stopped = {
        name: jax.lax.stop_gradient(values) if name == settings.stop_gradient else values
        for name, values in logits.items()
    }
    logits_PR = jnp.concatenate(list(stopped.values()), axis=1)
    doubt = settings.entropy * entropy(logits_PR).mean(axis=1) if settings.entropy else 0.0
    if settings.target == "mutual":
        return kind.mutual(logits_PR, settings) + doubt
    frozen = jax.lax.stop_gradient(target_P)
    towards = kind.towards or (lambda target, column, s: kind.mutual(jnp.stack([target, column], axis=1), s))
    return sum(towards(frozen, column, settings) for column in logits_PR.T) / logits_PR.shape[1] + doubt
