"""Internal reward models: each turns what is known of a pair into a logit that the first answer is better."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.config.schema import Config

Array = jax.Array


class Evidence(NamedTuple):
    """What is known of P pairs; float32 unless said otherwise.

    Attributes:
      fresh: readings under the parameters being trained: "logps" [P, 2] log pi(y|x), summed over tokens, nats;
        "verdicts" [P, G, O, 2] logits of (A, B) with the first or the second answer shown as A (O = 2), or in one order
        the logits of the first and the second answer's letter (O = 1); "verdict_mass" [P, G, O] P(A) + P(B);
        "entropy" [P, 2] mean entropy of the policy at the answer's tokens, nats.
      cached: ROLE_READING -> [P, 2] under another model: "preference_logps" under DPO's reference, "implicit_logps"
        under the implicit reward's, "start_logps" under the policy that the iteration started from; "start_points" and
        "start_points_mass" the points that it gives as a judge, see `expected_points`, and the probability of all points.
      frozen: reward model, or a name of JUDGED -> [P, C] its logits at the start of the iteration.
      lengths: [P, 2] tokens of the answers, int32.
      length_penalty: [P, 2] alpha |y|.
      verdicts: [P, S] the judge's single verdicts at the start of the iteration, logits in favour of the first answer.
      label: [P] the given probability that the first answer is better (1/2 without one).
      weight: [P] of the pair in every term; 0 for padding.
    """

    fresh: dict[str, Array]
    cached: dict[str, Array]
    frozen: dict[str, Array]
    lengths: Array
    length_penalty: Array
    verdicts: Array
    label: Array
    weight: Array


class Reward(NamedTuple):
    """An entry of REWARDS.

    Attributes:
      logits: (evidence, config) -> [P, C] float32.
      reads: names in `Evidence.fresh` that it needs; without any it is frozen by definition.
      cached: names in `Evidence.cached` that it needs.
      columns: config -> C, where that is not 1.
      health: evidence -> values [P] by name that are worth watching.
    """

    logits: Callable[[Evidence, Config], Array]
    reads: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    columns: Callable[[Config], int] | None = None
    health: Callable[[Evidence], dict[str, Array]] | None = None


def verdict_logits(verdicts_PO2: Array) -> dict[str, Array]:
    """Reads the generative reward model's logit off the policy's verdicts in both orders, or in one.

    z(y1, y2) = logit(A) - logit(B) with y1 shown as A. The logit 1/2 [z(y1, y2) - z(y2, y1)] is free of any additive
    preference for a slot, 0 for y1 = y2, and changes its sign when the pair is swapped. One order gives z(y1, y2) or
    -z(y2, y1), which holds that preference.

    Args:
      verdicts_PO2: float32, logits of (A, B) [..., 2] with the first (index 0 of axis 1) or second answer as A; of one
        order those of the first and the second answer's letter.

    Returns:
      [P] each: `logit`; `slot_bias` 1/2 [z(y1, y2) + z(y2, y1)] in nats; `flip` 1 where both orders name the same
      letter, else 0. One order gives `logit` alone.
    """
    z_PO = verdicts_PO2[..., 0] - verdicts_PO2[..., 1]
    if z_PO.shape[1] == 1:
        return {"logit": z_PO[:, 0]}
    first, second = z_PO[:, 0], z_PO[:, 1]
    return {
        "logit": 0.5 * (first - second),
        "slot_bias": 0.5 * (first + second),
        "flip": (first * second > 0).astype(jnp.float32),
    }


def judged(verdicts_PGO2: Array) -> dict[str, Array]:
    """Returns `verdict_logits` of every template, [P, G] each."""
    return jax.vmap(verdict_logits, in_axes=1, out_axes=1)(verdicts_PGO2)


def single_verdicts(verdicts_PG22: np.ndarray) -> np.ndarray:
    """Returns every single verdict as a logit in favour of the first answer, [P, 2 G]: z(y1, y2) and -z(y2, y1)."""
    z_PG2 = verdicts_PG22[..., 0] - verdicts_PG22[..., 1]
    return (z_PG2 * np.array([1, -1], z_PG2.dtype)).reshape(len(z_PG2), -1)


def log_ratio(logps: Array, reference_logps: Array, lengths: Array, *, per_token: bool) -> Array:
    """Returns log pi(y|x) - log pi_ref(y|x) in nats (or nats per token); 0 for an empty answer.

    Args:
      logps, reference_logps: float32, nats.
      lengths: tokens, of the same shape.
    """
    difference = logps - reference_logps
    return difference / jnp.maximum(lengths, 1) if per_token else difference


def implicit(
    logps_P2: Array, reference_logps_P2: Array, lengths_P2: Array, penalty_P2: Array, *, beta: float, length: str
) -> Array:
    """Computes the implicit reward model's logit r(y1) - r(y2), r(y) = beta log(pi / pi_ref).

    Source: DPO, arXiv 2305.18290, eq. 5.

    Args:
      logps_P2, reference_logps_P2: log pi(y|x) and log pi_ref(y|x), nats, float32.
      lengths_P2: tokens.
      penalty_P2: alpha |y|, subtracted from r where `length` is "penalty" (DICE, arXiv 2406.09760).
      length: "none"; "mean", the log-ratio per token; "penalty".

    Returns:
      [P] float32.
    """
    reward_P2 = beta * log_ratio(logps_P2, reference_logps_P2, lengths_P2, per_token=length == "mean")
    if length == "penalty":
        reward_P2 = reward_P2 - penalty_P2
    return reward_P2[:, 0] - reward_P2[:, 1]


def likelihood(start_logps_P2: Array, lengths_P2: Array, *, length: str) -> Array:
    """Computes the likelihood reward model's logit log pi_t(y1|x) - log pi_t(y2|x), without gradient.

    Args:
      start_logps_P2: under the policy that the iteration started from, nats, float32.
      length: "none" or "mean" (per token).

    Returns:
      [P] float32.
    """
    reward_P2 = jax.lax.stop_gradient(start_logps_P2)
    if length == "mean":
        reward_P2 = reward_P2 / jnp.maximum(lengths_P2, 1)
    return reward_P2[:, 0] - reward_P2[:, 1]


def expected_points(logits_NK: np.ndarray, points: Sequence[float]) -> np.ndarray:
    """Computes the judge's points of answers as an expectation: sum of k p(k), p normalised over the K points.

    Source: the score of an additive prompt, Self-Rewarding Language Models, arXiv 2401.10020, read without sampling.

    Args:
      logits_NK: of the points' tokens, float32.
      points: what each of them is worth.

    Returns:
      [N] float32.
    """
    logits_NK = np.asarray(logits_NK, np.float64)
    p_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    return (p_NK @ np.asarray(points, np.float64) / p_NK.sum(axis=1)).astype(np.float32)


def _generative(evidence: Evidence, config: Config) -> Array:
    return judged(evidence.fresh["verdicts"])["logit"]


def _judges_health(evidence: Evidence) -> dict[str, Array]:
    found = judged(evidence.fresh["verdicts"])
    bias = {"slot_bias": found["slot_bias"], "flip_rate": found["flip"]} if "flip" in found else {}
    return {
        **{name: values.mean(axis=1) for name, values in bias.items()},
        "verdict_mass": evidence.fresh["verdict_mass"].mean(axis=(1, 2)),
    }


def _implicit(evidence: Evidence, config: Config) -> Array:
    settings = config.implicit
    return implicit(
        evidence.fresh["logps"],
        evidence.cached["implicit_logps"],
        evidence.lengths,
        evidence.length_penalty,
        beta=settings.beta,
        length=settings.length,
    )[:, None]


def _entropy(evidence: Evidence, config: Config) -> Array:
    """Computes the entropy reward's logit: the surer the policy is at an answer's tokens, the better the answer."""
    entropy_P2 = evidence.fresh["entropy"]
    return config.rewards.entropy_scale * (entropy_P2[:, 1] - entropy_P2[:, 0])[:, None]


def _likelihood(evidence: Evidence, config: Config) -> Array:
    length = config.rewards.likelihood_length
    return likelihood(evidence.cached["start_logps"], evidence.lengths, length=length)[:, None]


def _pointwise(evidence: Evidence, config: Config) -> Array:
    """Computes the difference of the points that the judge gave both answers at the start of the iteration."""
    points_P2 = jax.lax.stop_gradient(evidence.cached["start_points"])
    return (points_P2[:, 0] - points_P2[:, 1])[:, None]


def _points_health(evidence: Evidence) -> dict[str, Array]:
    return {"points_mass": evidence.cached["start_points_mass"].mean(axis=1)}


REWARDS = {
    "generative": Reward(
        _generative,
        reads=("verdicts", "verdict_mass"),
        columns=lambda config: len(config.generative.templates),
        health=_judges_health,
    ),
    "implicit": Reward(_implicit, reads=("logps",), cached=("implicit_logps",)),
    "likelihood": Reward(_likelihood, cached=("start_logps",)),
    "entropy": Reward(_entropy, reads=("entropy",)),
    "pointwise": Reward(_pointwise, cached=("start_points", "start_points_mass"), health=_points_health),
}
"""The internal reward models by name."""


JUDGED = {"generative_before": REWARDS["generative"].columns, "transitive": None}
"""What the judge says beside its verdicts at the start of an iteration -> columns as in Reward: the verdicts of M_{t-1};
differences of the answers' mean verdicts."""


def columns(name: str, config: Config) -> int:
    """Returns C, the number of logits that a reward model, or an entry of JUDGED, gives to a pair."""
    count = JUDGED[name] if name in JUDGED else REWARDS[name].columns
    return 1 if count is None else count(config)


def reward_logits(evidence: Evidence, config: Config, names: Iterable[str]) -> dict[str, Array]:
    """Computes the logits of reward models by name, [P, C] float32 each."""
    return {name: REWARDS[name].logits(evidence, config) for name in names}


def consensus(logits: dict[str, Array], weights: dict[str, float]) -> Array:
    """Returns the consensus's logit [P]: the weighted sum of the reward models' mean logits, absent weights 0.

    Args:
      logits: reward model -> [P, C].
    """
    return sum(weights.get(name, 0.0) * values.mean(axis=1) for name, values in logits.items())


def fit_length_penalty(rewards: np.ndarray, lengths: np.ndarray) -> float:
    """Finds the alpha for which the answers that r - alpha |y| prefers are, on average, no longer than the others.

    Source: DICE, arXiv 2406.09760, section 4.1. The mean length gap of the preferred answers falls stepwise as alpha
    grows; it changes only where a pair's preference flips, at alpha = (r1 - r2) / (|y1| - |y2|). The gaps between these
    points are searched exhaustively.

    Args:
      rewards: [P, 2] implicit rewards.
      lengths: [P, 2] tokens.

    Returns:
      The alpha >= 0 with the smallest absolute mean gap, the smallest such; 0.0 without pairs of different lengths.
    """
    reward_gap = (rewards[:, 0] - rewards[:, 1]).astype(np.float64)
    length_gap = (lengths[:, 0] - lengths[:, 1]).astype(np.float64)
    differ = length_gap != 0
    # Oriented so that the first response is the longer: it is preferred while alpha < flip.
    flips = np.sort((reward_gap[differ] / length_gap[differ]))
    sizes = np.abs(length_gap[differ])[np.argsort(reward_gap[differ] / length_gap[differ], kind="stable")]
    if not len(flips):
        return 0.0
    # gap(alpha) = sum of sizes with flip > alpha, minus those with flip < alpha.
    edges = np.concatenate([[0.0], flips[flips > 0]])
    candidates = np.append((edges[:-1] + edges[1:]) / 2, edges[-1] + 1e-3)
    candidates = np.concatenate([[0.0], candidates])
    total = sizes.sum()
    below = np.concatenate([[0.0], np.cumsum(sizes)])[np.searchsorted(flips, candidates, side="left")]
    gaps = np.abs(total - 2 * below)
    return float(candidates[int(np.argmin(gaps))])
