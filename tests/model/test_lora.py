"""Training with adapters: what is trained, dropout, the factored optimiser, precision, memory, a mesh, resuming.

The world's model has no adapter; the one that most tests go on from is random, so that both its matrices have gradients.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_engine import (
    STEPS,
    Stage,
    StopsAfter,
    assert_same_bytes,
    host,
    make_dataset,
    make_session,
)

from scir_jax.config.schema import Config, MeshConfig, OptimizerConfig
from scir_jax.data.batches import Targets, TrainBatch
from scir_jax.engine import mesh as meshes
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.engine.trainer import Trainer, make_optimizer
from scir_jax.errors import Interrupted
from scir_jax.run import sampling, scoring
from scir_jax.model.hf import adapters, weights
from scir_jax.model import decoder, layers, lora
from scir_jax.model import families
from scir_jax.model.architecture import LINEARS, Architecture, Layer
from tests.processes import on_eight_devices, quick_jit

pytestmark = pytest.mark.usefixtures("cheap_compilation")

RATE = np.float32(1e-2)
SETTINGS = lora.Lora(3, 6.0, tuple(LINEARS))
MISTRAL_7B = Architecture("mistral", 32000, 4096, 14336, 32, 8, 128, layers=(Layer(4096),) * 32)


def write_adapter(directory, arch, settings):
    rng = np.random.default_rng(5)
    abstract = lora.split(decoder.define(arch, lora=settings).abstract(), settings)[0]
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), abstract)
    adapters.save(directory, arch, settings, params, base_model="world")
    return str(directory)


@pytest.fixture(scope="module")
def configure(world_dir, tiny_config, tmp_path_factory):
    """configure(dropout=0.0, **overrides) -> a configuration that goes on from a random adapter."""
    arch = families.read(weights.hf_config(world_dir / "model"), "config.json")
    directories = {}

    def make(dropout=0.0, **overrides):
        if dropout not in directories:
            settings = dataclasses.replace(SETTINGS, dropout=dropout)
            directories[dropout] = write_adapter(tmp_path_factory.mktemp("adapter"), arch, settings)
        return tiny_config(world_dir, lora=dict(adapter=directories[dropout]), **overrides)

    return make


@pytest.fixture(scope="module")
def session(configure):
    return make_session(configure())


@pytest.fixture(scope="module")
def dropping(configure):
    """A session whose adapters drop half of their inputs in training."""
    return make_session(configure(0.5))


def batch_of(session, number=0):
    return put_batch(make_dataset(session)[number], session.mesh)


def whole(session):
    return lora.join(session.initial_params(), session.frozen)


def gradients(trainer):
    """Jitted (trained, frozen, batch, key) -> ((loss, sums), gradients)."""

    def loss(*arguments):
        value, (sums, _) = trainer.loss(*arguments)
        return value, sums

    return quick_jit(jax.value_and_grad(loss, has_aux=True))


def nbytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- what is trained --------------------------------------------------------------------------------------------------


def test_only_adapters_are_trained(session):
    trainer, frozen = session.trainer, session.frozen
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(frozen)}
    assert names == {"weight", "scale", "embed", "head"} - ({"head"} if session.arch.tie_embeddings else set())
    before, start = host(frozen), session.initial_params()
    first = host(start)
    state = trainer.init(start)
    for number in range(2):
        state, output = trainer.step(state, frozen, batch_of(session, number), RATE, None)
        assert output.metrics["skipped"] == 0
    assert_same_bytes(session.frozen, before)
    trained = jax.tree_util.tree_leaves_with_path(state.params)
    assert len(trained) == 2 * len(LINEARS) and {path[-1].key for path, _ in trained} == {"lora_a", "lora_b"}
    for (path, x), y in zip(trained, jax.tree.leaves(first), strict=True):
        assert np.abs(np.asarray(x) - y).min() > 1e-4, jax.tree_util.keystr(path)
    # The moments of the adapters, and two counts.
    assert nbytes(state.opt_state) == 2 * nbytes(state.params) + 4


def test_a_fresh_adapter_changes_nothing(world_dir, tiny_config):
    plain = make_session(tiny_config(world_dir))
    fresh = make_session(tiny_config(world_dir, lora=dict(rank=2, targets=("q_proj", "down_proj"))))
    trained = fresh.initial_params()
    query = host(trained["layers"]["attention"]["q"])
    assert not query["lora_b"].any() and len(np.unique(query["lora_a"])) == query["lora_a"].size
    assert np.abs(query["lora_a"]).max() <= fresh.arch.hidden_size**-0.5
    other = make_session(tiny_config(world_dir, lora=dict(rank=2), run=dict(seed=1))).initial_params()
    assert not np.array_equal(other["layers"]["attention"]["q"]["lora_a"], query["lora_a"])
    ids = np.arange(20).reshape(2, 10)
    expected = quick_jit(plain.model.hidden)(plain.import_params(Path(plain.config.model.path)), ids)
    np.testing.assert_array_equal(quick_jit(fresh.model.hidden)(whole(fresh), ids), expected)


def test_split_and_join():
    params = {"embed": 1, "layers": {"a": {"weight": 2, "lora_a": 3, "lora_b": 4}, "b": {"weight": 5}}, "head": 6}
    trained, frozen = lora.split(params, SETTINGS)
    assert trained == {"layers": {"a": {"lora_a": 3, "lora_b": 4}}}
    assert frozen == {"embed": 1, "layers": {"a": {"weight": 2}, "b": {"weight": 5}}, "head": 6}
    assert lora.join(trained, frozen) == params
    assert lora.split(params, None) == (params, {}) and lora.join(params, {}) == params


def test_accumulation_and_rematerialisation_do_not_change_gradients(session, configure):
    batch = make_dataset(session)[2]
    batch.pairs.weight[[2, 3, 7]] = 0
    trained, frozen = session.initial_params(), session.frozen
    (loss, sums), grads = gradients(session.trainer)(trained, frozen, batch, None)
    trainer = make_session(configure(optimizer=dict(accumulate=4), model=dict(remat="full"))).trainer
    (other_loss, other_sums), other_grads = gradients(trainer)(trained, frozen, batch, None)
    assert other_loss == pytest.approx(float(loss), rel=1e-5)
    for name, (_, count) in sums.items():
        np.testing.assert_array_equal(other_sums[name][1], count, err_msg=name)
    for x, y in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * np.abs(y).max())


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_keeps_the_expectation():
    settings = lora.Lora(2, 3.0, ("q_proj",), dropout=0.25)
    linear = layers.Linear({"mlp": 5}, {"embed": 16}, nnx.Rngs(params=0), lora=settings)
    linear.lora_b[...] = jax.random.normal(jax.random.key(1), linear.lora_b.shape)
    x = jax.random.normal(jax.random.key(2), (3, 16))
    definition, state = nnx.split(linear)
    kept = lambda key, rows: functools.partial(layers.Groups(((1, rows),)).kept, key)
    apply = lambda key: nnx.merge(definition, state)(x, kept(key, 3))
    plain = np.asarray(nnx.merge(definition, state)(x))
    assert np.abs(plain - x @ linear.weight[...].T).max() > 0.1
    keys = jax.random.split(jax.random.key(3), 20_000)
    found = np.asarray(jax.jit(jax.vmap(apply))(keys))
    error = found.std(axis=0) / len(keys) ** 0.5
    assert error.min() > 1e-4  # dropout is at work
    np.testing.assert_allclose(found.mean(axis=0), plain, atol=5 * error.max())
    # Of one input, each share of which is kept or not, a quarter is left out.
    one = jax.vmap(lambda key: nnx.merge(definition, state)(jnp.eye(16)[:1], kept(key, 1)))(keys[:4000])
    frozen = linear.weight[...][:, 0]
    assert np.mean(np.all(np.isclose(one[:, 0], frozen, atol=1e-6), axis=1)) == pytest.approx(0.25, abs=0.03)


def test_dropout_differs_by_step_stage_and_seed(dropping, session):
    trainer, batch = dropping.trainer, batch_of(dropping)
    loss = quick_jit(lambda *arguments: trainer.loss(*arguments)[0])
    compute = lambda key: float(loss(dropping.initial_params(), dropping.frozen, batch, key))
    seeded = make_session(dataclasses.replace(dropping.config, run=dataclasses.replace(dropping.config.run, seed=1)))
    keys = [trainer.dropout_key(1, 0), trainer.dropout_key(1, 1), trainer.dropout_key(2, 0)]
    keys.append(seeded.trainer.dropout_key(1, 0))
    found = [compute(key) for key in keys]
    assert len(set(found)) == 4 and compute(trainer.dropout_key(1, 0)) == found[0]
    assert session.trainer.dropout_key(1, 0) is None
    assert compute(None) not in found


def test_layers_drop_out_on_their_own():
    """Two layers with one adapter between them: keys and values of the first position differ by their dropout alone."""
    arch = Architecture("mistral", 20, 16, 16, 2, 2, 8, layers=(Layer(),))
    model = decoder.define(arch, lora=lora.Lora(2, 4.0, tuple(LINEARS), dropout=0.5))
    block = jax.tree.map(lambda p: p[0], quick_jit(model.init)(jax.random.key(0))["layers"])
    block["attention"]["v"] = block["attention"]["k"]
    block["attention"]["k"]["lora_b"] = jnp.ones((2, 8, 2))
    x = jax.random.normal(jax.random.key(2), (1, 4, 16))
    rows = layers.Groups(((1, 4),))
    first = lambda key: (y[0, 0] for y in model._block(block)(x, rows, 0, key)[1])
    np.testing.assert_array_equal(*first(None))
    k, v = first(jax.random.key(1))
    assert np.abs(k - v).max() > 1e-3


@pytest.mark.parametrize("parts", [2, 4])
def test_what_is_dropped_of_a_row_is_the_same_wherever_it_lies(parts):
    shapes, key = ((4, 3), (8, 5)), jax.random.key(0)
    packed, alone = layers.Groups(shapes, parts), layers.Groups(shapes)
    found = packed.kept(key, 0.5, (2, 6))
    assert found.shape == (parts, (4 * 3 + 8 * 5) // parts, 2, 6)
    jax.tree.map(np.testing.assert_array_equal, packed.unpack(found), alone.unpack(alone.kept(key, 0.5, (2, 6))))


def test_scoring_judging_and_sampling_never_drop_out(dropping, session):
    def everything(session):
        params = session.inference_params()
        pairs = [(pair.prompt, pair.a, pair.b) for pair in session.data.heldout_pairs]
        rows = sampling.sample_rows(
            session,
            params,
            list(enumerate(session.data.prompts))[:4],
            responses=2,
            sampling=Sampling.of(1.0),
            key=stream_key(0, "responses", 1),
        )
        logps = scoring.response_logps(session, params, [(p, y) for p, a, b in pairs for y in (a, b)])
        return logps, tuple(scoring.judge_pairs(session, params, pairs)), np.array([row["logprob"] for row in rows])

    assert dropping.model.lora.dropout == 0.5 and session.model.lora.dropout == 0
    jax.tree.map(np.testing.assert_array_equal, everything(dropping), everything(session))


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_adafactor_is_that_of_optax():
    settings = OptimizerConfig(kind="adafactor", clip=2.0)
    ours = make_optimizer(settings)
    theirs = optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adafactor(0.01, multiply_by_parameter_scale=False, clipping_threshold=1.0),
    )
    shapes = {"wide": (2, 130, 150), "low": (2, 4, 150), "scale": (2, 130)}
    rng = np.random.default_rng(0)
    params = expected = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state, their_state = ours.init(params), theirs.init(params)
    assert nbytes(state) < nbytes(params) / 4  # wide is factored
    for step in range(4):
        grads = {name: (step + 1) * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        updates, state = ours.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
        their_updates, their_state = theirs.update(grads, their_state, expected)
        expected = optax.apply_updates(expected, their_updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, expected)


def test_optimiser_state_of_a_7b_model():
    params = decoder.define(MISTRAL_7B).abstract()
    assert nbytes(params) == 4 * MISTRAL_7B.parameter_count() > 28e9

    def state(**settings):
        return nbytes(jax.eval_shape(make_optimizer(OptimizerConfig(**settings)).init, params))

    adamw = state()
    assert adamw == 2 * nbytes(params) + 4
    assert state(moment_dtype="bfloat16") == 1.5 * nbytes(params) + 4
    assert state(kind="adafactor") < 0.05 * adamw
    settings = lora.Lora(16, 16.0, tuple(LINEARS))
    trained = lora.split(decoder.define(MISTRAL_7B, lora=settings).abstract(), settings)[0]
    assert nbytes(trained) == 4 * 41_943_040  # as peft counts for this model


# --- precision --------------------------------------------------------------------------------------------------------


def in_bfloat16(config):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))


def test_dtypes_of_a_run_in_bfloat16(configure):
    session = make_session(in_bfloat16(configure()))
    dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree) if x.ndim}
    assert dtypes(session.frozen) == {"bfloat16"}
    assert dtypes(session.initial_params()) == dtypes(session.abstract_trained) == {"float32"}
    assert dtypes(session.inference_params()) == dtypes(session.abstract_inference) == {"bfloat16"}
    abstract = session.trainer.abstract_state()
    state, output = jax.eval_shape(session.trainer.step, abstract, session.frozen, batch_of(session), RATE, None)
    same_type = lambda x, y: x.dtype == y.dtype and x.shape == y.shape
    assert all(jax.tree.leaves(jax.tree.map(same_type, abstract, state)))
    assert dtypes(state.params) == dtypes(state.opt_state) == {"float32"}
    assert output.metrics["loss"].dtype == np.float32


def test_models_loaded_in_bfloat16_score_as_float32_masters(world_dir, tiny_config, tmp_path):
    session = make_session(in_bfloat16(tiny_config(world_dir)))
    store = ModelStore(tmp_path)
    store.save(0, jax.tree.map(lambda p: p * 1.01, session.initial_params()))  # nothing is a bfloat16 number any more
    pairs = [(pair.prompt, pair.a, pair.b) for pair in session.data.heldout_pairs]
    found = []
    for abstract in (session.abstract_trained, session.abstract_inference):
        params = store.load(0, abstract)
        logps = scoring.response_logps(session, params, [(p, y) for p, a, b in pairs for y in (a, b)])
        found.append((logps, tuple(scoring.judge_pairs(session, params, pairs))))
    assert {str(p.dtype) for p in jax.tree.leaves(params)} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_norms_offset_is_added_to_the_rounded_scale():
    """Gemma's final norm too: its scale in float32 and in bfloat16 give the same."""
    arch = Architecture("gemma2", 20, 16, 16, 2, 2, 8, layers=(Layer(),), norm_offset=1.0, post_norms=True)
    model = decoder.define(arch, compute_dtype="bfloat16")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), model.abstract())
    hidden = quick_jit(model.hidden)
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    np.testing.assert_array_equal(hidden(params, np.arange(10)[None]), hidden(rounded, np.arange(10)[None]))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_a_frozen_head_has_no_gradient_in_memory(tied):
    """The gradient of the head is made beside that of the hidden states; where nobody asks for it, it must not be."""
    arch = Architecture("llama", 65536, 64, 64, 4, 2, 16, layers=(Layer(),), tie_embeddings=tied, final_cap=30.0)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)  # so few that their logits are small beside the head
    targets = Targets(ids, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    temporary = {}
    for settings in (None, lora.Lora(2, 4.0, ("q_proj",))):
        model = decoder.define(arch, lora=settings)
        trainer = Trainer(
            Config(), model, meshes.make_mesh(MeshConfig()), verdict_ids=(), continued=False, response_tokens=4
        )
        frozen = lora.split(model.abstract(), settings)[1]
        lowered = trainer.step.lower(trainer.abstract_state(), frozen, TrainBatch(None, targets, None), RATE, None)
        temporary[settings is None] = lowered.compile().memory_analysis().temp_size_in_bytes
    head = 4 * arch.vocab_size * arch.hidden_size
    assert temporary[False] < 0.75 * head < head < temporary[True]


# --- a mesh -----------------------------------------------------------------------------------------------------------


def train(config, mesh=(1, 1, 1)):
    """What a mesh must not change after three steps: name -> array; and the shardings of what is trained."""
    session = make_session(config, **dict(zip(("data", "fsdp", "tensor"), mesh)))
    trainer, frozen = session.trainer, session.frozen
    state = trainer.init(session.initial_params())
    result = {}
    for step in range(3):
        batch, key = batch_of(session, step), trainer.dropout_key(1, step)
        state, output = trainer.step(state, frozen, batch, np.float32(1e-3), key)
        result |= {f"{step}/{name}": np.asarray(value) for name, value in output.metrics.items()}
        result |= {f"{step}/{name}": np.asarray(value) for name, value in output.decisions.items()}
    for path, value in jax.tree_util.tree_leaves_with_path(host(state.params)):
        result[f"params{jax.tree_util.keystr(path)}"] = value
    result["steps compiled"] = np.array(trainer.step._cache_size())
    specs = {
        jax.tree_util.keystr(path): (
            value.shape,
            tuple(value.sharding.spec) + (None,) * (value.ndim - len(value.sharding.spec)),
        )
        for path, value in jax.tree_util.tree_leaves_with_path({"frozen": frozen, "state": state._asdict()})
    }
    return result, specs


@pytest.fixture(scope="module")
def configurations(configure, world_dir, tiny_config, tmp_path_factory):
    """Adapters with dropout and a bfloat16 moment; all parameters, of a model wide enough to be factored."""
    wide = tmp_path_factory.mktemp("wide")
    config = weights.hf_config(world_dir / "model") | dict(hidden_size=128, intermediate_size=160)
    arch = families.read(config, "config.json")
    params = jax.tree.map(
        lambda p: np.asarray(3 * p if p.ndim > 2 else p), decoder.define(arch).init(jax.random.key(0))
    )
    weights.save(wide / "model", arch, params, config=config, source=world_dir / "model")
    common = dict(clip=0.5, weight_decay=0.1)
    adapted = configure(0.5)
    adapted = dataclasses.replace(adapted, optimizer=OptimizerConfig(moment_dtype="bfloat16", **common))
    factored = tiny_config(world_dir, model=dict(path=str(wide / "model")), optimizer=dict(kind="adafactor", **common))
    return {"adapters": adapted, "adafactor": factored}


@pytest.fixture(scope="module")
def sharded(configurations):
    """sharded(name) -> the result of `train` with a configuration on 2 x 2 x 2 devices."""
    return functools.cache(lambda name: on_eight_devices(train, configurations[name], (2, 2, 2)))


@pytest.mark.parametrize("name", ["adapters", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_a_mesh_does_not_change_the_result(name, sharded, configurations):
    found, _ = sharded(name)
    alone, _ = train(configurations[name])
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-4 if "params" in key else 1e-5, err_msg=key)
    assert found["steps compiled"] == 1


def test_adapters_are_split_as_the_layers_that_they_adapt(sharded):
    _, specs = sharded("adapters")
    split = 0
    for module, name in LINEARS.values():
        place = f"['layers']['{module}']['{name}']"
        shape, weight = specs[f"['frozen']{place}['weight']"]
        a_shape, a = specs[f"['state']['params']{place}['lora_a']"]
        b_shape, b = specs[f"['state']['params']{place}['lora_b']"]
        inputs, out = len(a_shape) - 2, len(b_shape) - 2
        assert shape == (2, *b_shape[1:-1], *a_shape[2:])
        assert a == (None, None, *weight[1 + out :]) and b == (*weight[: 1 + out], None)
        assert "fsdp" in weight and "tensor" in weight and inputs + out + 1 == len(weight)
        moments = [spec for key, (_, spec) in specs.items() if "opt_state" in key and f"{place}['lora_a']" in key]
        assert moments == [a, a]
        split += sum(axis is not None for axis in (*a, *b))
    assert split == 2 * len(LINEARS)


@pytest.mark.slow
def test_factored_moments_lie_on_every_device(sharded):
    _, specs = sharded("adafactor")
    gate = {key: value for key, value in specs.items() if "opt_state" in key and "['gate']" in key}
    assert sorted(shape for shape, _ in gate.values()) == [(1,), (2, 128), (2, 160)]
    assert all(set(spec) <= {None} for _, spec in gate.values())
    # One that is too narrow to be factored lies as its parameter does.
    (narrow,) = [
        spec for key, (shape, spec) in specs.items() if "opt_state" in key and "['q']" in key and len(shape) > 1
    ]
    assert narrow == specs["['state']['params']['layers']['attention']['q']['weight']"][1] and "fsdp" in narrow


# --- a stage that is stopped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(3,), pytest.param((1, 1), marks=pytest.mark.slow)], ids=["once", "twice"])
def test_a_stopped_stage_with_dropout_goes_on_to_the_bit(dropping, tmp_path, stops, finished):
    stage = Stage(dropping, tmp_path / "run")
    for step in stops:
        with pytest.raises(Interrupted):
            stage(StopsAfter(step))
    kept = stage.checkpoint()
    assert kept[0] == sum(stops) and kept[1].params.keys() == {"layers"}
    stage(StopsAfter())
    assert_same_bytes(stage.params(), finished.params())
    assert stage.rows() == finished.rows() and len(stage.rows()) == 2 + STEPS
    assert stage.decisions.read_bytes() == finished.decisions.read_bytes()


@pytest.fixture(scope="module")
def finished(dropping, tmp_path_factory):
    """A stage that nothing stopped."""
    stage = Stage(dropping, tmp_path_factory.mktemp("finished") / "run")
    stage(StopsAfter())
    return stage
