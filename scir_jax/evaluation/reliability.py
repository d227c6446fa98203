"""How far a reward model's probabilities of labelled pairs can be trusted: ties, calibration, bias for length; float64."""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10
"""of confidence, from 1/2 to 1"""
LENGTH_BINS = 5
"""of the length difference, with about as many pairs each"""


def reliability(logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Measures ties, calibration and bias for length on labelled pairs.

    Args:
      logits: [P] that the first answer is better.
      labels: [P] probability that it is, as somebody says.
      lengths: [P, 2] tokens of both answers.

    Returns:
      ties: share of logits that are exactly 0; ece: expected calibration error; brier: mean squared distance of the
      probability from the label; length_bias: how much more often than the labels it prefers the longer answer (there is
      none where all answers are as long as their others).
    """
    p = _probability(logits)
    result = {
        "ties": float(np.mean(logits == 0)),
        "ece": calibration_error(p, labels),
        "brier": float(np.mean((p - labels) ** 2)),
    }
    sign = np.sign(lengths[:, 0] - lengths[:, 1])
    differ = sign != 0
    if differ.any():
        longer = (0.5 + 0.5 * sign * side for side in (np.sign(logits), 2 * labels - 1))
        ours, theirs = (float(values[differ].mean()) for values in longer)
        result["length_bias"] = ours - theirs
    return result


def calibration_error(p: np.ndarray, labels: np.ndarray) -> float:
    """Computes the expected calibration error: over bins of confidence, the mean distance of confidence from accuracy.

    The confidence is the larger of p and 1 - p, so that it does not matter which answer stands first.

    Args:
      p: [P] probability that the first answer is better.
      labels: [P] likewise, as somebody says; the accuracy of a side is its label.
    """
    confidence = np.maximum(p, 1 - p)
    right = np.where(p == 0.5, 0.5, np.where(p > 0.5, labels, 1 - labels))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(p))


def accuracy_by_length(logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> list[dict[str, Any]]:
    """Computes the accuracy of pairs by how much longer the better answer is than the other one.

    Args:
      logits, labels, lengths: as in `reliability`; pairs of which neither answer is better do not count.

    Returns:
      LENGTH_BINS rows or fewer, from the answers that are better and shorter on: "from" and "to", tokens, both included,
      "pairs" and "accuracy"; a logit of 0 counts 1/2.
    """
    known = labels != 0.5
    first = labels[known] > 0.5
    difference = np.where(first, 1, -1) * (lengths[known, 0] - lengths[known, 1])
    score = np.where(logits[known] == 0, 0.5, (logits[known] > 0) == first)
    if not len(difference):
        return []
    # Pairs of one difference stay together.
    edges = np.unique(np.quantile(difference, np.arange(1, LENGTH_BINS) / LENGTH_BINS, method="lower"))
    bins = np.searchsorted(edges, difference, side="left")
    return [
        {
            "from": int(difference[bins == i].min()),
            "to": int(difference[bins == i].max()),
            "pairs": int((bins == i).sum()),
            "accuracy": float(score[bins == i].mean()),
        }
        for i in np.unique(bins)
    ]


def _probability(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.asarray(logits, np.float64) / 2))
