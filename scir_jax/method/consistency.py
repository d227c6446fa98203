"""The consistency penalty: how far the reward models' predictions for a pair are apart.

Everything is computed from logits with log_sigmoid and logaddexp, never from probabilities, so that certain
predictions keep finite values and gradients. The paper (arXiv 2502.08922) asks for consistency and confidence; its
formula could not be read, and the kinds below are this project's candidates.
"""

from __future__ import annotations

from itertools import combinations

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(target_P: Array, logits_P: Array) -> Array:
    """-[q log p + (1-q) log(1-p)] with q = sigmoid(target), p = sigmoid(logits); [P] nats."""
    q = jax.nn.sigmoid(target_P)
    return -(q * jax.nn.log_sigmoid(logits_P) + (1 - q) * jax.nn.log_sigmoid(-logits_P))


def entropy(logits: Array) -> Array:
    """Entropy of sigmoid(logits), in nats; the shape of `logits`."""
    return cross_entropy(logits, logits)


def kl(target_P: Array, logits_P: Array) -> Array:
    """KL(sigmoid(target) || sigmoid(logits)), [P] nats."""
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
    """Mean over the pairs of reward models of 1/2 [KL(p_i||p_j) + KL(p_j||p_i)]; 0 where all agree."""
    return _mean_over_pairs(kl, logits_PR)


def symmetric_cross_entropy(logits_PR: Array) -> Array:
    """Symmetric KL plus the mean entropy, so that confidence is asked for too."""
    return _mean_over_pairs(cross_entropy, logits_PR)


def jensen_shannon(logits_PR: Array) -> Array:
    """1/R sum_r KL(p_r || mean p), from log-probabilities; at most ln 2."""
    total = 0.0
    for sign in (1, -1):
        log_p = jax.nn.log_sigmoid(sign * logits_PR)
        log_mean = jax.nn.logsumexp(log_p, axis=1, keepdims=True) - jnp.log(logits_PR.shape[1])
        total = total + jnp.mean(jnp.exp(log_p) * (log_p - log_mean), axis=1)
    return total


def agreement(logits_PR: Array) -> Array:
    """-log [prod_r p_r + prod_r (1 - p_r)]: 0 only where all agree and all are certain."""
    return -jnp.logaddexp(jax.nn.log_sigmoid(logits_PR).sum(axis=1), jax.nn.log_sigmoid(-logits_PR).sum(axis=1))


def pseudo_label(logits_PR: Array, sharpen: float) -> Array:
    """Mean cross-entropy to sigmoid(mean logit / sharpen), the sharpened consensus, which gets no gradient."""
    target_P = jax.lax.stop_gradient(logits_PR.mean(axis=1) / sharpen)
    return jnp.mean(jax.vmap(cross_entropy, in_axes=(None, 1), out_axes=1)(target_P, logits_PR), axis=1)


def penalty(
    logits_PR: Array,
    names: tuple[str, ...],
    *,
    kind: str,
    stop_gradient: str = "none",
    target: str = "mutual",
    consensus_P: Array | None = None,
    sharpen: float = 0.5,
) -> Array:
    """The consistency penalty of each pair.

    Args:
      logits_PR: float32; names: the reward model of each column ("generative" may occur several times).
      kind: "kl", "js", "cross_entropy", "agreement" or "pseudo_label".
      stop_gradient: reward models of this name teach and do not learn.
      target: "mutual", the reward models against each other; "consensus", the mean over reward models of the penalty
        between each and the frozen consensus.
      consensus_P: logits of the consensus, for target "consensus".

    Returns:
      [P] float32, nats.
    """
    columns = [
        jax.lax.stop_gradient(logits_PR[:, r]) if name == stop_gradient else logits_PR[:, r]
        for r, name in enumerate(names)
    ]
    kinds = {
        "kl": symmetric_kl,
        "js": jensen_shannon,
        "cross_entropy": symmetric_cross_entropy,
        "agreement": agreement,
        "pseudo_label": lambda logits: pseudo_label(logits, sharpen),
    }
    if target == "mutual":
        return kinds[kind](jnp.stack(columns, axis=1))
    frozen = jax.lax.stop_gradient(consensus_P)
    # One-directional kinds teach towards the consensus itself.
    towards = {"kl": lambda c: kl(frozen, c), "cross_entropy": lambda c: cross_entropy(frozen, c)}.get(
        kind, lambda c: kinds[kind](jnp.stack([frozen, c], axis=1))
    )
    return sum(towards(column) for column in columns) / len(columns)
