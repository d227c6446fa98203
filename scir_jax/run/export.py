"""From a run's checkpoint to a Hugging Face directory, or to a PEFT adapter directory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from scir_jax.config.schema import Config
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.hosts import hosts
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.model.hf import adapters, weights
from scir_jax.run import hub
from scir_jax.run.directory import RunDirectory


def export_model(config: Config, programs: Programs, run: RunDirectory, number: int, output: Path) -> None:
    """Writes M_number, adapters merged, with the tokenizer and chat template of the run's model and in its dtype.

    All processes of a run must call this; the first one writes.

    Raises:
      InputError: if the run has no such model.
    """
    source, writer = hub.directory(config.model.path, "model.path"), hosts.first()
    params = _trained(programs, run, number)

    with contextlib.ExitStack() as stack:
        tensors = params
        if programs.model.lora is not None:
            # Adapters are merged into the weights as they are stored, not as they were rounded for the computation.
            base = stack.enter_context(weights.stored_tensors(source))
            tensors = adapters.merged(base, params, programs.model.lora, wanted=writer)
        dtype = weights.dtype_of(source)
        hf_config = weights.hf_config(source)
        weights.save(output, programs.arch, tensors, config=hf_config, source=source, dtype=dtype, writer=writer)


def export_adapter(config: Config, programs: Programs, run: RunDirectory, number: int, output: Path) -> None:
    """Writes M_number's adapters as a PEFT directory.

    All processes of a run must call this; the first one writes.

    Raises:
      InputError: if the run has no such model or no adapters.
    """
    if programs.model.lora is None:
        raise InputError(f"{run.path}: a run without adapters (lora.rank is 0); export the model instead")
    params = _trained(programs, run, number)
    adapters.save(
        output,
        programs.arch,
        programs.model.lora,
        params,
        base_model=hub.repository(config.model.path),
        writer=hosts.first(),
    )


def _trained(programs: Programs, run: RunDirectory, number: int) -> Any:
    store = ModelStore(run.checkpoints)
    if not hosts.decide(lambda: store.exists(number)):
        present = ", ".join(f"M{n}" for n in store.numbers()) or "none"
        raise InputError(f"{run.path}: no model M{number}; there is {present}")
    return store.load(number, programs.abstract_trained)
