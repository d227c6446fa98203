"""The base model that travels with the package: taken where it is the configured one, better than shorter training."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest

from scir_jax.config import cli
from scir_jax.config.checks import resolve
from scir_jax.config.schema import Config, WorldConfig
from scir_jax.errors import InputError
from scir_jax.method.rewards import judged
from scir_jax.run import base_model, console, scoring
from scir_jax.run.setup import prepare
from scir_jax.world import __main__ as world_command
from scir_jax.world import base
from scir_jax.world.spec import WorldSpec

WORLD = WorldConfig()
SPEC, TRAINING = base_model.spec_of(WORLD), base_model.training_of(WORLD)


def test_the_package_has_the_base_model_of_the_default_world():
    path = base.shipped(SPEC, TRAINING)
    assert path.stat().st_size < 2**20
    record = json.loads((path.parent / base.RECORD).read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]


@pytest.mark.parametrize(
    "change", [dict(seed=1), dict(steps=449), dict(learning_rate=1e-3), dict(hidden_size=96)], ids=str
)
def test_another_world_has_another_base_model(change):
    world = dataclasses.replace(WORLD, **change)
    assert base.shipped(base_model.spec_of(world), base_model.training_of(world)) is None


def test_weights_that_were_changed_are_refused(tmp_path):
    shutil.copytree(base.DIRECTORY, tmp_path / "base")
    file = tmp_path / "base" / base.WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="model.safetensors is missing or was changed"):
        base.shipped(SPEC, TRAINING, tmp_path / "base")
    file.unlink()
    with pytest.raises(InputError, match="is missing or was changed"):
        base.shipped(SPEC, TRAINING, tmp_path / "base")
    assert base.shipped(SPEC, TRAINING, tmp_path / "nothing") is None


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The default world with the package's base model, made without training."""
    directory = tmp_path_factory.mktemp("built") / "world"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "_train", None)
        config = Config(world=dataclasses.replace(WORLD, directory=str(directory)))
        base_model.build_world(config, console.Stopper())
        base_model.build_world(config, console.Stopper())
    return directory


def test_a_world_is_built_without_training(built):
    names = {path.name for path in (built / "untrained").iterdir()}
    assert {path.name for path in (built / "model").iterdir()} == {*names, base.WEIGHTS}
    shipped, made = base.DIRECTORY / base.WEIGHTS, built / "model" / base.WEIGHTS
    assert made.read_bytes() == shipped.read_bytes()


def test_a_base_model_is_not_trained_over_another(built, command):
    done = command(world_command.main, "--world.directory", built)
    assert done.code == 2 and "holds a base model already; name another world.directory" in done.err
    done = command(world_command.main, "--world.directory", "null")
    assert done.code == 2 and done.err.startswith("error: world.directory: say where")


def quality(directory):
    """What the base model of a world makes of held-out pairs: nats per token of better answers, judge's accuracy."""
    config, _ = cli.parse("train", "", ["--world.directory", str(directory)], default_config=cli.QUICKSTART)
    encoder, inputs, programs, parameters = prepare(resolve(config))
    params, pairs = parameters.configured(), inputs.heldout_pairs
    better = [(pair.prompt, pair.answers[0 if pair.label > 0.5 else 1]) for pair in pairs]
    logps = scoring.score_answers(encoder, programs, params, better)["logps"]
    logits = judged(scoring.judge_pairs(encoder, programs, params, pairs).verdicts)["logit"][:, 0]
    labels = np.array([pair.label > 0.5 for pair in pairs])
    return -logps.sum() / sum(len(answer.ids) for _, answer in better), np.mean((np.asarray(logits) > 0) == labels)


@pytest.mark.slow
def test_a_training_of_few_of_the_steps_comes_near(built, tmp_path, optimised):
    shutil.copytree(built, tmp_path, ignore=shutil.ignore_patterns("model"), dirs_exist_ok=True)
    options = ["--world.directory", str(tmp_path), "--world.steps", str(WORLD.steps // 16)]
    config, _ = cli.parse("world", "", options, default_config=cli.QUICKSTART)
    base_model.build_world(config, console.Stopper(), retrain=True)
    (nats, accuracy), (sooner, accuracy_sooner) = quality(built), quality(tmp_path)
    assert nats < sooner < 3 * nats
    assert 0.5 < accuracy_sooner < accuracy


def test_sizes_of_the_model():
    """What follows from the width gives the shipped model's shape; other widths are refused."""
    assert SPEC == WorldSpec()
    found = base_model.spec_of(dataclasses.replace(WORLD, hidden_size=128, layers=6))
    assert (found.heads, found.key_value_heads, found.intermediate_size, found.layers) == (8, 4, 320, 6)
    for change in (dict(hidden_size=48), dict(hidden_size=0), dict(layers=0)):
        with pytest.raises(InputError, match="take a multiple of 32, and one layer or more"):
            base_model.spec_of(dataclasses.replace(WORLD, **change))
