"""The training step, its shardings and optimiser, checkpoints, and a training stage that is stopped and goes on."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scir_jax.config.schema import MeshConfig, OptimizerConfig
from scir_jax.data import pipelines
from scir_jax.engine.hosts import hosts
from scir_jax.engine import mesh as meshes
from scir_jax.engine.checkpoint import ModelStore, StageCheckpoints
from scir_jax.engine.cost.chips import CHIPS
from scir_jax.engine.mesh import put_batch
from scir_jax.data.jsonl import AppendOnly
from scir_jax.run.metrics import Metrics
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.engine.trainer import learning_rates
from scir_jax.errors import InputError, Interrupted
from scir_jax.run import console, sampling, scoring
from scir_jax.run.directory import RunDirectory
from scir_jax.run.session import Session
from scir_jax.run.training import TIMINGS, Speed, train_stage
from tests.processes import on_eight_devices, quick_jit

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))
STEPS = 5
STEP_FLOPS = 10**9


def make_session(config, **mesh) -> Session:
    return Session(dataclasses.replace(config, mesh=MeshConfig(**mesh)) if mesh else config)


def pair_rows(session):
    """20 rows of pairs.jsonl with made-up cached log-probabilities, some agreeing with the judge and some not."""
    rng = np.random.default_rng(0)
    rows = []
    for pair in [*session.data.eft, *session.data.heldout_pairs]:
        comparison = pair.comparison
        ids = [session.chat.answer(text)[:12] for text in (comparison.a, comparison.b)]
        logps = np.array([-4.0 * len(i) for i in ids])
        rows.append(
            {
                "messages": comparison.messages,
                "response_a_ids": list(ids[0]),
                "response_b_ids": list(ids[1]),
                **{
                    f"{role}_logps": (logps + rng.normal(0, 8, 2)).tolist()
                    for role in ("start", "preference", "implicit")
                },
            }
        )
    return [(f"pairs:{i}", row) for i, row in enumerate(rows)]


def make_dataset(session, change=None):
    """STEPS batches of 8 pairs with replay; change(step, batch) may alter one."""
    pad_id = session.chat.pad_id
    dataset = pipelines.pairs_dataset(
        pair_rows(session),
        session.encoder,
        session.shapes,
        rewards=2,
        need_label=None,
        batch_size=8,
        epochs=2,
        seed=3,
        ift=None,
        eft=pipelines.targets_dataset(session.data.eft_rows, session.shapes.eft, 8, pad_id, 2),
    )
    assert len(dataset) == STEPS
    if change is None:
        return dataset
    return pipelines.grain.MapDataset.source(np.arange(STEPS)).map(lambda i: change(int(i), dataset[int(i)]))


def fresh_params(session):
    return session.import_params(Path(session.config.model.path))


def host(tree):
    """A copy of arrays on the host, which no donation can touch."""
    return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))


def assert_same_bytes(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def everything(session):
    """What a mesh must not change: name -> array."""
    params = fresh_params(session)
    pairs = [(pair.prompt, pair.a, pair.b) for pair in session.data.heldout_pairs]
    judged = scoring.judge_pairs(session, params, pairs)
    rows = sampling.sample_rows(
        session,
        params,
        list(enumerate(session.data.prompts))[:7],
        responses=2,
        sampling=Sampling.of(1.0),
        key=stream_key(0, "responses", 1),
    )
    result = {
        "scores": scoring.response_logps(session, params, [(p, y) for p, a, b in pairs for y in (a, b)]),
        "verdicts": judged.verdicts,
        "mass": judged.mass,
        "sampled_logps": np.array([row["logprob"] for row in rows]),
        "sampled": np.array([row["response_ids"] + [-1] * (12 - len(row["response_ids"])) for row in rows]),
    }
    dataset, trainer = make_dataset(session), session.trainer
    state = trainer.init(params)
    for step in range(3):
        state, output = trainer.step(state, {}, put_batch(dataset[step], session.mesh), np.float32(1e-3), None)
        result |= {f"{step}/{name}": np.asarray(value) for name, value in output.metrics.items()}
        result |= {f"{step}/{name}": np.asarray(value) for name, value in output.decisions.items()}
    result |= {
        f"params{jax.tree_util.keystr(k)}": v for k, v in jax.tree_util.tree_leaves_with_path(host(state.params))
    }
    result["steps compiled"] = np.array(trainer.step._cache_size())
    for name, tree in (("params", state.params), ("optimiser", state.opt_state)):
        leaves = jax.tree.leaves(tree)
        result[f"{name} share"] = np.array(
            sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)
        )
    return result


@pytest.fixture(scope="module")
def config(world_dir, tiny_config):
    return tiny_config(
        world_dir, optimizer=dict(weight_decay=0.1, clip=0.5, max_skipped=2), sample=dict(batch_size=8, responses=2)
    )


@pytest.fixture(scope="module")
def session(config):
    return make_session(config)


@pytest.fixture(scope="module")
def gradients(config, session):
    """gradients(batch, params=None, model=dict(...), ...) -> (loss, sums, gradients), compiled once a configuration."""
    compiled = {}

    def compute(batch, params=None, **changes):
        name = str(changes)
        if name not in compiled:
            sections = {key: dataclasses.replace(getattr(config, key), **values) for key, values in changes.items()}
            trainer = make_session(dataclasses.replace(config, **sections)).trainer
            compiled[name] = quick_jit(jax.value_and_grad(lambda p, b: trainer.loss(p, {}, b), has_aux=True))
        (loss, (sums, _)), grads = compiled[name](fresh_params(session) if params is None else params, batch)
        return float(loss), host(sums), host(grads)

    return compute


# --- the step ---------------------------------------------------------------------------------------------------------


def test_a_step_is_compiled_once(session, tmp_path):
    trainer, dataset = session.trainer, make_dataset(session)
    rates = learning_rates(session.config.optimizer, 1e-3, STEPS)
    store, checkpoints = ModelStore(tmp_path / "models"), StageCheckpoints(tmp_path / "stage", 1)
    store.save(1, fresh_params(session))
    for iteration in range(2):
        state = trainer.init(store.load(1, session.abstract_trained) if iteration else fresh_params(session))
        for step in range(2):
            state, _ = trainer.step(
                state, {}, put_batch(dataset[step], session.mesh), (1 + iteration) * rates[step], None
            )
    checkpoints.save(2, state, {"data": {"next_index": 2}})
    checkpoints.wait()
    _, state, _ = checkpoints.restore(trainer.abstract_state())
    trainer.step(state, {}, put_batch(dataset[2], session.mesh), rates[2], None)
    checkpoints.close()
    assert trainer.step._cache_size() == 1


def test_the_step_is_adamw(session, gradients):
    """Against optax.adamw with a schedule, and gradients taken outside the step."""
    trainer, dataset, settings = session.trainer, make_dataset(session), session.config.optimizer
    rates = learning_rates(settings, 3e-3, STEPS)
    assert len(set(rates.tolist())) == STEPS and settings.weight_decay > 0
    before = expected = fresh_params(session)
    scales = [path for path, p in jax.tree_util.tree_leaves_with_path(before) if p.size <= 2 * session.arch.hidden_size]
    assert {path[-1].key for path in scales} == {"scale"} and len(scales) == 3
    reference = optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            lambda count: jnp.asarray(rates)[count],
            settings.b1,
            settings.b2,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.size > 2 * session.arch.hidden_size, params),
        ),
    )

    @quick_jit
    def apply(params, opt_state, grads):
        updates, opt_state = reference.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.global_norm(grads)

    opt_state = reference.init(before)
    state = trainer.init(fresh_params(session))
    norms = []
    for i in range(STEPS):
        _, _, grads = gradients(dataset[i], params=expected)
        expected, opt_state, norm = apply(expected, opt_state, grads)
        state, output = trainer.step(state, {}, put_batch(dataset[i], session.mesh), rates[i], None)
        norms.append(float(norm))
        assert float(output.metrics["grad_norm"]) == pytest.approx(norms[-1], rel=1e-4)
    assert max(norms) > settings.clip  # clipping is at work
    for x, y, z in zip(*map(jax.tree.leaves, (state.params, expected, before)), strict=True):
        # Adam divides by a gradient's size, so that rounding in the smallest ones is what a weight may differ by.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
        assert np.abs(np.asarray(x - y)).mean() < 1e-6
        assert np.abs(np.asarray(x - z)).max() > 1e-3


def test_norm_scales_are_not_decayed(session):
    optimizer = session.trainer.optimizer
    params = fresh_params(session)
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
    settings = OptimizerConfig(warmup=warmup, schedule=schedule, final=0.2)
    rates = learning_rates(settings, 3e-4, steps)
    first = {(0.25, 20): 5, (0.0, 7): 0, (0.1, 1): 0, (1.0, 4): 3}[warmup, steps]
    expected = [(i + 1) / (first + 1) for i in range(first)]
    for i in range(steps - first):
        share = i / (steps - first)
        fall = {"constant": 0, "linear": share, "cosine": (1 - np.cos(np.pi * share)) / 2}[schedule]
        expected.append(1 - 0.8 * fall)
    assert rates.dtype == np.float32 and rates.shape == (steps,)
    np.testing.assert_allclose(rates, 3e-4 * np.array(expected), rtol=1e-5)


# --- what may not change the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_does_not_change_gradients(session, gradients, remat):
    batch = make_dataset(session)[0]._replace(pairs=None)
    loss, _, grads = gradients(batch)
    other_loss, _, other_grads = gradients(batch, model=dict(remat=remat))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for x, y in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * np.abs(y).max())


def test_accumulation_does_not_change_gradients(session, gradients):
    batch = make_dataset(session)[2]
    batch.pairs.weight[[2, 3, 7]] = 0  # micro-batches of different weight, one of them empty
    loss, sums, grads = gradients(batch)
    assert sums["preference"][1] != sums["consistency"][1] == 5
    other_loss, other_sums, other_grads = gradients(batch, optimizer=dict(accumulate=4))
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, (total, count) in sums.items():
        np.testing.assert_allclose(other_sums[name][0], total, rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(other_sums[name][1], count, err_msg=name)
    for x, y in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * np.abs(y).max())


def test_bfloat16_stays_near_float32(session, gradients):
    batch = make_dataset(session)[0]
    loss, _, grads = gradients(batch)
    other_loss, _, other_grads = gradients(batch, model=dict(dtype="bfloat16"))
    assert other_loss != loss and other_loss == pytest.approx(loss, rel=0.03)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(other_grads), jax.tree.leaves(grads), strict=True):
        assert x.dtype == np.float32
        cosine = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
        assert cosine > 0.95, jax.tree_util.keystr(path)


# --- meshes -----------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def sharded(config):
    """The results of `everything` on 8 devices, by mesh, and the messages of refused configurations."""
    return on_eight_devices(on_meshes, config)


def on_meshes(config):
    results = {}
    for data, fsdp, tensor in MESHES:
        results[data, fsdp, tensor] = everything(make_session(config, data=data, fsdp=fsdp, tensor=tensor))
    results["shapes"] = [
        tuple(meshes.make_mesh(MeshConfig(*sizes)).shape.values()) for sizes in ((-1, 2, 2), (2, -1, 1), (1, 2, -1))
    ]
    try:
        make_session(dataclasses.replace(config, sample=dataclasses.replace(config.sample, batch_size=12)))
    except InputError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def alone(session):
    return everything(session)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_a_mesh_does_not_change_the_result(sharded, alone, mesh):
    found = sharded[mesh]
    assert found.keys() == alone.keys()
    np.testing.assert_array_equal(found["sampled"], alone["sampled"])
    assert found["steps compiled"] == 1
    for name, value in alone.items():
        if name.endswith(" share") or name == "steps compiled":
            continue
        atol = 1e-4 if name.startswith("params") else 1e-5
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=atol, err_msg=name)
    losses = [f"{step}/loss" for step in range(3)]
    np.testing.assert_allclose([found[x] for x in losses], [alone[x] for x in losses], rtol=1e-5)


def test_fsdp_splits_parameters_and_optimiser(sharded, alone):
    for part in ("params", "optimiser"):
        assert alone[f"{part} share"] == sharded[8, 1, 1][f"{part} share"] == 1
        assert 1 / 8 < sharded[1, 8, 1][f"{part} share"] < 1.1 / 8
        # The embedding is split over fsdp only, all other matrices over tensor too.
        assert 1 / 4 < sharded[2, 2, 2][f"{part} share"] < 1 / 3


def test_the_mesh_takes_what_is_left(sharded):
    assert sharded["shapes"] == [(2, 2, 2), (2, 4, 1), (1, 2, 4)]


def test_a_batch_must_divide(sharded):
    assert sharded["error"] == (
        "sample.batch_size 12 does not divide into 8 batch shards of the mesh (data x fsdp); 8 or 16 would"
    )


# --- steps that are not finite ----------------------------------------------------------------------------------------


def broken(batch):
    return batch._replace(
        pairs=batch.pairs._replace(preference_logps=np.full_like(batch.pairs.preference_logps, np.nan))
    )


def test_a_step_that_is_not_finite_changes_nothing(session):
    trainer, dataset = session.trainer, make_dataset(session)
    state, _ = trainer.step(
        trainer.init(fresh_params(session)), {}, put_batch(dataset[0], session.mesh), np.float32(1e-3), None
    )
    before = host(state)
    for in_a_row in (1, 2):
        state, output = trainer.step(state, {}, put_batch(broken(dataset[1]), session.mesh), np.float32(1e-3), None)
        assert not np.isfinite(output.metrics["loss"]) and output.metrics["skipped"] == 1
        assert int(output.metrics["skipped_in_a_row"]) == in_a_row
        assert_same_bytes((state.params, state.opt_state), before[:2])
    state, output = trainer.step(state, {}, put_batch(dataset[1], session.mesh), np.float32(1e-3), None)
    assert output.metrics["skipped"] == output.metrics["skipped_in_a_row"] == 0
    assert np.isfinite(output.metrics["loss"])
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(host(state.params)), jax.tree.leaves(before.params)))


# --- a stage ----------------------------------------------------------------------------------------------------------


class StopsAfter(console.Stopper):
    """A signal comes in during step `step` of a stage, counted from the stage's (new) start."""

    def __init__(self, step=None, error=None):
        self._asked, self._step, self._error = 0, step, error
        self._votes = hosts.Votes()

    @property
    def signal(self):
        self._asked += 1
        if self._step is None or self._asked < self._step:
            return None
        if self._error:
            raise self._error
        return 15


class Stage:
    """train_stage in one run directory, as often as it takes."""

    def __init__(self, session, path, dataset=None):
        self.session = session
        self.run = RunDirectory(path)
        self.store = ModelStore(self.run.checkpoints)
        self.decisions = self.run.iteration(1) / "decisions.jsonl"
        self.dataset = make_dataset(session) if dataset is None else dataset

    def __call__(self, stopper):
        metrics_file = self.run.path / "metrics.jsonl"
        metrics = Metrics(self.run.path, tensorboard=False, wandb=False, config={})
        # The rows of a stage before this one.
        metrics.start_stage("sft", 0, 2)
        if not metrics_file.exists():
            for step in (1, 2):
                metrics.write("sft", 0, step, {"loss": 1.0})
        try:
            train_stage(
                self.session,
                self.run,
                metrics,
                stopper,
                name="iteration_01",
                stage="optimise",
                iteration=1,
                title="optimise",
                dataset=self.dataset,
                peak=1e-3,
                flops=STEP_FLOPS,
                params=self.session.initial_params,
                frozen=lambda: self.session.frozen,
                decisions=AppendOnly(self.decisions),
                save=lambda params: self.store.save(2, params),
            )
        finally:
            metrics.close()

    def checkpoint(self):
        checkpoints = StageCheckpoints(self.run.checkpoints / "iteration_01", 2)
        found = checkpoints.restore(self.session.trainer.abstract_state())
        checkpoints.close()
        return found

    def rows(self):
        rows = [json.loads(text) for text in (self.run.path / "metrics.jsonl").read_text().split("\n")[:-1]]
        for row in rows:
            if row["stage"] == "optimise":
                assert row["seconds"] * row["teraflops"] * 1e12 == pytest.approx(STEP_FLOPS)
                assert all(row.pop(name) > 0 for name in TIMINGS if name in row)
        return sorted(rows, key=lambda row: row["step"])

    def params(self):
        return host(self.store.load(2, self.session.abstract_trained))


def test_speed_is_of_a_device_and_mfu_of_its_peak():
    found = Speed(2e12, CHIPS["v5e"]).of(1000, 0.5)
    assert found == {"seconds": 0.5, "tokens_per_second": 2000, "teraflops": 4, "mfu": 4 / 197}
    assert tuple(found) == TIMINGS
    assert "mfu" not in Speed(2e12, None).of(1000, 0.5)


@pytest.fixture(scope="module")
def uninterrupted(session, tmp_path_factory):
    stage = Stage(session, tmp_path_factory.mktemp("runs") / "whole")
    stage(StopsAfter())
    return stage


def test_a_stage(session, uninterrupted):
    rows = uninterrupted.rows()
    assert [(r["step"], r["stage"], r["stage_step"]) for r in rows] == [
        (1, "sft", 1),
        (2, "sft", 2),
        *((2 + i, "optimise", i) for i in range(1, STEPS + 1)),
    ]
    decisions = [json.loads(text) for text in uninterrupted.decisions.read_text().split("\n")[:-1]]
    # Every pair once an epoch, in the batch of its step: two epochs of 20 pairs.
    assert [row["step"] for row in decisions] == [step for step in range(1, STEPS + 1) for _ in range(8)]
    assert sorted(row["pair"] for row in decisions) == sorted([*range(20)] * 2)
    assert sorted(row["pair"] for row in decisions[:20]) == [*range(20)]
    assert not (uninterrupted.run.checkpoints / "iteration_01").exists()
    # The same steps by hand.
    state = session.trainer.init(fresh_params(session))
    rates = learning_rates(session.config.optimizer, 1e-3, STEPS)
    for i in range(STEPS):
        batch = uninterrupted.dataset[i]
        state, output = session.trainer.step(state, {}, put_batch(batch, session.mesh), rates[i], None)
        assert rows[2 + i]["loss"] == pytest.approx(float(output.metrics["loss"]), rel=1e-6)
        assert rows[2 + i]["learning_rate"] == rates[i]
        selected = [row["selected"] for row in decisions if row["step"] == i + 1]
        assert selected == np.asarray(output.decisions["selected"]).tolist()
    assert_same_bytes(state.params, uninterrupted.params())


@pytest.mark.parametrize("stops", [(1,), (3,), (2, 1, 1)], ids=["first step", "between checkpoints", "again and again"])
def test_a_stopped_stage_goes_on_to_the_bit(session, uninterrupted, tmp_path, stops):
    stage = Stage(session, tmp_path / "run")
    done = 0
    for step in stops:
        with pytest.raises(Interrupted):
            stage(StopsAfter(step))
        done += step
        assert [row["stage_step"] for row in stage.rows() if row["stage"] == "optimise"] == [*range(1, done + 1)]
        assert stage.checkpoint()[0] == done
        assert not stage.store.exists(2)
    stage(StopsAfter())
    assert_same_bytes(stage.params(), uninterrupted.params())
    assert stage.rows() == uninterrupted.rows()
    assert stage.decisions.read_bytes() == uninterrupted.decisions.read_bytes()
    assert not (stage.run.checkpoints / "iteration_01").exists()


def test_a_killed_stage_goes_on_from_its_checkpoint(session, uninterrupted, tmp_path):
    """It dies in step 4, after the checkpoint of step 2: steps 3 and 4 are done again, with torn lines in the files."""
    stage = Stage(session, tmp_path / "run")
    with pytest.raises(RuntimeError, match="killed"):
        stage(StopsAfter(4, RuntimeError("killed")))
    assert stage.checkpoint()[0] == 2
    assert [row["stage_step"] for row in stage.rows() if row["stage"] == "optimise"] == [1, 2, 3]
    for path in (stage.run.path / "metrics.jsonl", stage.decisions):
        last = path.read_bytes().split(b"\n")[-2]
        path.write_bytes(path.read_bytes() + last[: len(last) // 2])
    stage(StopsAfter())
    assert_same_bytes(stage.params(), uninterrupted.params())
    assert stage.rows() == uninterrupted.rows()
    assert stage.decisions.read_bytes() == uninterrupted.decisions.read_bytes()


def test_a_stage_ends_after_steps_that_are_not_finite(session, tmp_path):
    limit = session.config.optimizer.max_skipped
    assert limit == 2
    stage = Stage(session, tmp_path / "run", make_dataset(session, lambda i, b: broken(b) if i in (0, 2, 3, 4) else b))
    with pytest.raises(InputError, match="2 steps in a row had a non-finite loss or gradient"):
        stage(StopsAfter())
    rows = [row for row in stage.rows() if row["stage"] == "optimise"]
    # A single one is passed over; the second in a row ends the stage.
    assert [row["skipped"] for row in rows] == [1, 0, 1, 1]
    assert [row["loss"] is None for row in rows] == [True, False, True, True]
    assert not stage.store.exists(2)
    step, state, _ = stage.checkpoint()
    assert step == 2
    rates = learning_rates(session.config.optimizer, 1e-3, STEPS)
    expected = session.trainer.init(fresh_params(session))
    expected, _ = session.trainer.step(expected, {}, put_batch(stage.dataset[1], session.mesh), rates[1], None)
    assert_same_bytes(state, expected)


# --- checkpoints ------------------------------------------------------------------------------------------------------


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


def test_models_are_stored_to_the_bit(session, tmp_path):
    store = ModelStore(tmp_path)
    assert store.latest() is None and not store.exists(0)
    params = fresh_params(session)
    store.save(0, params)
    assert store.exists(0) and store.latest() == 0
    assert_same_bytes(store.load(0, session.abstract_params), params)
    other = jax.tree.map(lambda p: p + 1, params)
    store.save(10, other)
    store.save(9, params)
    store.save(0, other)  # replaces
    assert store.latest() == 10
    assert_same_bytes(store.load(0, session.abstract_params), other)


@pytest.mark.parametrize("damage", ["absent", "empty", "corrupt", "another shape", "other arrays"])
def test_a_model_that_cannot_be_read(session, tmp_path, damage):
    store, abstract = ModelStore(tmp_path), session.abstract_params
    path = store.path(3)
    if damage == "empty":
        path.mkdir()
    elif damage != "absent":
        store.save(3, fresh_params(session))
    if damage == "corrupt":
        for file in path.rglob("*"):
            if file.is_file() and file.stat().st_size > 1000:
                file.write_bytes(bytes(file.stat().st_size))
    if damage == "another shape":
        abstract = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((*s.shape[:-1], s.shape[-1] * 2), s.dtype, sharding=s.sharding), abstract
        )
    if damage == "other arrays":
        abstract = {name: value for name, value in abstract.items() if name != "norm"}
    with pytest.raises(InputError) as error:
        store.load(3, abstract)
    expected = "the checkpoint cannot be read"
    if damage == "another shape":
        embed = session.abstract_params["embed"].shape
        expected = f"is a checkpoint of another model (embed is {embed} there, {(embed[0], 2 * embed[1])} here)"
    elif damage == "other arrays":
        expected = "is a checkpoint of another model (norm/scale is "
    assert str(error.value).startswith(f"{path}: {expected}") and "\n" not in str(error.value)
