"""docs/architecture.md's "Adding a method", word for word: a reward model, a consistency kind and a selection."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from scir_jax.engine.mesh import put_batch
from scir_jax.method import consistency, rewards, selection
from scir_jax.method.objective import needs
from scir_jax.run.setup import prepare
from tests.data.small_data import step_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture
def added():
    """The tables with the document's entries, which are taken out again."""
    tables = (rewards.REWARDS, consistency.KINDS, selection.SELECTION)
    before = [set(table) for table in tables]
    exec(re.search(r"<!-- adding -->\n```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)[1], {})
    yield
    for table, names in zip(tables, before):
        for name in table.keys() - names:
            del table[name]


@pytest.mark.slow
def test_entries_of_tables_are_all_that_is_needed(added, world_dir, tiny_config):
    config = tiny_config(
        world_dir,
        rewards=dict(models=("generative", "implicit", "brevity")),
        consistency=dict(kind="variance"),
        selection=dict(rule="alike"),
        preference=dict(labels="agreement"),
        replay=dict(weight=0.0),
    )
    encoder, inputs, programs, parameters = prepare(config)
    cached = {f"{role}_logps": (-3.0, -4.0) for role in ("start", "implicit", "preference")}
    pairs = [dataclasses.replace(pair, cached=cached) for pair in inputs.heldout_pairs]
    batch = step_of(programs.optimise_spec, list(enumerate(pairs)), encoder)
    trainer = programs.optimise
    state = trainer.init(parameters.of_directory(Path(config.model.path)))
    before = jax.tree.map(np.asarray, state.params)
    state, output = trainer.step(state, {}, put_batch(batch, programs.mesh), np.float32(1e-2), None)
    values, decisions = jax.device_get((output.metrics, output.decisions))

    assert needs(config).rewards == ("generative", "implicit", "brevity")
    lengths = np.array([pair.lengths for pair in pairs], np.float64)
    brevity = 0.1 * (lengths[:, 1] - lengths[:, 0])
    np.testing.assert_allclose(decisions["p_brevity"], 1 / (1 + np.exp(-brevity)), rtol=1e-5)
    logits = np.stack([np.log(p / (1 - p)) for p in (decisions["p_generative"][:, 0], decisions["p_implicit"])], 1)
    logits = np.concatenate([logits, brevity[:, None]], axis=1).astype(np.float64)
    assert float(values["consistency"]) == pytest.approx(logits.var(axis=1).mean(), rel=1e-4)
    np.testing.assert_allclose(decisions["weight"], 1 / (1 + np.abs(lengths[:, 0] - lengths[:, 1])), rtol=1e-6)
    np.testing.assert_array_equal(decisions["label"], logits.mean(axis=1) > 0)
    assert any(np.abs(x - y).max() > 0 for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(state.params)))
