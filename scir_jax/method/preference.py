"""Selection of pairs, their labels, and the preference loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scir_jax.method.rewards import log_ratio

Array = jax.Array


def agreed(logits_PR: Array, confidence: float = 0.0) -> Array:
    """True where all p_r are on the same side of 1/2, each further than `confidence` from it. [P] bool."""
    p = jax.nn.sigmoid(logits_PR)
    # The side is the logit's sign: a small logit's probability rounds to 1/2.
    far = jnp.abs(p - 0.5) > confidence if confidence > 0 else True
    return jnp.all((logits_PR > 0) & far, axis=1) | jnp.all((logits_PR < 0) & far, axis=1)


def label(logits_P: Array, *, soft: bool) -> Array:
    """Probability that the first response is better, [P]: sigmoid(logits), or 1, 1/2 or 0 where hard; no gradient."""
    logits_P = jax.lax.stop_gradient(logits_P)
    return jax.nn.sigmoid(logits_P) if soft else 0.5 * (1 + jnp.sign(logits_P))


def margin(logps_P2: Array, reference_logps_P2: Array, lengths_P2: Array, *, length_normalised: bool = False) -> Array:
    """[log pi/pi_ref](y1) - [log pi/pi_ref](y2), [P], nats (or nats a token)."""
    ratio_P2 = log_ratio(logps_P2, reference_logps_P2, lengths_P2, per_token=length_normalised)
    return ratio_P2[:, 0] - ratio_P2[:, 1]


def loss(margin_P: Array, label_P: Array, *, kind: str, beta: float, label_smoothing: float = 0.0) -> Array:
    """The preference loss q l(m) + (1 - q) l(-m) of each pair, [P].

    Args:
      margin_P: log-ratio margin of the first over the second response, without beta.
      label_P: q, the probability that the first is better.
      kind: "sigmoid" -log sigmoid(beta m) (DPO, arXiv 2305.18290, eq. 7); "ipo" (m - 1/(2 beta))^2 (arXiv 2310.12036,
        eq. 17); "hinge" max(0, 1 - beta m) (SLiC, arXiv 2305.10425).
      label_smoothing: epsilon, q becomes (1 - epsilon) q + epsilon (1 - q) (arXiv 2403.00409).
    """
    one_side = {
        "sigmoid": lambda m: -jax.nn.log_sigmoid(beta * m),
        "ipo": lambda m: jnp.square(m - 1 / (2 * beta)),
        "hinge": lambda m: jax.nn.relu(1 - beta * m),
    }[kind]
    q = (1 - label_smoothing) * label_P + label_smoothing * (1 - label_P)
    return q * one_side(margin_P) + (1 - q) * one_side(-margin_P)
