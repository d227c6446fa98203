"""From a run's checkpoint to a Hugging Face directory, or to a PEFT adapter directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from scir_jax.engine.checkpoint import ModelStore
from scir_jax.errors import InputError
from scir_jax.loop.directory import RunDirectory
from scir_jax.loop.session import Session
from scir_jax.model import adapters, lora, weights


def export_model(session: Session, run: RunDirectory, number: int, output: Path) -> None:
    """Writes M_number, adapters merged, with the tokenizer and chat template of the run's model and in its dtype.

    Raises:
      InputError: if the run has no such model.
    """
    source = Path(session.config.model.path)
    params = _trained(session, run, number)
    if session.model.lora is not None:
        # Merged into the weights as they are stored, not as they were rounded for the computation.
        _, base = weights.load(source, put=lambda value, path: value)
        params = lora.merge(lora.join(params, base), session.model.lora)
    weights.save(output, session.arch, params, config=session.hf_config, source=source, dtype=weights.dtype_of(source))


def export_adapter(session: Session, run: RunDirectory, number: int, output: Path) -> None:
    """Writes M_number's adapters as a PEFT directory. InputError if the run has no such model or no adapters."""
    if session.model.lora is None:
        raise InputError(f"{run.path}: a run without adapters (lora.rank is 0); export the model instead")
    params = _trained(session, run, number)
    adapters.save(output, session.arch, session.model.lora, params, base_model=session.config.model.path)


def _trained(session: Session, run: RunDirectory, number: int) -> Any:
    store = ModelStore(run.checkpoints)
    if not store.exists(number):
        present = ", ".join(f"M{n}" for n in store.numbers()) or "none"
        raise InputError(f"{run.path}: no model M{number}; there is {present}")
    return jax.device_get(store.load(number, session.abstract_trained))
