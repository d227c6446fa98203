"""From a run's checkpoint to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import jax

from scir_jax.engine.checkpoint import ModelStore
from scir_jax.errors import InputError
from scir_jax.loop.directory import RunDirectory
from scir_jax.loop.session import Session
from scir_jax.model import weights


def export_model(session: Session, run: RunDirectory, number: int, output: Path) -> None:
    """Writes M_number with the tokenizer and chat template of the run's model. InputError if it is not there."""
    store = ModelStore(run.checkpoints)
    if not store.exists(number):
        present = ", ".join(f"M{n}" for n in store.numbers()) or "none"
        raise InputError(f"{run.path}: no model M{number}; there is {present}")
    params = jax.device_get(store.load(number, session.abstract_params))
    source = Path(session.config.model.path)
    weights.save(output, session.arch, params, config=session.hf_config, source=source, dtype=weights.dtype_of(source))
