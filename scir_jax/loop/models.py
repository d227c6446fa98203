"""The models of a run, one in memory at a time, and which of them is whose reference."""

from __future__ import annotations

from typing import Any

from scir_jax.config import Config
from scir_jax.engine.checkpoint import ModelStore


class Models:
    """M0 (base), M1 (after SFT), ... loaded from their checkpoints."""

    def __init__(self, store: ModelStore, config: Config, abstract: Any):
        self._store = store
        self._config = config
        self._abstract = abstract
        self._loaded: tuple[int, Any] | None = None

    def load(self, number: int) -> Any:
        """M_number's parameters; the model loaded before is let go first."""
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None
            self._loaded = (number, self._store.load(number, self._abstract))
        return self._loaded[1]

    def take(self, number: int) -> Any:
        """M_number's parameters for a training step to consume (donate)."""
        params = self.load(number)
        self._loaded = None
        return params

    def implicit_reference(self, iteration: int) -> int:
        """The implicit reward's reference in iteration t, which must lag M_t (0: for M1, evaluated after SFT)."""
        if self._config.implicit.reference == "previous":
            return max(iteration - 1, 0)
        return {"sft": 1, "base": 0}[self._config.implicit.reference]

    def preference_reference(self, iteration: int) -> int:
        """DPO's reference in iteration t."""
        return {"start": iteration, "sft": 1, "base": 0}[self._config.preference.reference]
