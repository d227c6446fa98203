"""A training stage: its files, stopped and killed and gone on with to the bit, with and without adapters' dropout."""

import json

import numpy as np
import pytest

from scir_jax.data.pipelines import Way
from scir_jax.engine.cost.chips import CHIPS
from scir_jax.engine.cost.flops import Work
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.optimizer import learning_rates
from scir_jax.errors import InputError, Interrupted
from scir_jax.run.setup import prepare
from scir_jax.run.training import TIMINGS, Speed
from tests.training import (
    STEPS,
    TRAINING,
    Stage,
    StopsAfter,
    assert_same_bytes,
    assert_same_stage,
    broken,
    dropping_config,
    make_dataset,
)

pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture(scope="module")
def setup(world_dir, tiny_config):
    return prepare(tiny_config(world_dir, training=TRAINING))


@pytest.fixture(scope="module")
def uninterrupted(setup, tmp_path_factory):
    stage = Stage(setup, tmp_path_factory.mktemp("runs") / "whole")
    stage(StopsAfter())
    return stage


def test_a_stage(setup, uninterrupted):
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
    assert not uninterrupted.left
    # The same steps by hand.
    trainer = setup.programs.optimise
    state = trainer.init(setup.parameters.initial())
    rates = learning_rates(trainer.settings, 1e-3, STEPS)
    for i in range(STEPS):
        state, output = trainer.step(state, {}, put_batch(uninterrupted.dataset[i], trainer.mesh), rates[i], None)
        assert rows[2 + i]["loss"] == pytest.approx(float(output.metrics["loss"]), rel=1e-6)
        assert rows[2 + i]["learning_rate"] == rates[i]
        selected = [row["selected"] for row in decisions if row["step"] == i + 1]
        assert selected == np.asarray(output.decisions["selected"])[np.argsort(output.decisions["place"])].tolist()
    assert_same_bytes(state.params, uninterrupted.params())


@pytest.mark.parametrize("stops", [(1,), (3,), (2, 1, 1)], ids=["first step", "between checkpoints", "again and again"])
def test_a_stopped_stage_goes_on_to_the_bit(setup, uninterrupted, tmp_path, stops):
    stage = Stage(setup, tmp_path / "run")
    done = 0
    for step in stops:
        with pytest.raises(Interrupted):
            stage(StopsAfter(step))
        done += step
        assert [row["stage_step"] for row in stage.steps()] == [*range(1, done + 1)]
        assert stage.checkpoint()[0] == done
        assert not stage.store.exists(2)
    stage(StopsAfter())
    assert_same_stage(stage, uninterrupted)


def test_a_killed_stage_goes_on_from_its_checkpoint(setup, uninterrupted, tmp_path):
    """It dies in step 4, after the checkpoint of step 2: steps 3 and 4 are done again, with torn lines in the files."""
    stage = Stage(setup, tmp_path / "run")
    with pytest.raises(RuntimeError, match="killed"):
        stage(StopsAfter(4, RuntimeError("killed")))
    assert stage.checkpoint()[0] == 2
    assert [row["stage_step"] for row in stage.steps()] == [1, 2, 3, 4]
    for path in (stage.run.path / "metrics.jsonl", stage.decisions):
        last = path.read_bytes().split(b"\n")[-2]
        path.write_bytes(path.read_bytes() + last[: len(last) // 2])
    stage(StopsAfter())
    assert_same_stage(stage, uninterrupted)


def test_a_stage_ends_after_steps_that_are_not_finite(setup, tmp_path):
    trainer = setup.programs.optimise
    assert trainer.settings.max_skipped == 2
    stage = Stage(setup, tmp_path / "run", make_dataset(setup, lambda i, b: broken(b) if i in (0, 2, 3, 4) else b))
    with pytest.raises(InputError, match="2 steps in a row had a non-finite loss or gradient"):
        stage(StopsAfter())
    rows = stage.steps()
    # A single one is passed over; the second in a row ends the stage.
    assert [row["skipped"] for row in rows] == [1, 0, 1, 1]
    assert [row["loss"] is None for row in rows] == [True, False, True, True]
    assert not stage.store.exists(2)
    step, state, _ = stage.checkpoint()
    assert step == 2
    rates = learning_rates(trainer.settings, 1e-3, STEPS)
    expected = trainer.init(setup.parameters.initial())
    expected, _ = trainer.step(expected, {}, put_batch(stage.dataset[1], trainer.mesh), rates[1], None)
    assert_same_bytes(state, expected)


def test_speed_is_of_a_device_and_mfu_of_its_peak():
    work = Work(tokens=1000, seen=7, learned=0, scored=5, verdicts=0)
    found = Speed(lambda asked: 4e12 if asked == work else 0, 2, CHIPS["v5e"]).of(work, 0.5)
    assert found == {"seconds": 0.5, "tokens_per_second": 2000, "teraflops": 4, "mfu": 4 / 197}
    assert tuple(found) == TIMINGS
    assert "mfu" not in Speed(lambda _: 1, 2, None).of(work, 0.5)


# --- packed rows -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(world_dir, tiny_config):
    return prepare(tiny_config(world_dir, training=TRAINING, text=dict(packing="bins", bin_tokens=200)))


@pytest.mark.slow
def test_a_packed_stage_is_the_padded_one_and_goes_on_to_the_bit(packed, uninterrupted, tmp_path):
    """Killed in step 4, after the checkpoint of step 2."""
    assert packed.programs.way == Way("bins", 200, "auto")
    whole, stage = Stage(packed, tmp_path / "whole"), Stage(packed, tmp_path / "run")
    whole(StopsAfter())
    with pytest.raises(RuntimeError, match="killed"):
        stage(StopsAfter(4, RuntimeError("killed")))
    stage(StopsAfter())
    assert_same_stage(stage, whole)
    for row, other in zip(whole.rows(), uninterrupted.rows(), strict=True):
        assert row.keys() == other.keys()
        # Rows that share their beginning have fewer tokens.
        for name in row.keys() - {"stage", "filled", "tokens", "tokens/policy", "tokens/judge", "flops"}:
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    decided, others = (
        [json.loads(text) for text in of.decisions.read_text().split("\n")[:-1]] for of in (whole, uninterrupted)
    )
    assert [(row["step"], row["pair"]) for row in decided] == [(row["step"], row["pair"]) for row in others]
    bins, tokens = whole.dataset[0].rows.ids[0].shape
    assert bins > 1 and tokens <= 200
    assert packed.programs.optimise.step._cache_size() == len({batch.rows.ids[0].shape for batch in whole.dataset})


# --- adapters with dropout --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropping(world_dir, tiny_config, tmp_path_factory):
    return prepare(dropping_config(tiny_config, world_dir, tmp_path_factory.mktemp("adapter")))


@pytest.fixture(scope="module")
def finished(dropping, tmp_path_factory):
    """A stage that nothing stopped."""
    stage = Stage(dropping, tmp_path_factory.mktemp("finished") / "run")
    stage(StopsAfter())
    return stage


@pytest.mark.parametrize("stops", [(3,), pytest.param((1, 1), marks=pytest.mark.slow)], ids=["once", "twice"])
def test_a_stopped_stage_with_dropout_goes_on_to_the_bit(dropping, finished, tmp_path, stops):
    stage = Stage(dropping, tmp_path / "run")
    for step in stops:
        with pytest.raises(Interrupted):
            stage(StopsAfter(step))
    kept = stage.checkpoint()
    assert kept[0] == sum(stops) and kept[1].params.keys() == {"layers"}
    stage(StopsAfter())
    assert_same_stage(stage, finished)
    assert len(stage.rows()) == 2 + STEPS
