"""The training step: its optimiser, what may not change its result, and steps that are not finite."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scir_jax.config.schema import TrainingConfig
from scir_jax.data.pipelines import supervised_batches
from scir_jax.engine.checkpoint import ModelStore, StageCheckpoints
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.optimizer import learning_rates, make_optimizer
from scir_jax.model import decoder, lora
from scir_jax.model.architecture import LINEARS, Architecture, Layer
from scir_jax.run.setup import prepare
from tests.processes import quick_jit
from tests.training import STEPS, TRAINING, assert_same_bytes, batch_of, broken, changed, host, make_dataset

pytestmark = pytest.mark.usefixtures("few_functions", "cheap_compilation")

MISTRAL_7B = Architecture("mistral", 32000, 4096, 14336, 32, 8, 128, layers=(Layer(4096),) * 32)


@pytest.fixture(scope="module")
def config(world_dir, tiny_config):
    return tiny_config(world_dir, training=TRAINING)


@pytest.fixture(scope="module")
def setup(config):
    return prepare(config)


@pytest.fixture(scope="module")
def fresh(setup):
    """fresh() -> M0's parameters."""
    params = host(setup.parameters.initial())
    return lambda: jax.tree.map(jnp.array, params)


@pytest.fixture(scope="module")
def gradients(config, fresh):
    """gradients(batch, params=None, model=dict(...), ...) -> (loss, sums, gradients), compiled once a configuration."""
    compiled = {}

    def compute(batch, params=None, **changes):
        name = str((changes, batch.pairs is None))
        if name not in compiled:
            programs = prepare(changed(config, **changes)).programs
            trainer = programs.sft if batch.pairs is None else programs.optimise
            compiled[name] = quick_jit(lambda p, b: trainer.value_and_grad(p, {}, b))
        (loss, (sums, _)), grads = compiled[name](fresh() if params is None else params, batch)
        return float(loss), host(sums), host(grads)

    return compute


def nbytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- the step ---------------------------------------------------------------------------------------------------------


def test_a_step_is_compiled_once(setup, fresh, tmp_path):
    trainer, mesh, dataset = setup.programs.optimise, setup.programs.mesh, make_dataset(setup)
    rates = learning_rates(trainer.settings, 1e-3, STEPS)
    store, checkpoints = ModelStore(tmp_path / "models"), StageCheckpoints(tmp_path / "stage", 1)
    store.save(1, fresh())
    for iteration in range(2):
        state = trainer.init(store.load(1, setup.programs.abstract_trained) if iteration else fresh())
        for step in range(2):
            state, _ = trainer.step(state, {}, put_batch(dataset[step], mesh), (1 + iteration) * rates[step], None)
    checkpoints.save(2, state, {"data": {"next_index": 2}})
    checkpoints.wait()
    _, state, _ = checkpoints.restore(trainer.abstract_state())
    trainer.step(state, {}, put_batch(dataset[2], mesh), rates[2], None)
    checkpoints.close()
    assert trainer.step._cache_size() == 1


def test_the_step_is_adamw(setup, fresh, gradients):
    """Against optax.adamw with a schedule, and gradients taken outside the step."""
    trainer, dataset, arch = setup.programs.optimise, make_dataset(setup), setup.programs.arch
    settings = trainer.settings
    rates = learning_rates(settings, 3e-3, STEPS)
    assert len(set(rates.tolist())) == STEPS and settings.weight_decay > 0
    before = expected = fresh()
    scales = [path for path, p in jax.tree_util.tree_leaves_with_path(before) if p.size <= 2 * arch.hidden_size]
    assert {path[-1].key for path in scales} == {"scale"} and len(scales) == 3
    reference = optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            lambda count: jnp.asarray(rates)[count],
            settings.b1,
            settings.b2,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.size > 2 * arch.hidden_size, params),
        ),
    )

    @quick_jit
    def apply(params, opt_state, grads):
        updates, opt_state = reference.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.global_norm(grads)

    opt_state = reference.init(before)
    state = trainer.init(fresh())
    norms = []
    for i in range(STEPS):
        _, _, grads = gradients(dataset[i], params=expected)
        expected, opt_state, norm = apply(expected, opt_state, grads)
        state, output = trainer.step(state, {}, put_batch(dataset[i], trainer.mesh), rates[i], None)
        norms.append(float(norm))
        assert float(output.metrics["grad_norm"]) == pytest.approx(norms[-1], rel=1e-4)
    assert max(norms) > settings.clip  # clipping is at work
    for x, y, z in zip(*map(jax.tree.leaves, (state.params, expected, before)), strict=True):
        # Adam divides by a gradient's size, so that rounding in the smallest ones is what a weight may differ by.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
        assert np.abs(np.asarray(x - y)).mean() < 1e-6
        assert np.abs(np.asarray(x - z)).max() > 1e-3


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_norm_scales_are_not_decayed(setup, fresh):
    optimizer, params = setup.programs.optimise.optimizer, fresh()
    update = quick_jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)[0])
    updates = update(params)
    for (path, update), param in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        decay = 0 if path[-1].key == "scale" else 0.1
        np.testing.assert_allclose(update, decay * np.asarray(param), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup, steps", [(0.25, 20), (0.0, 7), (0.1, 1), (1.0, 4)])
def test_learning_rates(schedule, warmup, steps):
    settings = TrainingConfig(warmup=warmup, schedule=schedule, final=0.2)
    rates = learning_rates(settings, 3e-4, steps)
    first = {(0.25, 20): 5, (0.0, 7): 0, (0.1, 1): 0, (1.0, 4): 3}[warmup, steps]
    expected = [(i + 1) / (first + 1) for i in range(first)]
    for i in range(steps - first):
        share = i / (steps - first)
        fall = {"constant": 0, "linear": share, "cosine": (1 - np.cos(np.pi * share)) / 2}[schedule]
        expected.append(1 - 0.8 * fall)
    assert rates.dtype == np.float32 and rates.shape == (steps,)
    np.testing.assert_allclose(rates, 3e-4 * np.array(expected), rtol=1e-5)


def test_adafactor_is_that_of_optax():
    settings = TrainingConfig(optimizer="adafactor", clip=2.0)
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
    update, their_update = quick_jit(ours.update), quick_jit(theirs.update)
    for step in range(4):
        grads = {name: (step + 1) * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
        their_updates, their_state = their_update(grads, their_state, expected)
        expected = optax.apply_updates(expected, their_updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, expected)


def orthogonal(matrix):
    """The Newton-Schulz iteration of Muon (arXiv 2502.16982) in float64: singular values come near to 1."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


@pytest.mark.parametrize("settings", [None, lora.Lora(4, 8.0, tuple(LINEARS))], ids=["all", "adapters"])
def test_muon_makes_updates_of_layers_orthogonal(setup, settings):
    """Each layer's matrix apart, with the axes that x @ W takes; the root mean square of a full matrix's is 0.2."""
    params = lora.split(decoder.define(setup.programs.arch, lora=settings).abstract(), settings)[0]
    optimizer = make_optimizer(TrainingConfig(optimizer="muon", clip=1e9, weight_decay=0.1))
    rng = np.random.default_rng(0)
    params, first, second = (jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in "pfs")
    update, state = quick_jit(optimizer.update), optimizer.init(params)
    _, state = update(first, state, params)
    updates, _ = update(second, state, params)
    matrices = 0
    for path, found in jax.tree_util.tree_leaves_with_path(updates):
        param, one, two = (functools.reduce(lambda t, part: t[part.key], path, t) for t in (params, first, second))
        names = [part.key for part in path]
        if names[0] != "layers" or names[-1] == "scale":
            continue
        found = found - 0.1 * param
        # q, k, v: [H, K, D]; o: [D, H, K]; the others have two axes. Adapters: A is [r, *inputs], B is [*outputs, r].
        if names[-1] == "lora_a":
            rows = found.shape[1]
        elif names[-1] == "lora_b":
            rows = -1
        else:
            rows = found.shape[1] if names[-2] == "o" or found.ndim == 3 else found.shape[1] * found.shape[2]
        for layer, update_of_it in enumerate(found):
            held, now = 0.95 * 0.05 * one[layer] + 0.05 * two[layer], two[layer]
            ahead = 0.95 * held / (1 - 0.95**3) + 0.05 * now / (1 - 0.95**2)
            flat = ahead.reshape(rows, -1) if rows > 0 else ahead.reshape(-1, ahead.shape[-1])
            wide = flat if flat.shape[0] <= flat.shape[1] else flat.T
            expected = 0.2 * max(flat.shape) ** 0.5 * orthogonal(wide.astype(np.float64))
            expected = expected if flat.shape[0] <= flat.shape[1] else expected.T
            np.testing.assert_allclose(np.reshape(update_of_it, flat.shape), expected, atol=2e-3)
            assert 0.1 < np.sqrt(np.mean(expected**2)) < 0.3
            matrices += 1
    assert matrices == len(LINEARS) * setup.programs.arch.num_layers * (1 if settings is None else 2)


def test_optimiser_state_of_a_7b_model():
    params = decoder.define(MISTRAL_7B).abstract()
    assert nbytes(params) == 4 * MISTRAL_7B.parameter_count() > 28e9

    def state(**settings):
        return nbytes(jax.eval_shape(make_optimizer(TrainingConfig(**settings)).init, params))

    adamw = state()
    assert adamw == 2 * nbytes(params) + 4
    assert state(moment_dtype="bfloat16") == 1.5 * nbytes(params) + 4
    assert state(optimizer="adafactor") < 0.05 * adamw
    assert 0.5 * adamw < state(optimizer="muon") < 0.53 * adamw  # two moments of the embeddings alone
    settings = lora.Lora(16, 16.0, tuple(LINEARS))
    trained = lora.split(decoder.define(MISTRAL_7B, lora=settings).abstract(), settings)[0]
    assert nbytes(trained) == 4 * 41_943_040  # as peft counts for this model


# --- what may not change the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_does_not_change_gradients(setup, gradients, remat):
    batch = make_dataset(setup)[0]._replace(pairs=None)
    loss, _, grads = gradients(batch)
    other_loss, _, other_grads = gradients(batch, model=dict(remat=remat))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for x, y in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * np.abs(y).max())


def test_accumulation_does_not_change_gradients(setup, gradients):
    def third(accumulate):
        batch = make_dataset(prepare(changed(setup.programs.config, training=dict(accumulate=accumulate))))[2]
        batch.pairs.weight[[2, 3, 7]] = 0  # micro-batches of different weight, one of them empty
        return batch

    loss, sums, grads = gradients(third(1))
    assert sums["preference"][1] != sums["consistency"][1] == 5
    other_loss, other_sums, other_grads = gradients(third(4), training=dict(accumulate=4))
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, (total, count) in sums.items():
        np.testing.assert_allclose(other_sums[name][0], total, rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(other_sums[name][1], count, err_msg=name)
    for x, y in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * np.abs(y).max())


def test_supervised_micro_batches_do_not_change_gradients(setup, gradients):
    """Their counts are known beforehand, and each is computed once; its bins hold several rows."""

    def first(**changes):
        encoder, inputs, programs, _ = prepare(changed(setup.programs.config, **changes))
        seeds = {"ift": 1, "eft": 2}
        made = supervised_batches(
            programs.sft_spec, encoder, inputs.targets, steps=1, seeds=seeds, way=programs.way
        ).dataset[0]
        return made, gradients(made, **changes)

    batch, (loss, sums, grads) = first()
    packed, (other_loss, other_sums, other_grads) = first(
        training=dict(accumulate=4), text=dict(packing="bins", bin_tokens=64)
    )
    assert sum(ids.size for ids in packed.rows.ids) < sum(ids.size for ids in batch.rows.ids)
    assert other_loss == pytest.approx(loss, rel=1e-5) and sums.keys() == other_sums.keys() == {"sft/ift", "sft/eft"}
    for name, values in sums.items():
        np.testing.assert_allclose(other_sums[name], values, rtol=1e-5, err_msg=name)
    for x, y in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * np.abs(y).max())


def test_bfloat16_stays_near_float32(setup, gradients):
    batch = make_dataset(setup)[0]
    loss, _, grads = gradients(batch)
    other_loss, _, other_grads = gradients(batch, model=dict(dtype="bfloat16"))
    assert other_loss != loss and other_loss == pytest.approx(loss, rel=0.03)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(other_grads), jax.tree.leaves(grads), strict=True):
        assert x.dtype == np.float32
        cosine = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
        assert cosine > 0.95, jax.tree_util.keystr(path)


# --- steps that are not finite ----------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing(setup, fresh):
    trainer, rate = setup.programs.optimise, np.float32(1e-3)
    state, _ = trainer.step(trainer.init(fresh()), {}, batch_of(setup), rate, None)
    before = host(state)
    for in_a_row in (1, 2):
        state, output = trainer.step(state, {}, batch_of(setup, 1, lambda i, batch: broken(batch)), rate, None)
        assert not np.isfinite(output.metrics["loss"]) and output.metrics["skipped"] == 1
        assert int(output.metrics["skipped_in_a_row"]) == in_a_row
        assert_same_bytes((state.params, state.opt_state), before[:2])
    state, output = trainer.step(state, {}, batch_of(setup, 1), rate, None)
    assert output.metrics["skipped"] == output.metrics["skipped_in_a_row"] == 0
    assert np.isfinite(output.metrics["loss"])
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(host(state.params)), jax.tree.leaves(before.params)))
