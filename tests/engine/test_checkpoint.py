"""Checkpoints: models and states of a stage, to the bit, and what cannot be read."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.engine.checkpoint import ARRAYS, ModelStore, StageCheckpoints
from scir_jax.engine.checksums import checksums
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


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_the_state_of_each_optimiser_is_restored(world_dir, tiny_config, tmp_path, optimizer):
    trainer = prepare(tiny_config(world_dir, training=dict(optimizer=optimizer))).programs.optimise
    rng = np.random.default_rng(0)
    abstract = trainer.abstract_state()
    state = jax.tree.map(lambda s: jax.device_put((9 * rng.normal(size=s.shape)).astype(s.dtype), s.sharding), abstract)
    with contextlib.closing(StageCheckpoints(tmp_path, 2)) as checkpoints:
        checkpoints.save(3, state, {})
    with contextlib.closing(StageCheckpoints(tmp_path, 2)) as checkpoints:
        step, found, _ = checkpoints.restore(abstract)
    assert step == 3 and jax.tree.structure(found) == jax.tree.structure(state)
    assert_same_bytes(found, state)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_are_weighted_sums_of_words(dtype):
    values = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 7)) * 9).astype(dtype))
    words = values.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[values.dtype.itemsize]).astype(object).reshape(-1)
    expected = sum(int(word) * (2 * i + 1) for i, word in enumerate(words)) % 2**32
    assert checksums({"a": {"b": jnp.asarray(values)}}) == {"a/b": expected}
    if dtype == "float32":
        halves = values.astype(jnp.bfloat16)
        assert checksums([jnp.asarray(values)], "bfloat16") == checksums([jnp.asarray(halves)])


def flip(rng, root):
    """Flips one bit of one file below a directory -> its path."""
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.stat().st_size)
    sizes = np.array([file.stat().st_size for file in files], float)
    # Large and small files alike.
    file = files[rng.choice(len(files), p=0.5 * sizes / sizes.sum() + 0.5 / len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flipped_bit_of_a_model_is_found_or_harmless(tmp_path, dtype):
    rng = np.random.default_rng(1)
    params = {"a": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), "b": jnp.zeros(7, jnp.float32)}
    ModelStore(tmp_path / "good").save(1, params)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), params)
    expected = jax.tree.map(lambda x: x.astype(dtype), params)
    found = 0
    for _ in range(25):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tmp_path / "good", broken)
        flip(rng, broken)
        try:
            assert_same_bytes(ModelStore(broken).load(1, abstract), expected)
        except InputError as error:
            found += 1
            assert str(error).startswith((f"{broken / 'M1'}: ", f"{broken / ARRAYS}: ")), error
    assert found > 5


def test_a_flipped_bit_of_a_stages_checkpoint_is_found_or_harmless(tmp_path):
    rng = np.random.default_rng(2)
    state = {"a": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), "n": jnp.asarray(3)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = StageCheckpoints(tmp_path / "good", 2)
    checkpoints.save(4, state, {"data": {"next_index": 123456789}})
    checkpoints.close()
    found = 0
    for _ in range(25):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tmp_path / "good", broken)
        flip(rng, broken / "4")
        again = StageCheckpoints(broken, 2)
        try:
            step, values, meta = again.restore(abstract)
            assert step == 4 and meta == {"data": {"next_index": 123456789}}
            assert_same_bytes(values, state)
        except InputError as error:
            found += 1
            assert str(error).startswith(f"{broken / '4'}: ") and "goes on from the one before it" in str(error)
        finally:
            again.close()
    assert found > 5
