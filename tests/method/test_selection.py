"""Which pairs the reward models agree on, and the weights that the rules give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.config.schema import SelectionConfig
from scir_jax.method import selection
from tests.method_reference import configured, evidence, example, ref_certainty


@pytest.mark.parametrize(
    ("logits", "confidence", "expected"),
    [
        ([1, 2, 3], 0.0, True),
        ([-1, -2, -3], 0.0, True),
        ([1, 2, -3], 0.0, False),
        ([-1, 2, 3], 0.0, False),
        ([1e-12, 1, 1], 0.0, True),  # a side, though the probability rounds to 1/2
        ([0, 1, 1], 0.0, False),  # exactly 1/2 is no side
        ([0, 0, 0], 0.0, False),
        ([1e4, 1e4, 1e4], 0.0, True),
        ([2, 2, 2], 0.3, True),  # sigmoid(2) = 0.88
        ([2, 2, 1], 0.3, False),  # sigmoid(1) = 0.73
        ([-2, -2, -1], 0.3, False),
        ([-2, -2, -2], 0.3, True),
        ([1e4, -1e4, 1e4], 0.3, False),
        ([0, 0, 0], 0.3, False),
        ([1], 0.0, True),
    ],
)
def test_agreement_rule(logits, confidence, expected):
    assert selection.agreed(jnp.array([logits], jnp.float32), confidence).tolist() == [expected]


def test_confidence_boundary_is_not_enough():
    p = 0.75
    at = np.log(p / (1 - p))
    just = jnp.array([[at + 1e-4, -at - 1e-4], [at - 1e-4, -at + 1e-4]], jnp.float32).T.reshape(-1, 1)
    assert selection.agreed(just, 0.25).tolist() == [True, False, True, False]


@pytest.mark.parametrize("rule", selection.SELECTION)
def test_weights_of_the_rules(rule):
    """From 0 to 1, without gradient, alike for swapped pairs, and made of nothing that the rule does not ask for."""
    config = configured({"rewards.models": ("generative", "implicit", "likelihood")})
    given = evidence(example(config, 6), config, everything=True)
    entry, settings = selection.SELECTION[rule], SelectionConfig(rule=rule, confidence=0.1)
    logits = jnp.asarray(np.random.default_rng(7).normal(0, 2, (7, 2)), jnp.float32)
    asked = logits if entry.rewards else None
    weight = entry.weight(asked, given if entry.verdicts else given._replace(verdicts=None), settings)
    assert weight.shape == (7,) and weight.dtype == jnp.float32 and 0 <= weight.min() <= weight.max() <= 1
    if entry.rewards:
        np.testing.assert_array_equal(entry.weight(-logits, given, settings), weight)
        gradient = jax.grad(lambda z: entry.weight(z, given, settings).sum())(logits)
        np.testing.assert_array_equal(gradient, 0)
    if entry.verdicts:
        found = entry.weight(asked, given._replace(verdicts=-given.verdicts), settings)
        np.testing.assert_allclose(found, weight, rtol=1e-6)


def test_what_the_rules_take():
    logits = jnp.array([[2.0, 1.0], [2.0, -1.0], [-3.0, -3.0], [0.1, 0.1], [0.0, 2.0]])
    config = configured({})
    given = evidence(example(config, 6, pairs=5), config)
    for confidence, expected in ((0.0, [1, 0, 1, 1, 0]), (0.2, [1, 0, 1, 0, 0])):
        settings = SelectionConfig(confidence=confidence)
        assert selection.SELECTION["agreement"].weight(logits, given, settings).tolist() == expected
        assert selection.SELECTION["all"].weight(None, given, settings).tolist() == [1] * 5


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_certainty(power):
    config = configured({"selection.rule": "certainty", "selection.power": power, "generative.templates": ("a", "b")})
    values = example(config, 9, pairs=40)
    values["single"][:3] = [[0.1] * 4, [90, 90, -90, -90], [1e4, 1e4, 1e4, 1e4]]
    found = selection.SELECTION["certainty"].weight(None, evidence(values, config), config.selection)
    np.testing.assert_allclose(found, ref_certainty(values, config), atol=2e-3 if power < 1 else 1e-5)
    np.testing.assert_allclose(found[:3], [1, 0, 1], atol=1e-3 if power < 1 else 1e-6)


def test_both_orders():
    """Pairs whose verdicts z(y1, y2) and z(y2, y1) are these, beside reward models that are sure of the first answer."""
    z = np.array([[2.0, -1.0], [-2.0, 1.0], [2.0, 1.0], [3.0, 0.0], [-2.0, -1.0]])
    verdicts = jnp.asarray(np.stack([z, np.zeros_like(z)], axis=-1)[:, None])  # [P, one template, 2, (A, B)]
    logits = jnp.ones((5, 2))
    assert selection.both_orders(logits, verdicts).tolist() == [True, True, False, False, False]
    # Both templates, in both orders each.
    two = jnp.concatenate([verdicts, verdicts[jnp.array([0, 0, 0, 0, 0])]], axis=1)
    assert selection.both_orders(logits, two).tolist() == [True, False, False, False, False]
    apart = logits * jnp.array([1, -1])
    assert not selection.both_orders(apart, verdicts).any()
    assert not selection.both_orders(logits, verdicts, confidence=0.3).any()  # sigmoid(1) is .73


def test_drawn_pairs():
    """Predictions that contradict the label are most of three, so that the pair is left out; B of the others by hand."""
    sure, three = 60.0, np.log(3)
    verdicts = np.array(
        [
            [sure, sure, sure],  # B = 0
            [three, three, three],  # B = 0, however unsure
            [sure, sure, -sure],  # B = H(2/3)
            [-sure, -sure, sure],  # contradicted
            [sure, sure, sure],  # no label
        ]
    )
    labels = np.array([1, 1, 1, 1, 0.5])
    weights = np.array([1, 1, 1 + (2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3)), 0, 0])
    rng, copies = np.random.default_rng(0), 5000
    for power in (1.0, 3.0):
        found = selection.draw(np.tile(verdicts, (copies, 1)), np.tile(labels, copies), power, rng)
        assert found.sum() == 3 * copies
        draws = found.reshape(copies, 5)
        expected = 3 * weights**power / np.sum(weights**power)
        np.testing.assert_allclose(draws.mean(axis=0), expected, atol=0.08)
        assert not draws[:, 3:].any()
    # Half of the predictions are not most of them; swapped pairs are the same pairs.
    assert selection.draw(np.array([[1.0, -1.0]]), np.ones(1), 1.0, rng).tolist() == [1]
    swapped = selection.draw(-verdicts, 1 - labels, 1.0, np.random.default_rng(1))
    np.testing.assert_array_equal(swapped, selection.draw(verdicts, labels, 1.0, np.random.default_rng(1)))
    assert not selection.draw(verdicts[3:], labels[3:], 1.0, rng).any()
