"""The models of a run, one in memory at a time, and which of them is whose reference."""

from __future__ import annotations

from typing import Any

from scir_jax.engine.checkpoint import ModelStore
from scir_jax.loop.session import Session
from scir_jax.model.lora import join


class Models:
    """M0 (base), M1 (after SFT), ... loaded from their checkpoints, which hold the trained parameters.

    With adapters all models share the frozen weights, which stay in memory: another model is another set of adapters.
    """

    def __init__(self, store: ModelStore, session: Session):
        self._store = store
        self._session = session
        self._loaded: tuple[int, Any] | None = None

    def load(self, number: int) -> Any:
        """M_number's parameters to compute with; the model loaded before is let go first."""
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None
            self._loaded = (number, self._store.load(number, self._session.abstract_inference))
        return join(self._loaded[1], self._session.frozen)

    def take(self, number: int) -> Any:
        """M_number's trained parameters, float32, for a training step to consume (donate)."""
        loaded, self._loaded = self._loaded, None
        session = self._session
        if loaded is not None and loaded[0] == number and session.abstract_inference == session.abstract_trained:
            return loaded[1]
        del loaded
        return self._store.load(number, session.abstract_trained)

    def implicit_reference(self, iteration: int) -> int:
        """The implicit reward's reference in iteration t, which must lag M_t (0: for M1, evaluated after SFT)."""
        config = self._session.config.implicit
        return max(iteration - 1, 0) if config.reference == "previous" else {"sft": 1, "base": 0}[config.reference]

    def preference_reference(self, iteration: int) -> int:
        """DPO's reference in iteration t."""
        return {"start": iteration, "sft": 1, "base": 0}[self._session.config.preference.reference]
