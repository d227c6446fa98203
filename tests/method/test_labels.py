"""Whose label a pair gets, and that labels have no gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.method import labels, objective
from scir_jax.method.rewards import REWARDS
from tests.method_reference import changed, configured, evidence, example, options, table

# Of the reward models in their order, so that no sum of some is that of others.
SIZES = [1, 1.5, 2.25, 0.6, 0.4]
CONSENSUS = [1.0, 1.6, 1.0, 2.0, 1.3]


def test_hard_and_soft_labels_have_no_gradient():
    logits = jnp.array([3.0, -0.2, 0.0, 1e-12, -1e4])
    np.testing.assert_array_equal(labels.probability(logits, soft=False), [1, 0, 0.5, 1, 0])
    np.testing.assert_allclose(labels.probability(logits, soft=True), np.exp(table(logits)[:, 0]), atol=1e-6)
    for soft in (False, True):
        np.testing.assert_array_equal(jax.grad(lambda z: labels.probability(z, soft=soft).sum())(logits), 0)


@pytest.mark.parametrize("name", labels.LABELS)
def test_a_label_asks_no_more_than_the_reward_models_that_it_names(name):
    config = configured({"rewards.models": ("implicit", "likelihood"), "rewards.weights": {"likelihood": 2.0}})
    entry = labels.LABELS[name]
    asked = entry.rewards(config)
    if entry.logit is None:
        assert asked == ()
        return
    rng = np.random.default_rng(8)
    logits = {reward: jnp.asarray(rng.normal(0, 2, (6, 1)), jnp.float32) for reward in asked}
    value = entry.logit(logits, config)
    assert value.shape == (6,)
    np.testing.assert_allclose(entry.logit({k: -v for k, v in logits.items()}, config), -value, rtol=1e-6)
    assert asked == {"agreement": config.rewards.models, "consensus": config.rewards.models}.get(name, (name,))


@pytest.mark.parametrize("update", options("PreferenceConfig", "update"))
@pytest.mark.parametrize("name", options("PreferenceConfig", "labels"))
def test_whose_label(name, update):
    """Columns of known sign: every source of labels tells itself apart."""
    config = configured(
        {
            "rewards.models": tuple(REWARDS),
            "rewards.weights": dict(zip(REWARDS, CONSENSUS)),
            "preference.labels": name,
            "preference.update": update,
            "selection.rule": "all",
        }
    )
    count = len(REWARDS)
    signs = np.array(list(itertools.product([-1, 1], repeat=2 * count)), float)
    values = example(config, 2, pairs=len(signs), real=len(signs))
    live, frozen = signs[:, :count] * SIZES, signs[:, count:] * SIZES
    g, i, likelihood, entropy, points = live.T
    values["verdicts"] = np.zeros((len(signs), 1, 2, 2))
    values["verdicts"][:, 0, 0, 0] = 2 * g
    values["implicit_logps"] = np.zeros((len(signs), 2))
    values["logps"] = np.stack([i / config.implicit.beta, 0 * i], axis=1)
    values["start_logps"] = np.stack([likelihood, 0 * i], axis=1)
    values["entropy"] = np.stack([0 * i, entropy], axis=1)
    values["start_points"] = np.stack([points, 0 * i], axis=1)
    values |= {f"frozen {reward}": frozen[:, r : r + 1] for r, reward in enumerate(REWARDS)}
    values["label"] = np.arange(len(signs)) % 3 / 2
    source = frozen if update == "frozen" else live
    answers = {
        "agreement": source.sum(axis=1) > 0,
        "generative": source[:, 0] > 0,
        "implicit": source[:, 1] > 0,
        "likelihood": source[:, 2] > 0,
        "entropy": source[:, 3] > 0,
        "pointwise": source[:, 4] > 0,
        "consensus": source @ CONSENSUS > 0,
        "external": values["label"],
        "cream": values["label"],
        "dice": values["label"],
    }
    given = {"external", "cream", "dice"}
    expected = answers[name]
    others = [key for key in answers if key != name and not {key, name} <= given]
    assert all(np.any(expected != answers[key]) for key in others)
    decisions = objective.objective(evidence(values, config), config)[1]
    np.testing.assert_array_equal(decisions["label"], expected)
    soft = changed(config, {"preference.soft": True})
    label = np.asarray(objective.objective(evidence(values, soft), soft)[1]["label"])
    if name in given:
        np.testing.assert_array_equal(label, expected)  # taken as it is
    else:
        np.testing.assert_array_equal(label > 0.5, expected)
        assert np.all((label > 0) & (label < 1))
