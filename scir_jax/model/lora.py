"""Low-rank adapters (LoRA, arXiv 2106.09685): which parameters are trained, which stay as they are.

An adapted layer computes W x + scale B A x. A and B stand beside W in the parameters, as `lora_a` and `lora_b`; a
model without adapters trains all it has. Everything else takes the joined parameters and need not know.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from scir_jax.errors import InputError
from scir_jax.model.architecture import LINEARS

Params = dict[str, Any]
ADAPTER = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
      rank: r, columns of A^T and of B.
      alpha: the adapter's output is multiplied by alpha / r, with `rslora` by alpha / sqrt(r) (arXiv 2312.03732).
      targets: adapted layers, of architecture.LINEARS.
      dropout: share of an adapter's inputs that training leaves out.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in LINEARS]
        if unknown or not self.targets:
            raise InputError(
                f"lora: no layer is called {', '.join(map(repr, unknown)) or 'nothing'}; there are {', '.join(LINEARS)}"
            )
        if self.rank < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise InputError(
                f"lora: rank must be at least 1, alpha positive and dropout in [0, 1), not {self.rank}, {self.alpha} "
                f"and {self.dropout}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def computes(self) -> tuple[int, float, frozenset[str]]:
        """What a model with these adapters computes, and the shapes of its parameters, depend on this alone."""
        return self.rank, self.scale, frozenset(self.targets)

    def __str__(self) -> str:
        return f"adapters of rank {self.rank}, scale {self.scale:g}, on {', '.join(self.targets)}"


def split(params: Params, lora: Lora | None) -> tuple[Params, Params]:
    """Splits parameters into (trained, frozen) nested dictionaries, which `join` puts together again."""
    if lora is None:
        return params, {}
    trained: Params = {}
    frozen: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            parts = split(value, lora)
        else:
            parts = (value, {}) if name in ADAPTER else ({}, value)
        for side, part in zip((trained, frozen), parts, strict=True):
            if not (isinstance(part, dict) and not part):
                side[name] = part
    return trained, frozen


def join(trained: Params, frozen: Params) -> Params:
    """Puts the parameters together of which `split` made these two."""
    joined = dict(frozen)
    for name, value in trained.items():
        joined[name] = join(value, frozen[name]) if isinstance(value, dict) and name in frozen else value
    return joined


def merge(weight: np.ndarray, a: np.ndarray, b: np.ndarray, lora: Lora) -> np.ndarray:
    """Adds a layer's adapters to its weight: W + scale B A, which computes without adapters what W does with them.

    The sum is made in float32 and given in W's dtype.

    Args:
      weight: [*out, *inputs].
      a: [r, *inputs].
      b: [*out, r].
    """
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    delta = b.reshape(-1, lora.rank) @ a.reshape(lora.rank, -1)
    merged = weight.astype(np.float32) + np.float32(lora.scale) * delta.reshape(weight.shape)
    return merged.astype(weight.dtype)
