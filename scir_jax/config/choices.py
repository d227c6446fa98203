"""Names that several settings choose from."""

from __future__ import annotations

from typing import Literal

RewardName = Literal["generative", "implicit", "likelihood", "entropy", "pointwise"]
"""an internal reward model"""
LabelName = Literal["agreement", RewardName, "consensus", "cream", "dice", "external"]
"""who says which answer of a pair is better"""
