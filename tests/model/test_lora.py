"""Training with adapters: what is trained, dropout, precision, memory.

The world's model has no adapter; the one that most tests go on from is random: both its matrices have gradients.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scir_jax.config.schema import MeshConfig, TrainingConfig
from scir_jax.engine import losses
from scir_jax.engine import mesh as meshes
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.engine.trainer import Trainer
from scir_jax.model import decoder, layers, lora
from scir_jax.model.architecture import LINEARS, Architecture, Layer
from scir_jax.run import sampling, scoring
from scir_jax.run.setup import prepare
from tests.processes import quick_jit
from tests.training import (
    ADAPTERS,
    assert_same_bytes,
    batch_of,
    changed,
    dropping_config,
    heldout_items,
    host,
    make_dataset,
    supervised_step,
    whole,
    write_adapter,
)

pytestmark = pytest.mark.usefixtures("cheap_compilation")

RATE = np.float32(1e-2)


@pytest.fixture(scope="module")
def config(world_dir, tiny_config, tmp_path_factory):
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), world_dir)
    return tiny_config(world_dir, lora=dict(adapter=str(adapter)))


@pytest.fixture(scope="module")
def setup(config):
    return prepare(config)


@pytest.fixture(scope="module")
def dropping(world_dir, tiny_config, tmp_path_factory):
    """Adapters that drop half of their inputs in training."""
    return prepare(dropping_config(tiny_config, world_dir, tmp_path_factory.mktemp("dropping")))


def nbytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- what is trained --------------------------------------------------------------------------------------------------


def test_only_adapters_are_trained(setup):
    trainer, frozen, arch = setup.programs.optimise, setup.parameters.frozen, setup.programs.arch
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(frozen)}
    assert names == {"weight", "scale", "embed", "head"} - ({"head"} if arch.tie_embeddings else set())
    before, start = host(frozen), setup.parameters.initial()
    first = host(start)
    state = trainer.init(start)
    for number in range(2):
        state, output = trainer.step(state, frozen, batch_of(setup, number), RATE, None)
        assert output.metrics["skipped"] == 0
    assert_same_bytes(setup.parameters.frozen, before)
    trained = jax.tree_util.tree_leaves_with_path(state.params)
    assert len(trained) == 2 * len(LINEARS) and {path[-1].key for path, _ in trained} == {"lora_a", "lora_b"}
    for (path, x), y in zip(trained, jax.tree.leaves(first), strict=True):
        assert np.abs(np.asarray(x) - y).min() > 1e-4, jax.tree_util.keystr(path)
    # The moments of the adapters, and two counts.
    assert nbytes(state.opt_state) == 2 * nbytes(state.params) + 4


def test_a_fresh_adapter_changes_nothing(world_dir, tiny_config):
    plain = prepare(tiny_config(world_dir))
    fresh = prepare(tiny_config(world_dir, lora=dict(rank=2, targets=("q_proj", "down_proj"))))
    trained = fresh.parameters.initial()
    query = host(trained["layers"]["attention"]["q"])
    assert not query["lora_b"].any() and len(np.unique(query["lora_a"])) == query["lora_a"].size
    assert np.abs(query["lora_a"]).max() <= fresh.programs.arch.hidden_size**-0.5
    other = prepare(tiny_config(world_dir, lora=dict(rank=2), run=dict(seed=1))).parameters.initial()
    assert not np.array_equal(other["layers"]["attention"]["q"]["lora_a"], query["lora_a"])
    ids = np.arange(20).reshape(2, 10)
    expected = quick_jit(plain.programs.model.hidden)(plain.parameters.initial(), ids)
    np.testing.assert_array_equal(quick_jit(fresh.programs.model.hidden)(whole(fresh), ids), expected)


def test_split_and_join():
    params = {"embed": 1, "layers": {"a": {"weight": 2, "lora_a": 3, "lora_b": 4}, "b": {"weight": 5}}, "head": 6}
    trained, frozen = lora.split(params, ADAPTERS)
    assert trained == {"layers": {"a": {"lora_a": 3, "lora_b": 4}}}
    assert frozen == {"embed": 1, "layers": {"a": {"weight": 2}, "b": {"weight": 5}}, "head": 6}
    assert lora.join(trained, frozen) == params
    assert lora.split(params, None) == (params, {}) and lora.join(params, {}) == params


@pytest.mark.slow
def test_accumulation_and_rematerialisation_do_not_change_gradients(setup, config):
    def gradients(programs):
        """Jitted (trained, frozen, batch) -> ((loss, (sums, decisions)), gradients)."""
        return quick_jit(jax.value_and_grad(programs.optimise.value, has_aux=True))

    def third(of):
        batch = make_dataset(of)[2]
        batch.pairs.weight[[2, 3, 7]] = 0
        return batch

    trained, frozen = setup.parameters.initial(), setup.parameters.frozen
    (loss, (sums, _)), grads = gradients(setup.programs)(trained, frozen, third(setup))
    other = prepare(changed(config, training=dict(accumulate=4), model=dict(remat="full")))
    (other_loss, (other_sums, _)), other_grads = gradients(other.programs)(trained, frozen, third(other))
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
    found = np.asarray(quick_jit(jax.vmap(apply))(keys))
    error = found.std(axis=0) / len(keys) ** 0.5
    assert error.min() > 1e-4  # dropout is at work
    np.testing.assert_allclose(found.mean(axis=0), plain, atol=5 * error.max())
    # Of one input, each share of which is kept or not, a quarter is left out.
    one = quick_jit(jax.vmap(lambda key: nnx.merge(definition, state)(jnp.eye(16)[:1], kept(key, 1))))(keys[:4000])
    frozen = linear.weight[...][:, 0]
    assert np.mean(np.all(np.isclose(one[:, 0], frozen, atol=1e-6), axis=1)) == pytest.approx(0.25, abs=0.03)


def test_dropout_differs_by_step_stage_and_seed(dropping, setup):
    trainer, frozen, batch = dropping.programs.optimise, dropping.parameters.frozen, batch_of(dropping)
    loss = quick_jit(lambda *arguments: trainer.value(*arguments)[0])
    compute = lambda key: float(loss(dropping.parameters.initial(), frozen, batch, key))
    keys = [trainer.dropout_key(*place) for place in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))]
    found = [compute(key) for key in keys]
    assert len(set(found)) == 4 and compute(trainer.dropout_key(0, 1, 0)) == found[0]
    # The same adapters in a model that drops nothing out.
    plain = setup.programs.optimise
    assert plain.dropout_key(0, 1, 0) is None
    _, output = plain.step(plain.init(setup.parameters.initial()), frozen, batch, RATE, None)
    assert np.abs(np.array(found) - float(output.metrics["loss"])).min() > 1e-3


def test_layers_drop_out_on_their_own():
    """Two layers with one adapter between them: keys and values of the first position differ by their dropout alone."""
    arch = Architecture("mistral", 20, 16, 16, 2, 2, 8, layers=(Layer(),))
    model = decoder.define(arch, lora=lora.Lora(2, 4.0, tuple(LINEARS), dropout=0.5))
    block = jax.tree.map(lambda p: p[0], quick_jit(model.init)(jax.random.key(0))["layers"])
    block["attention"]["v"] = block["attention"]["k"]
    block["attention"]["k"]["lora_b"] = jnp.ones((2, 8, 2))
    x = jax.random.normal(jax.random.key(2), (1, 4, 16))
    rows = layers.Groups(((1, 4),))
    first = quick_jit(lambda key: [y[0, 0] for y in model._block(block)(x, rows, 0, key)[1]])
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


def test_scoring_judging_and_sampling_never_drop_out(dropping, setup):
    def everything(setup):
        encoder, inputs, programs, parameters = setup
        params = parameters.configured()
        rows = sampling.sample_rows(
            encoder,
            programs,
            params,
            list(enumerate(inputs.prompts))[:4],
            responses=2,
            sampling=Sampling.of(1.0),
            key=stream_key(0, "responses", 1),
        )
        scores = scoring.score_answers(encoder, programs, params, heldout_items(setup))
        judged = scoring.judge_pairs(encoder, programs, params, inputs.heldout_pairs)
        return scores, tuple(judged), np.array([row["logprob"] for row in rows])

    assert dropping.programs.model.lora.dropout == 0.5 and setup.programs.model.lora.dropout == 0
    jax.tree.map(np.testing.assert_array_equal, everything(dropping), everything(setup))


# --- precision --------------------------------------------------------------------------------------------------------


def test_dtypes_of_a_run_in_bfloat16(config):
    setup = prepare(changed(config, model=dict(dtype="bfloat16")))
    programs, parameters = setup.programs, setup.parameters
    dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree) if x.ndim}
    assert dtypes(parameters.frozen) == {"bfloat16"}
    assert dtypes(parameters.initial()) == dtypes(programs.abstract_trained) == {"float32"}
    assert dtypes(parameters.configured()) == dtypes(programs.abstract_inference) == {"bfloat16"}
    abstract = programs.optimise.abstract_state()
    state, output = jax.eval_shape(programs.optimise.step, abstract, parameters.frozen, batch_of(setup), RATE, None)
    same_type = lambda x, y: x.dtype == y.dtype and x.shape == y.shape
    assert all(jax.tree.leaves(jax.tree.map(same_type, abstract, state)))
    assert dtypes(state.params) == dtypes(state.opt_state) == {"float32"}
    assert output.metrics["loss"].dtype == np.float32


def test_models_loaded_in_bfloat16_score_as_float32_masters(world_dir, tiny_config, tmp_path):
    setup = prepare(changed(tiny_config(world_dir), model=dict(dtype="bfloat16")))
    encoder, inputs, programs, parameters = setup
    store = ModelStore(tmp_path)
    store.save(0, jax.tree.map(lambda p: p * 1.01, parameters.initial()))  # nothing is a bfloat16 number any more
    found = []
    for abstract in (programs.abstract_trained, programs.abstract_inference):
        params = store.load(0, abstract)
        scores = scoring.score_answers(encoder, programs, params, heldout_items(setup))
        found.append((scores, tuple(scoring.judge_pairs(encoder, programs, params, inputs.heldout_pairs))))
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
    batch = jax.eval_shape(lambda ids: supervised_step(ids, np.ones((1, 4))), ids)
    temporary = {}
    for settings in (None, lora.Lora(2, 4.0, ("q_proj",))):
        model = decoder.define(arch, lora=settings)
        trainer = Trainer(TrainingConfig(), losses.supervised(model), model, meshes.make_mesh(MeshConfig()))
        frozen = lora.split(model.abstract(), settings)[1]
        lowered = trainer.step.lower(trainer.abstract_state(), frozen, batch, RATE, None)
        temporary[settings is None] = lowered.compile().memory_analysis().temp_size_in_bytes
    head = 4 * arch.vocab_size * arch.hidden_size
    assert temporary[False] < 0.75 * head < head < temporary[True]
