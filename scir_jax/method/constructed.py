"""Constructed pairs: two answers whose order is known by how they came about, to teach the judge.

The better answer was sampled for the prompt. The worse one was sampled for another prompt or for the prompt changed, or it
is the better one cut short. Sources of the idea: Self-Taught Evaluators, arXiv 2408.02666, and J1, arXiv 2505.10320.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

LOOKED_AT = 64
"""other prompts among which the most alike is sought"""


class Construction(NamedTuple):
    """A constructed pair: places of the answers; `worse` is None where it is made of the better one or its prompt."""

    kind: str
    better: int
    worse: int | None


def construct(
    groups: Sequence[Sequence[int]],
    prompts: Sequence[Collection[int]],
    kinds: Sequence[str],
    rng: np.random.Generator,
) -> list[Construction]:
    """Chooses a pair of each kind for each prompt; none of another prompt's answers where there is no other.

    Args:
      groups: places of each prompt's answers.
      prompts: the different tokens of each prompt.
      kinds: as judge.constructions names them.
    """
    filled = [number for number, group in enumerate(groups) if group]
    found = []
    for number in filled:
        for kind in kinds:
            better = _one(groups[number], rng)
            if kind not in ("other", "similar"):
                found.append(Construction(kind, better, None))
            elif len(filled) > 1:
                others = _others(filled, number, LOOKED_AT if kind == "similar" else 1, rng)
                nearest = max(others, key=lambda other: alike(prompts[number], prompts[other]))
                found.append(Construction(kind, better, _one(groups[nearest], rng)))
    return found


def alike(one: Collection[int], other: Collection[int]) -> float:
    """Returns the share of two prompts' tokens that they have in common (Jaccard), 0 to 1."""
    one, other = set(one), set(other)
    return len(one & other) / max(len(one | other), 1)


def _one(group: Sequence[int], rng: np.random.Generator) -> int:
    return int(group[rng.integers(len(group))])


def _others(filled: Sequence[int], number: int, count: int, rng: np.random.Generator) -> list[int]:
    """Draws up to `count` different groups that are not this one."""
    # One more than is asked for, since this one may be among them.
    drawn = rng.choice(len(filled), min(count + 1, len(filled)), replace=False)
    return [filled[i] for i in drawn if filled[i] != number][:count]
