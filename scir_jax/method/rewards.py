"""Internal reward models: each turns log-probabilities or verdict logits into one logit a pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def generative(verdicts_P22: Array) -> dict[str, Array]:
    """The generative reward model: the policy's verdict, read in both orders.

    z(y1, y2) = logit(A) - logit(B) with y1 shown as A. The logit 1/2 [z(y1, y2) - z(y2, y1)] is free of any additive
    preference for a slot, 0 for y1 = y2, and changes its sign when the pair is swapped.

    Args:
      verdicts_P22: float32, logits of (A, B) [..., 2] with the first (index 0 of axis 1) or second response as A.

    Returns:
      [P] each: `logit`; `slot_bias` 1/2 [z(y1, y2) + z(y2, y1)] in nats; `flip` 1 where both orders name the same
      letter, else 0.
    """
    z_P2 = verdicts_P22[..., 0] - verdicts_P22[..., 1]
    first, second = z_P2[:, 0], z_P2[:, 1]
    return {
        "logit": 0.5 * (first - second),
        "slot_bias": 0.5 * (first + second),
        "flip": (first * second > 0).astype(jnp.float32),
    }


def log_ratio(logps: Array, reference_logps: Array, lengths: Array, *, per_token: bool) -> Array:
    """log pi(y|x) - log pi_ref(y|x), in nats (or nats a token); an empty response's is 0. Shapes alike, float32."""
    difference = logps - reference_logps
    return difference / jnp.maximum(lengths, 1) if per_token else difference


def implicit(
    logps_P2: Array, reference_logps_P2: Array, lengths_P2: Array, penalty_P2: Array, *, beta: float, length: str
) -> Array:
    """The implicit reward model's logit r(y1) - r(y2), r(y) = beta log(pi / pi_ref) (DPO, arXiv 2305.18290, eq. 5).

    Args:
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
    """The likelihood reward model's logit: log pi_t(y1|x) - log pi_t(y2|x) of the iteration's start, frozen.

    Args:
      length: "none" or "mean" (per token).

    Returns:
      [P] float32, without gradient.
    """
    reward_P2 = jax.lax.stop_gradient(start_logps_P2)
    if length == "mean":
        reward_P2 = reward_P2 / jnp.maximum(lengths_P2, 1)
    return reward_P2[:, 0] - reward_P2[:, 1]


def consensus(logits_PR: Array, weights_R: tuple[float, ...]) -> Array:
    """The weighted sum of the reward models' logits, [P]: sigmoid of it is the soft consensus."""
    return logits_PR @ jnp.asarray(weights_R, logits_PR.dtype)


def rank_agreement(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """C = mean over prompts of (tau + 1) / 2, tau Kendall's correlation of two rewards of a prompt's N responses.

    CREAM (arXiv 2410.12735, section 4). 1 where two models rank all responses alike, 1/2 by chance.

    Args:
      first, second: a prompt each, [N] rewards; prompts with fewer than two responses say nothing.
    """
    agreement = []
    for x, y in zip(first, second, strict=True):
        i, j = np.triu_indices(len(x), 1)
        if len(i):
            agreement.append((np.mean(np.sign((x[i] - x[j]) * (y[i] - y[j]))) + 1) / 2)
    return float(np.mean(agreement)) if agreement else 0.5


def fit_length_penalty(rewards: np.ndarray, lengths: np.ndarray) -> float:
    """alpha for which the responses that r - alpha |y| prefers are, on average, no longer than the others.

    DICE (arXiv 2406.09760, section 4.1). The mean length gap of the preferred responses falls stepwise as alpha
    grows; it changes only where a pair's preference flips, at alpha = (r1 - r2) / (|y1| - |y2|). The gaps between
    these points are searched exhaustively.

    Args:
      rewards: [P, 2] implicit rewards; lengths: [P, 2] tokens.

    Returns:
      the alpha >= 0 with the smallest absolute mean gap, the smallest such; 0.0 without pairs of different lengths.
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
