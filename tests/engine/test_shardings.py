"""A mesh changes neither what is computed nor, but for its place, what is kept: 8 devices against one."""

import jax
import numpy as np
import pytest

from scir_jax.config.schema import MeshConfig
from scir_jax.engine import mesh as meshes
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.errors import InputError
from scir_jax.model import decoder, families
from scir_jax.model.architecture import LINEARS
from scir_jax.model.hf import weights
from scir_jax.model.sharding import Layout
from scir_jax.run import sampling, scoring
from tests.processes import on_eight_devices
from tests.training import TRAINING, changed, dropping_config, heldout_items, host, make_dataset, on_mesh, whole

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_compilation")]

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))
PACKED = ("bins",)


def everything(setup):
    """What a mesh must not change: name -> array."""
    encoder, inputs, programs, parameters = setup
    params = whole(setup)
    judged = scoring.judge_pairs(encoder, programs, params, inputs.heldout_pairs)
    rows = sampling.sample_rows(
        encoder,
        programs,
        params,
        list(enumerate(inputs.prompts))[:7],
        responses=2,
        sampling=Sampling.of(1.0),
        key=stream_key(0, "responses", 1),
    )
    result = {
        "scores": scoring.score_answers(encoder, programs, params, heldout_items(setup))["logps"],
        "verdicts": judged.verdicts,
        "mass": judged.mass,
        "sampled_logps": np.array([row["logprob"] for row in rows]),
        "sampled": np.array([row["response_ids"] + [-1] * (12 - len(row["response_ids"])) for row in rows]),
    }
    trained, specs = train(setup)
    for name in ("params", "opt_state"):
        sizes = [(here, everywhere) for key, (_, _, here, everywhere) in specs.items() if f"['{name}']" in key]
        result[f"{name} share"] = np.divide(*map(sum, zip(*sizes)))
    return result | trained


def train(setup):
    """What a mesh must not change after three steps: name -> array.

    And of everything that is kept: place -> (shape, axes of the mesh, bytes on the first device, bytes).
    """
    trainer, frozen, dataset = setup.programs.optimise, setup.parameters.frozen, make_dataset(setup)
    state = trainer.init(setup.parameters.initial())
    result = {}
    for step in range(3):
        batch, key = put_batch(dataset[step], trainer.mesh), trainer.dropout_key(0, 1, step)
        state, output = trainer.step(state, frozen, batch, np.float32(1e-3), key)
        result |= {f"{step}/{name}": np.asarray(value) for name, value in output.metrics.items()}
        order = np.argsort(output.decisions["place"])
        result |= {f"{step}/{name}": np.asarray(value)[order] for name, value in output.decisions.items()}
    for path, value in jax.tree_util.tree_leaves_with_path(host(state.params)):
        result[f"params{jax.tree_util.keystr(path)}"] = value
    result["steps compiled"] = np.array(trainer.step._cache_size())
    specs = {}
    for path, value in jax.tree_util.tree_leaves_with_path({"frozen": frozen, "state": state._asdict()}):
        axes = tuple(value.sharding.spec) + (None,) * (value.ndim - len(value.sharding.spec))
        here = value.addressable_shards[0].data.nbytes
        specs[jax.tree_util.keystr(path)] = value.shape, axes, here, value.nbytes
    return result, specs


def products():
    """Rows times a table on two meshes, once more with each device's rows in another order, and the expected values."""
    rng = np.random.default_rng(0)
    x_BD, table_VD = (rng.standard_normal((rows, 48)).astype(np.float32) for rows in (32, 37))
    found = {"expected": x_BD.astype(np.float64) @ table_VD.T}
    for sizes in ((2, 2, 2), (1, 8, 1)):
        layout = Layout(meshes.make_mesh(MeshConfig(*sizes)))
        project = jax.jit(layout.project)
        of_device = rng.permutation(4)
        order = np.concatenate([4 * device + of_device for device in range(8)])
        found[sizes] = np.asarray(project(x_BD, table_VD)), np.asarray(project(x_BD[order], table_VD)), order
    return found


def on_meshes(config, adapted):
    """In a process with 8 devices: `everything` by mesh, with adapters `train`, meshes' shapes, a refusal."""
    results = {mesh: everything(on_mesh(config, *mesh)) for mesh in MESHES}
    results["adapters"] = train(on_mesh(adapted, 2, 2, 2))
    for packing in PACKED:
        results[packing] = train(on_mesh(changed(config, text=dict(packing=packing)), 2, 2, 2))
    results["products"] = products()
    results["shapes"] = [
        tuple(meshes.make_mesh(MeshConfig(*sizes)).shape.values()) for sizes in ((-1, 2, 2), (2, -1, 1), (1, 2, -1))
    ]
    try:
        on_mesh(changed(config, sample=dict(batch_size=12)), -1, 1, 1)
    except InputError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def config(world_dir, tiny_config):
    return tiny_config(world_dir, training=TRAINING)


@pytest.fixture(scope="module")
def adapted(world_dir, tiny_config, tmp_path_factory):
    return dropping_config(tiny_config, world_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def sharded(config, adapted):
    """`on_meshes`."""
    return on_eight_devices(on_meshes, config, adapted)


@pytest.fixture(scope="module")
def alone(config):
    return everything(on_mesh(config, 1, 1, 1))


def assert_same_result(found, alone):
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        if name.endswith(" share"):
            continue
        atol = 1e-4 if name.startswith("params") else 1e-5
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=atol, err_msg=name)
    losses = [f"{step}/loss" for step in range(3)]
    np.testing.assert_allclose([found[x] for x in losses], [alone[x] for x in losses], rtol=1e-5)
    assert found["steps compiled"] == 1


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_a_mesh_does_not_change_the_result(sharded, alone, mesh):
    np.testing.assert_array_equal(sharded[mesh]["sampled"], alone["sampled"])
    assert_same_result(sharded[mesh], alone)


@pytest.mark.parametrize("packing", PACKED)
def test_packed_rows_on_a_mesh_give_the_result_of_padded_ones_on_a_device(sharded, alone, packing):
    found, _ = sharded[packing]
    # Rows that share their beginning have fewer tokens.
    own = ("/filled", "/tokens", "steps compiled")
    of_training = {name: alone[name] for name in found if not name.endswith(own)}
    for name, value in of_training.items():
        atol = 1e-4 if name.startswith("params") else 1e-5
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=atol, err_msg=name)
    assert all(0.5 < found[f"{step}/filled"] < 1 for step in range(3))


def test_where_a_row_lies_on_its_device_changes_no_bit_of_its_logits(sharded):
    found = dict(sharded["products"])
    expected = found.pop("expected")
    for values, moved, order in found.values():
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(moved, values[order])


def test_fsdp_splits_parameters_and_optimiser(sharded, alone):
    for part in ("params", "opt_state"):
        assert alone[f"{part} share"] == sharded[8, 1, 1][f"{part} share"] == 1
        assert 1 / 8 < sharded[1, 8, 1][f"{part} share"] < 1.1 / 8
        # The embedding is split over fsdp only, all other matrices over tensor too.
        assert 1 / 4 < sharded[2, 2, 2][f"{part} share"] < 1 / 3


def test_a_mesh_does_not_change_what_adapters_learn(sharded, adapted):
    found, _ = sharded["adapters"]
    alone, _ = train(on_mesh(adapted, 1, 1, 1))
    assert_same_result(found, alone)


def test_adapters_are_split_as_the_layers_that_they_adapt(sharded):
    _, specs = sharded["adapters"]
    split = 0
    for module, name in LINEARS.values():
        place = f"['layers']['{module}']['{name}']"
        shape, weight, *_ = specs[f"['frozen']{place}['weight']"]
        a_shape, a, *_ = specs[f"['state']['params']{place}['lora_a']"]
        b_shape, b, *_ = specs[f"['state']['params']{place}['lora_b']"]
        inputs, out = len(a_shape) - 2, len(b_shape) - 2
        assert shape == (2, *b_shape[1:-1], *a_shape[2:])
        assert a == (None, None, *weight[1 + out :]) and b == (*weight[: 1 + out], None)
        assert "fsdp" in weight and "tensor" in weight and inputs + out + 1 == len(weight)
        moments = [spec for key, (_, spec, *_) in specs.items() if "opt_state" in key and f"{place}['lora_a']" in key]
        assert moments == [a, a]
        split += sum(axis is not None for axis in (*a, *b))
    assert split == 2 * len(LINEARS)


@pytest.mark.slow
def test_muon_on_a_mesh_is_muon(world_dir, tiny_config):
    """A matrix that lies on several devices is made orthogonal as a whole, and its moment lies as it does."""
    config = tiny_config(world_dir, training=dict(optimizer="muon", **TRAINING))
    found, specs = on_eight_devices(train_sharded, config)
    assert_same_result(found, train(on_mesh(config, 1, 1, 1))[0])
    for place in ("['layers']['attention']['o']['weight']", "['layers']['mlp']['up']['weight']", "['embed']"):
        _, param, *_ = specs[f"['state']['params']{place}"]
        moments = [spec for key, (_, spec, *_) in specs.items() if "opt_state" in key and key.endswith(place)]
        assert moments == [param] * (2 if place == "['embed']" else 1) and "fsdp" in str(param)


def test_the_mesh_takes_what_is_left(sharded):
    assert sharded["shapes"] == [(2, 2, 2), (2, 4, 1), (1, 2, 4)]


def test_a_batch_must_divide(sharded):
    assert sharded["error"] == (
        "sample.batch_size 12 does not divide into 8 batch shards of the mesh (data x fsdp); 8 or 16 would, "
        "or with 12 as it is a mesh whose data x fsdp is 1, 2 or 4"
    )


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((2, 1, 1), "does not make the 1 devices"),
        ((-1, 3, 1), "does not make the 1 devices"),
        ((-1, -1, 1), "at most one of them -1"),
        ((0, 1, 1), "must be positive"),
        ((1, 1, -2), "must be positive"),
    ],
)
def test_mesh_errors(sizes, message):
    with pytest.raises(InputError, match=message):
        meshes.make_mesh(MeshConfig(*sizes))


# --- the factored optimiser -------------------------------------------------------------------------------------------


def train_sharded(config):
    return train(on_mesh(config, 2, 2, 2))


@pytest.mark.slow
def test_factored_moments_lie_on_every_device_and_change_nothing(world_dir, tiny_config, tmp_path):
    """All parameters of a model that is wide enough to be factored."""
    hf_config = weights.hf_config(world_dir / "model") | dict(hidden_size=128, intermediate_size=160)
    arch = families.read(hf_config, "config.json")
    params = jax.tree.map(
        lambda p: np.asarray(3 * p if p.ndim > 2 else p), decoder.define(arch).init(jax.random.key(0))
    )
    weights.save(tmp_path / "model", arch, params, config=hf_config, source=world_dir / "model")
    config = tiny_config(
        world_dir, model=dict(path=str(tmp_path / "model")), training=dict(optimizer="adafactor", **TRAINING)
    )
    found, specs = on_eight_devices(train_sharded, config)
    assert_same_result(found, train(on_mesh(config, 1, 1, 1))[0])
    gate = {key: value for key, value in specs.items() if "opt_state" in key and "['gate']" in key}
    assert sorted(shape for shape, *_ in gate.values()) == [(1,), (2, 128), (2, 160)]
    assert all(set(spec) <= {None} for _, spec, *_ in gate.values())
    # One that is too narrow to be factored lies as its parameter does.
    (narrow,) = [
        spec for key, (shape, spec, *_) in specs.items() if "opt_state" in key and "['q']" in key and len(shape) > 1
    ]
    assert narrow == specs["['state']['params']['layers']['attention']['q']['weight']"][1] and "fsdp" in narrow
