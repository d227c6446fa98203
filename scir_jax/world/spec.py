"""Every number of the embedded world.

Probabilities of answer modes are in the order of `tasks.MODES`: good, typo, lazy, cut,
ramble.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from scir_jax.errors import InputError
from scir_jax.world.tasks import MODES

Probabilities = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class WorldSpec:
    """All numbers that make a world; each is checked."""

    seed: int = 0

    # Rows of each file.
    base_documents: int = 20_000
    base_comparisons: int = 20_000
    ift_documents: int = 2_048
    eft_comparisons: int = 1_024
    prompts: int = 3_072  # 6 iterations of 512, all distinct
    heldout_prompts: int = 256
    heldout_pairs: int = 512

    # Responses of base.jsonl. Lazy answers are common on purpose: where wrong answers are
    # rare, greedy decoding is right from the start and nothing is left to learn.
    base_modes: Probabilities = (0.20, 0.15, 0.40, 0.10, 0.15)
    base_marker: float = 0.75
    # Responses of ift.jsonl: better, and far from perfect.
    ift_modes: Probabilities = (0.45, 0.08, 0.35, 0.04, 0.08)
    ift_marker: float = 0.85
    # Responses of every comparison: base_comparisons, eft and heldout_pairs.
    pair_modes: Probabilities = (0.30, 0.20, 0.25, 0.10, 0.15)
    pair_marker: float = 0.75
    # Share of base_comparisons in which the worse response is called the chosen one.
    base_flipped: float = 0.20

    # Share of all words that occur in the held-out files only.
    heldout_words: float = 0.125

    # The model.
    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 160
    max_length: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name.endswith("_modes"):
                if len(value) != len(MODES) or min(value) < 0 or not math.isclose(sum(value), 1):
                    raise InputError(f"{name} must be {len(MODES)} probabilities: {value}")
            elif isinstance(field.default, float):
                if not 0 <= value <= 1:
                    raise InputError(f"{name} must be between 0 and 1: {value}")
            elif value < (0 if name == "seed" else 1):
                raise InputError(f"{name} is too small: {value}")
