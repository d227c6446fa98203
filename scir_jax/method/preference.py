"""The preference loss: DPO and its relatives."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from scir_jax.method.rewards import log_ratio

Array = jax.Array

LOSSES: dict[str, Callable[[Array, float], Array]] = {
    # DPO, arXiv 2305.18290, eq. 7
    "sigmoid": lambda margin, beta: -jax.nn.log_sigmoid(beta * margin),
    # IPO, arXiv 2310.12036, eq. 17
    "ipo": lambda margin, beta: jnp.square(margin - 1 / (2 * beta)),
    # SLiC, arXiv 2305.10425
    "hinge": lambda margin, beta: jax.nn.relu(1 - beta * margin),
}
"""The losses l(m) by name: (margin in favour of the better answer [P], beta) -> [P]."""


def margin(logps_P2: Array, reference_logps_P2: Array, lengths_P2: Array, *, length_normalised: bool = False) -> Array:
    """Computes [log pi/pi_ref](y1) - [log pi/pi_ref](y2), [P], nats (or nats per token)."""
    ratio_P2 = log_ratio(logps_P2, reference_logps_P2, lengths_P2, per_token=length_normalised)
    return ratio_P2[:, 0] - ratio_P2[:, 1]


def loss(margin_P: Array, label_P: Array, *, kind: str, beta: float, label_smoothing: float = 0.0) -> Array:
    """Computes the preference loss q l(m) + (1 - q) l(-m) of each pair, [P].

    Args:
      margin_P: log-ratio margin of the first over the second answer, without beta, nats.
      label_P: q, the probability that the first is better.
      kind: key of LOSSES.
      label_smoothing: epsilon, q becomes (1 - epsilon) q + epsilon (1 - q) (arXiv 2403.00409).
    """
    one_side = LOSSES[kind]
    q = (1 - label_smoothing) * label_P + label_smoothing * (1 - label_P)
    return q * one_side(margin_P, beta) + (1 - q) * one_side(-margin_P, beta)
