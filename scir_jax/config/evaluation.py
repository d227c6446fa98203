"""The section `evaluate` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation after SFT and after each iteration."""

    batch_size: int = 32
    """pairs scored at once"""
    samples: int = 2
    """responses per held-out prompt"""
    temperature: float | None = None
    """of these responses; null: as in `sample`, likewise the next two"""
    top_p: float | None = None
    """nucleus"""
    top_k: int | None = None
    """0 is no limit"""
    greedy: bool = True
    """one greedy response per prompt too"""
    divergence: bool = True
    """estimate every model's divergence from M1 on its sampled answers, which M1 scores too"""
    grader: str | None = None
    """`module:function` of (prompt, response) -> {"quality": float, ...}; evaluation only, training never sees it"""
    select: Literal[
        "last", "consensus", "generative_accuracy", "implicit_accuracy", "quality", "greedy_quality", "win_rate"
    ] = "last"
    """the model that is exported: the last one, but not one at which early_stop ends the run; the best by the smaller
    of both reward models' accuracies (consensus); or the best by a column"""
    early_stop: bool = False
    """end the run behind an iteration in which agreement rose while both reward models' accuracies fell"""
    every: int = 0
    """steps of a training stage after which the reward models are evaluated on the held-out pairs too; 0: only after
    the stage"""
