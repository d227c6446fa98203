"""The section `judge` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class JudgeConfig:
    """How a step asks the judge, and what teaches it beside the consistency penalty and the replay."""

    orders: Literal["both", "one"] = "both"
    """orders in which a step asks about a pair; one: every other pair shows its second answer as A, which nearly halves
    the questions' tokens; before training and in evaluation both are asked"""

    constructed_batch_size: int = 0
    """judge questions per step about constructed pairs, whose order is known: the better answer was sampled for the
    prompt, the worse one was not; 0: none"""
    constructions: tuple[Literal["other", "similar", "cut", "perturbed", "truncated"], ...] = ("perturbed", "truncated")
    """the worse answer: other: it was sampled for another prompt of the iteration; similar: for the most alike of 64
    others; cut: the better answer without its second half; perturbed, truncated: it is sampled for the prompt with a
    word exchanged for another prompt's, or without the second half of its last message"""
    constructed_weight: float = 0.3
    """of the verdicts' cross-entropy on constructed pairs, per token"""
    slot_penalty: float = 0.0
    """weight of the judge's mean squared slot bias in nats, the part of a verdict that swapping the answers does not
    change; 0 leaves it out"""
