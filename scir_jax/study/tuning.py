"""Which point of a grid is the best, whether it is at an edge, and how a grid grows there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scir_jax.study.file import Point


@dataclasses.dataclass(frozen=True)
class Choice:
    """What tuning found.

    Attributes:
      point: the best one.
      scores: mean of the choosing column over the tuning seeds, for every point that was tried; -inf where a run
        diverged.
      edges: keys of which the best point has the smallest or the largest number that was tried.
    """

    point: Point
    scores: dict[Point, float]
    edges: tuple[str, ...]


def choose(scores: Mapping[Point, float]) -> Choice:
    """Chooses the point with the best score, of equal ones the first.

    Args:
      scores: of every point.
    """
    best = max(scores, key=lambda point: scores[point])
    edges = []
    for key, value in best:
        tried = _tried(scores, key)
        if len(tried) > 1 and value in (tried[0], tried[-1]):
            edges.append(key)
    return Choice(best, dict(scores), tuple(edges))


def grown(choice: Choice) -> list[Point]:
    """Returns the points beyond the edges at which the best one lies: the best one with the next value of one key."""
    result = []
    for key in choice.edges:
        tried = _tried(choice.scores, key)
        ascending = dict(choice.point)[key] == tried[-1]
        value = next_value(tried if ascending else tried[::-1])
        if value not in tried:
            result.append(tuple((name, value if name == key else old) for name, old in choice.point))
    return result


def next_value(values: Sequence[float]) -> float:
    """Continues a sequence of numbers by its ratio or by its step, whichever is the more regular one.

    Two positive numbers have a ratio. Whole numbers stay whole, others are rounded to three digits.

    Args:
      values: two or more, rising or falling.
    """
    array = np.asarray(values, np.float64)
    steps = np.diff(array)
    by_ratio = bool((array > 0).all())
    if by_ratio and len(array) > 2:
        by_ratio = _irregularity(np.diff(np.log(array))) <= _irregularity(steps)
    value = array[-1] ** 2 / array[-2] if by_ratio else array[-1] + steps[-1]
    return round(value) if all(isinstance(v, int) for v in values) else float(f"{value:.3g}")


def _irregularity(steps: np.ndarray) -> float:
    return float(np.std(steps) / abs(np.mean(steps)))


def _tried(scores: Mapping[Point, float], key: str) -> list[Any]:
    """Returns the numbers that a key had, in order; none where its values are no numbers."""
    values = {dict(point)[key] for point in scores}
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return sorted(values) if numbers else []
