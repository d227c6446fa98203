"""Checkpoints: models and states of a stage, to the bit, and what cannot be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.engine.checkpoint import ModelStore, StageCheckpoints
from scir_jax.errors import InputError
from scir_jax.run.setup import prepare
from tests.training import assert_same_bytes, host


@pytest.fixture(scope="module")
def abstract(world_dir, tiny_config):
    return prepare(tiny_config(world_dir)).programs.abstract_trained


@pytest.fixture(scope="module")
def params(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jax.device_put(rng.normal(size=s.shape).astype(s.dtype), s.sharding), abstract)


def test_a_saved_state_is_the_one_at_the_time_of_saving(tmp_path):
    """The save goes on while the state's buffers are given to further steps."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.5 + 1, state), donate_argnums=0)
    state = {str(i): jnp.full((1024, 1024), i, jnp.float32) for i in range(8)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for number in (1, 2, 3):
        checkpoints = StageCheckpoints(tmp_path, 2)
        before = host(jax.tree.map(jnp.copy, state))  # a view of the state itself would keep its buffers
        checkpoints.save(number, state, {"data": {"next_index": number}})
        for i in range(5):
            old, state = state, step(state)
            assert old["0"].is_deleted() or i == 0
        jax.block_until_ready(state)
        checkpoints.close()
        again = StageCheckpoints(tmp_path, 2)
        found = again.restore(abstract)
        again.close()
        assert found[0] == number and found[2] == {"data": {"next_index": number}}
        assert_same_bytes(found[1], before)
    assert len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 2  # the newest two


def test_a_stage_without_a_checkpoint(tmp_path):
    checkpoints = StageCheckpoints(tmp_path / "stage", 2)
    assert checkpoints.restore({}) is None
    checkpoints.remove()
    assert not (tmp_path / "stage").exists()


def test_models_are_stored_to_the_bit(abstract, params, tmp_path):
    store = ModelStore(tmp_path)
    assert store.latest() is None and not store.exists(0)
    store.save(0, params)
    assert store.exists(0) and store.latest() == 0
    assert_same_bytes(store.load(0, abstract), params)
    other = jax.tree.map(lambda p: p + 1, params)
    store.save(10, other)
    store.save(9, params)
    store.save(0, other)  # replaces
    assert store.latest() == 10 and store.numbers() == [0, 9, 10]
    assert_same_bytes(store.load(0, abstract), other)


@pytest.mark.parametrize("damage", ["absent", "empty", "corrupt", "another shape", "other arrays"])
def test_a_model_that_cannot_be_read(abstract, params, tmp_path, damage):
    store, wanted = ModelStore(tmp_path), abstract
    path = store.path(3)
    if damage == "empty":
        path.mkdir()
    elif damage != "absent":
        store.save(3, params)
    if damage == "corrupt":
        for file in path.rglob("*"):
            if file.is_file() and file.stat().st_size > 1000:
                file.write_bytes(bytes(file.stat().st_size))
    if damage == "another shape":
        wanted = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((*s.shape[:-1], s.shape[-1] * 2), s.dtype, sharding=s.sharding), abstract
        )
    if damage == "other arrays":
        wanted = {name: value for name, value in abstract.items() if name != "norm"}
    with pytest.raises(InputError) as error:
        store.load(3, wanted)
    expected = "the checkpoint cannot be read"
    if damage == "another shape":
        embed = abstract["embed"].shape
        expected = f"is a checkpoint of another model (embed is {embed} there, {(embed[0], 2 * embed[1])} here)"
    elif damage == "other arrays":
        expected = "is a checkpoint of another model (norm/scale is "
    assert str(error.value).startswith(f"{path}: {expected}") and "\n" not in str(error.value)
