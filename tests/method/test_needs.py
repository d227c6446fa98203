"""What a method must compute and store: derived from the tables, and exactly what the objective touches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.config import cli, files
from scir_jax.method import objective
from scir_jax.method.objective import Needs
from scir_jax.method.rewards import JUDGED as JUDGED_TOO
from tests.method_reference import (
    CONFIGURATIONS,
    changed,
    configured,
    evidence,
    example,
    random_settings,
    ref_objective,
    ref_rewards,
    ref_shown,
    value_and_grad,
)

METHODS = [name.removeprefix("methods/") for name in files.bundled_names() if name.startswith("methods/")]
PLAIN = ("logps",)
JUDGED = ("logps", "verdict_mass", "verdicts")
REFERENCES = ("implicit_logps", "preference_logps")
BOTH = ("generative", "implicit")
THREE = ("generative", "implicit", "likelihood")
POINTS = ("start_points", "start_points_mass")
EXPECTED = {
    # fresh, rewards, cached, frozen, start, verdicts, judged, pointwise
    "scir": Needs(JUDGED, BOTH, REFERENCES, (), (), False, False, False),
    "consistency_only": Needs(JUDGED, BOTH, REFERENCES, (), (), False, False, False),
    "selection_only": Needs(JUDGED, BOTH, REFERENCES, (), (), False, False, False),
    "srlm": Needs(PLAIN, ("implicit",), REFERENCES, ("generative",), ("generative",), False, True, False),
    "srlm_score": Needs(
        PLAIN, ("implicit", "pointwise"), (*REFERENCES, *POINTS), ("pointwise",), ("pointwise",), False, False, True
    ),
    "implicit": Needs(PLAIN, ("implicit",), REFERENCES, ("implicit",), ("implicit",), False, False, False),
    "cream": Needs(PLAIN, ("implicit",), REFERENCES, (), (), False, False, False),
    "dice": Needs(PLAIN, ("implicit",), REFERENCES, (), (), False, False, False),
    "oracle": Needs(PLAIN, ("implicit",), REFERENCES, (), (), False, False, False),
    "external": Needs(PLAIN, ("implicit",), REFERENCES, (), (), False, False, False),
    "upo": Needs(PLAIN, ("implicit",), REFERENCES, ("generative",), ("generative",), True, True, False),
    "upo_dropout": Needs(PLAIN, ("implicit",), REFERENCES, ("generative",), ("generative",), True, True, False),
    "scir_constructed": Needs(JUDGED, BOTH, REFERENCES, (), (), False, False, False),
    "scir_one_order": Needs(JUDGED, BOTH, REFERENCES, (), (), False, False, False),
    "scir_both_orders": Needs(JUDGED, BOTH, REFERENCES, (), (), False, False, False),
    "scir_lagged": Needs(
        JUDGED, BOTH, REFERENCES, ("generative", "generative_before"), ("generative",), False, True, False
    ),
    "scir_transitive": Needs(JUDGED, BOTH, REFERENCES, ("transitive",), ("generative",), False, True, False),
    "consensus": Needs(JUDGED, THREE, (*REFERENCES, "start_logps"), THREE, THREE, False, True, False),
}
UNJUDGED = ("srlm", "srlm_score", "implicit", "cream", "dice", "external", "oracle", "upo", "upo_dropout")


@functools.cache
def method(name):
    """The configuration of a method over the quickstart's; a number: one of the random settings."""
    if name.isdigit():
        return configured(random_settings()[int(name)])
    return cli.parse("train", "", ["--config", "quickstart", "--config", f"methods/{name}"])[0]


SOME = [*METHODS, *map(str, range(0, CONFIGURATIONS, 3))]


@pytest.mark.parametrize("name", METHODS)
def test_what_the_methods_need(name):
    found = objective.needs(method(name))
    assert found == EXPECTED[name]
    assert found.asks_judge == (name not in UNJUDGED)


def test_every_method_is_in_the_table():
    assert set(EXPECTED) == set(METHODS)


@pytest.mark.parametrize("name", [*METHODS, *map(str, range(CONFIGURATIONS))])
def test_what_is_needed_is_exactly_what_the_objective_touches(name):
    """Given what it names and nothing else the objective goes through; of these names it lacks none."""
    config = method(name)
    given = evidence(example(config, 1), config)
    jax.eval_shape(lambda e: objective.objective(e, config), given)
    dropped = 0
    for field in ("fresh", "cached", "frozen"):
        for key in getattr(given, field):
            less = {other: value for other, value in getattr(given, field).items() if other != key}
            with pytest.raises(KeyError, match=key):
                jax.eval_shape(lambda e: objective.objective(e, config), given._replace(**{field: less}))
            dropped += 1
    wanted = objective.needs(config)
    assert dropped == len(wanted.fresh) + len(wanted.cached) + len(wanted.frozen) >= 2
    assert set(wanted.rewards) == ref_shown(config)
    assert set(wanted.frozen) - set(JUDGED_TOO) <= set(wanted.start)


@pytest.mark.parametrize("name", SOME)
def test_what_is_not_needed_may_be_anything(name):
    """More evidence, NaN at that, changes nothing: neither loss, metrics and decisions nor gradients."""
    config = method(name)
    values = example(config, 2)
    expected = value_and_grad(values, config)
    wanted = objective.needs(config)
    kept = {*wanted.fresh, *wanted.cached, *(f"frozen {reward}" for reward in wanted.frozen)}
    kept |= {"weight", "lengths"}
    if config.preference.labels in ("external", "cream", "dice") or config.consistency.target == "labels":
        kept.add("label")
    if config.implicit.length == "penalty":
        kept.add("length_penalty")
    if wanted.verdicts:
        kept.add("single")
    more = {key: value if key in kept else np.full_like(value, np.nan) for key, value in values.items()}
    found = value_and_grad(evidence(more, config, everything=True), config)
    assert found[0] == expected[0] and found[1] == expected[1]
    jax.tree.map(np.testing.assert_array_equal, found[2], expected[2])
    for reading, gradient in found[3].items():
        np.testing.assert_array_equal(gradient, expected[3].get(reading, np.zeros_like(gradient)))


@pytest.mark.parametrize("name", UNJUDGED)
def test_a_step_without_the_judge_has_the_loss_of_one_with_it(name):
    """The same method with the reward models beside it, which only makes more metrics."""
    config = method(name)
    values = example(config, 3, weighted=True)
    # At the start of the iteration: what is frozen is what is fresh.
    values["start_logps"] = values["logps"]
    values |= {f"frozen {reward}": np.float64(np.float32(x)) for reward, x in ref_rewards(values, config).items()}
    loss, sums, decisions, gradients = value_and_grad(values, config)
    assert set(gradients) == {"logps"} and sums["preference"][1] > 0
    others = [changed(config, {"consistency.weight": 1.5})]
    if config.preference.update == "frozen":
        others.append(changed(config, {"preference.update": "dynamic"}))
    for other in others:
        if name not in ("implicit", "srlm_score") or other.consistency.weight:
            assert objective.needs(other).asks_judge
        loss_, sums_, decisions_, gradients_ = value_and_grad(values, other)
        for key, pair in sums.items():
            assert sums_[key] == pytest.approx(pair, rel=1e-6), key
        for key, value in decisions.items():
            np.testing.assert_allclose(np.float64(decisions_[key]), np.float64(value), rtol=1e-6, err_msg=key)
        without = objective.total(sums_, changed(other, {"consistency.weight": 0.0}))
        assert without == pytest.approx(loss, rel=1e-6)
        if not other.consistency.weight:
            assert loss_ == pytest.approx(loss, rel=1e-6)
            np.testing.assert_allclose(gradients_["logps"], gradients["logps"], rtol=1e-6)
            assert not any(np.any(gradients_[key]) for key in gradients_ if key != "logps")
    # It is the loss of the reference too, which always looks at everything.
    assert loss == pytest.approx(ref_objective(values, values, config)[0], rel=2e-5)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"consistency.weight": 0.1}, True),
        ({"selection.rule": "agreement"}, True),
        ({"preference.labels": "generative"}, True),
        ({"preference.labels": "agreement"}, True),
        ({"preference.labels": "consensus"}, True),
        ({"preference.labels": "implicit"}, False),
        ({"preference.labels": "likelihood"}, False),
        ({"preference.labels": "external"}, False),
        ({"preference.labels": "generative", "preference.update": "frozen"}, False),
        ({"preference.labels": "agreement", "preference.update": "frozen"}, False),
        # The judge is no reward model of the method.
        ({"rewards.models": ("implicit", "likelihood"), "consistency.weight": 1.0}, False),
        ({"rewards.models": ("implicit",), "selection.rule": "agreement"}, False),
        ({"rewards.models": ("implicit",), "preference.labels": "generative"}, True),
        # What it said at the start of the iteration is enough.
        ({"selection.rule": "certainty"}, False),
        ({"preference.labels": "entropy"}, False),
        ({"selection.rule": "sampled"}, False),
        ({"selection.rule": "both_orders"}, True),
        ({"rewards.models": ("implicit",), "selection.rule": "both_orders"}, True),
        ({"judge.slot_penalty": 0.1}, True),
        ({"judge.constructed_batch_size": 4}, False),
        ({"consistency.target": "lagged"}, False),
    ],
)
def test_when_a_step_asks_the_judge(settings, asked):
    quiet = {"consistency.weight": 0.0, "selection.rule": "all", "preference.labels": "external"}
    found = objective.needs(configured(quiet | settings))
    assert found.asks_judge == asked == ("generative" in found.rewards)
    looks = settings.get("preference.labels") == "entropy"
    assert looks == ("entropy" in found.fresh) == ("entropy" in found.rewards)


@pytest.mark.parametrize(
    ("settings", "start", "judged"),
    [
        ({}, (), False),
        ({"preference.update": "frozen", "preference.labels": "generative"}, ("generative",), True),
        ({"preference.update": "frozen", "preference.labels": "likelihood"}, ("likelihood",), False),
        ({"preference.update": "frozen"}, ("generative", "implicit"), True),
        (
            {"preference.update": "frozen", "rewards.models": ("likelihood", "implicit")},
            ("implicit", "likelihood"),
            False,
        ),
        ({"preference.update": "frozen", "preference.labels": "external"}, (), False),
        ({"consistency.target": "consensus"}, ("generative", "implicit"), True),
        ({"consistency.target": "consensus", "consistency.weight": 0.0}, (), False),
        ({"pairs.kind": "best_worst"}, ("generative",), True),
        ({"pairs.kind": "all"}, (), False),
        ({"selection.rule": "certainty"}, (), True),
        ({"selection.rule": "sampled"}, (), True),
        ({"preference.update": "frozen", "preference.labels": "entropy"}, ("entropy",), False),
    ],
)
def test_what_is_made_at_the_start_of_an_iteration(settings, start, judged):
    found = objective.needs(configured(settings))
    assert (found.start, found.judged) == (start, judged)
    assert found.verdicts == (settings.get("selection.rule") in ("certainty", "sampled"))
    # What is made only to choose pairs is not taken by a step.
    assert found.frozen == (() if settings.get("pairs.kind") else start)


def test_needs_are_plain_values():
    """They are compared and printed; nothing in them is an array."""
    found = objective.needs(configured({}))
    assert found == objective.needs(configured({}))
    assert not any(isinstance(leaf, (np.ndarray, jnp.ndarray)) for leaf in dataclasses.astuple(found))
