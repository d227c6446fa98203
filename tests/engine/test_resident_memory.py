"""The memory table against what a training stage really holds, on a CPU."""

import dataclasses
import resource
from pathlib import Path

import pytest

from tests.processes import elsewhere

STEPS = 4


def train(config, directory):
    """Runs a training stage -> (bytes that the process grew by at its peak, bytes that the table says)."""
    import numpy as np

    from scir_jax.data.pipelines import pair_batches
    from scir_jax.engine.cost import memory
    from scir_jax.run import console
    from scir_jax.run.directory import RunDirectory
    from scir_jax.run.metrics import NoMetrics
    from scir_jax.run.setup import prepare
    from scir_jax.run.training import train_stage

    encoder, inputs, programs, parameters = prepare(config)
    program = programs.optimise_program()
    table = memory.whole(program.known, program.compile(programs.mesh), "cpu").total
    cached = {f"{role}_logps": (-3.0, -4.0) for role in ("start", "implicit", "preference")}
    pairs = [dataclasses.replace(pair, cached=cached) for pair in inputs.heldout_pairs]
    pairs = pairs * (STEPS * config.optimise.batch_size // len(pairs))
    spec = programs.optimise_spec
    dataset = pair_batches(
        spec, encoder, pairs, inputs.targets, epochs=1, seed=0, seeds={"ift": 0, "eft": 1}, share=np.arange
    ).dataset
    assert len(dataset) == STEPS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train_stage(
        config,
        programs.optimise,
        "optimise",
        RunDirectory(Path(directory)),
        NoMetrics(),
        console.Stopper(),
        iteration=1,
        dataset=dataset,
        peak=1e-4,
        params=lambda: parameters.of_directory(Path(config.model.path)),
        frozen=lambda: {},
        save=lambda params: None,
    )
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), table


@pytest.mark.slow
def test_the_table_is_what_training_holds(world_dir, tiny_config, tmp_path):
    """Steps do not overlap on a CPU, or two steps' buffers would be there at once."""
    config = tiny_config(world_dir, optimise=dict(batch_size=192), checkpoint=dict(every=100))
    grown, table = elsewhere(train, config, str(tmp_path))
    assert table > 2**28, "too small a step to be measured"
    # What is loaded on the way, checkpoints and data preparation among it, is no part of the table.
    assert 0.75 * table < grown < 1.15 * table + 2**26
