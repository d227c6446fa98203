"""Means over seeds, and bootstrap intervals of what is computed of them; NumPy, float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Computes the mean and the standard error of the mean, with n - 1; a single value has no error."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else None


def bootstrap(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Computes the percentile bootstrap interval of a function of means over seeds.

    Whole rows are drawn with replacement, so that what was measured on one seed stays together: differences are paired.
    With few seeds such an interval is somewhat too narrow.

    Args:
      rows: [S, C], one row per seed.
      statistic: [R, C] means over seeds of R samples -> [R].
      level: share of the distribution that is inside.
      seed: of the draws.

    Returns:
      Its ends; None with fewer than two rows, or where the statistic is not finite.

    References:
      Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    rows = np.asarray(rows, np.float64)
    if len(rows) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
    values = statistic(rows[drawn].mean(axis=1))
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | list[float] | None]:
    """Compares two methods on the same seeds.

    Args:
      ours, theirs: one value per seed, in the same order.

    Returns:
      mean, error and interval (both ends, or None) of ours - theirs, and the share of seeds on which ours is larger
      (`wins`, ties count 1/2).
    """
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    mean, error = mean_and_error(difference)
    interval = bootstrap(difference[:, None], lambda means: means[:, 0])
    wins = float(np.mean(np.where(difference == 0, 0.5, difference > 0)))
    return {"mean": mean, "error": error, "interval": list(interval) if interval else None, "wins": wins}


def share_of_the_way(
    method: Sequence[float], start: Sequence[float], goal: Sequence[float]
) -> dict[str, float | list[float] | None] | None:
    """Computes how far a method goes from a start towards a goal: (method - start) / (goal - start), of means.

    Args:
      method, start, goal: one value per seed, in the same order.

    Returns:
      share and interval (both ends, or None where some samples of seeds have no way to go); None where start and goal
      have the same mean.
    """

    def share(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (means[:, 0] - means[:, 1]) / (means[:, 2] - means[:, 1])

    rows = np.stack([np.asarray(values, np.float64) for values in (method, start, goal)], axis=1)
    value = float(share(rows.mean(axis=0, keepdims=True))[0])
    if not np.isfinite(value):
        return None
    interval = bootstrap(rows, share)
    return {"share": value, "interval": list(interval) if interval else None}
