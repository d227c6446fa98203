"""The consistency penalties against float64 NumPy, their gradients by finite differences, and their extremes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.config.schema import ConsistencyConfig
from scir_jax.method import consistency
from tests.method_reference import differences, options, ref_penalty, table

NAMES = ("generative", "implicit", "generative")
PAIRS = 30  # one shape for all, so that operations compile once
KINDS = options("ConsistencyConfig", "kind")
TARGETS = ("mutual", "consensus")  # every frozen target is taken like the consensus


def penalties(logits, names, *, consensus_P=None, **settings):
    """The penalty of columns [P, R] whose reward models `names` says."""
    logits = jnp.asarray(logits, jnp.float32)
    by_name = {
        name: jnp.stack([logits[:, r] for r, other in enumerate(names) if other == name], axis=1)
        for name in dict.fromkeys(names)
    }
    return consistency.penalty(by_name, ConsistencyConfig(**settings), consensus_P)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_penalty_values(kind, target, models):
    logits = np.float32(np.random.default_rng(5).normal(0, 3, (PAIRS, models))).astype(float)
    consensus = np.float32(np.random.default_rng(6).normal(0, 3, PAIRS)).astype(float)
    names = NAMES[:models]
    for sharpen in (0.5, 1.7):
        expected = ref_penalty(logits, logits, names, kind=kind, target=target, consensus=consensus, sharpen=sharpen)
        found = penalties(logits, names, kind=kind, target=target, consensus_P=jnp.float32(consensus), sharpen=sharpen)
        assert found.shape == (PAIRS,) and found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stop", options("ConsistencyConfig", "stop_gradient"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("models", [2, 3])
def test_penalty_gradients_and_which_columns_learn(kind, stop, target, models):
    rng = np.random.default_rng(7)
    logits = np.float32(rng.normal(0, 2, (PAIRS, models))).astype(float)
    consensus = np.float32(rng.normal(0, 2, PAIRS)).astype(float)
    names = NAMES[:models]
    settings = dict(kind=kind, stop_gradient=stop, target=target)

    def total(logits, consensus):
        return penalties(logits, names, **settings, consensus_P=consensus).sum()

    found, towards = jax.grad(total, argnums=(0, 1))(jnp.float32(logits), jnp.float32(consensus))
    expected = differences(lambda z: ref_penalty(z, logits, names, **settings, consensus=consensus).sum(), logits)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(towards, 0)
    for r, name in enumerate(names):
        assert np.all(found[:, r] == 0) if name == stop else np.all(found[:, r] != 0)
    # Teaching does not change the value.
    np.testing.assert_allclose(
        total(jnp.float32(logits), jnp.float32(consensus)),
        penalties(logits, names, kind=kind, target=target, consensus_P=jnp.float32(consensus)).sum(),
        rtol=1e-6,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("models", [2, 3])
def test_penalty_of_extreme_logits_is_finite_and_right(kind, target, models):
    extremes = [-1e4, -60.0, 0.0, 60.0, 1e4] if models == 2 else [-1e4, 0.0, 60.0]
    logits = np.resize(list(itertools.product(extremes, repeat=models)), (PAIRS, models))
    names = NAMES[:models]
    columns = [r for name in dict.fromkeys(names) for r, other in enumerate(names) if other == name]
    for consensus in (np.full(len(logits), 1e4), logits[::-1, 0].copy()):
        settings = dict(kind=kind, target=target)

        def total(z):
            values = penalties(z, names, **settings, consensus_P=jnp.float32(consensus))
            return values.sum(), values

        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(jnp.float32(logits))
        assert np.isfinite(found).all() and np.isfinite(gradient).all()
        np.testing.assert_allclose(
            found,
            ref_penalty(logits[:, columns], logits[:, columns], names, **settings, consensus=consensus),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_penalty_does_not_depend_on_the_order_of_answers_or_of_models(kind, target):
    rng = np.random.default_rng(8)
    logits, towards = rng.normal(0, 3, (PAIRS, 3)).astype(np.float32), rng.normal(0, 3, PAIRS).astype(np.float32)
    settings = dict(kind=kind, target=target)
    value = penalties(logits, NAMES, **settings, consensus_P=towards)
    swapped = penalties(-logits, NAMES, **settings, consensus_P=-towards)
    np.testing.assert_allclose(swapped, value, rtol=1e-5, atol=1e-6)
    for order in itertools.permutations(range(3)):
        for names in (NAMES, [NAMES[r] for r in order], ("likelihood", "implicit", "generative")):
            found = penalties(logits[:, order], names, **settings, consensus_P=towards)
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


def test_divergences():
    logits = np.random.default_rng(9).normal(0, 4, (PAIRS, 3)).astype(np.float32)
    equal = np.repeat(logits[:, :1], 3, axis=1)
    two = logits[:, :2]
    for function in (consistency.symmetric_kl, consistency.jensen_shannon):
        assert np.all(np.asarray(function(logits)) > 1e-6) and np.all(np.asarray(function(two)) >= -1e-6)
        np.testing.assert_allclose(function(equal), 0, atol=1e-6)
    forward = consistency.kl(two[:, 0], two[:, 1])
    assert np.all((np.asarray(forward) > 1e-7) | (np.abs(two[:, 0] - two[:, 1]) < 1e-2))
    # Asymmetric, with its target first.
    np.testing.assert_allclose(consistency.kl(jnp.zeros(1), jnp.ones(1) * 4), -np.log(2) - table(4.0).mean(), atol=1e-5)
    np.testing.assert_allclose(
        consistency.symmetric_cross_entropy(logits),
        consistency.symmetric_kl(logits) + consistency.entropy(logits).mean(axis=1),
        rtol=1e-5,
        atol=1e-6,
    )
    apart = jnp.array([[1e4, -1e4], [50.0, -50.0], [3.0, -2.0]])
    js = np.asarray(consistency.jensen_shannon(apart))
    np.testing.assert_allclose(js[:2], np.log(2), atol=1e-6)
    assert np.all(np.asarray(consistency.jensen_shannon(logits)) <= np.log(2) + 1e-6) and js[2] < np.log(2)
    np.testing.assert_allclose(consistency.entropy(jnp.array([0.0, 1e4, -1e4])), [np.log(2), 0, 0], atol=1e-7)
    # Confidence: agreement and cross-entropy ask for it, symmetric KL does not.
    sure, unsure = jnp.array([[9.0, 9.0]]), jnp.array([[0.1, 0.1]])
    for kind in ("cross_entropy", "agreement", "pseudo_label"):
        assert penalties(sure, NAMES[:2], kind=kind)[0] < 0.01 < 0.5 < penalties(unsure, NAMES[:2], kind=kind)[0]
    np.testing.assert_allclose(
        consistency.agreement(jnp.array([[1e4, 1e4], [-1e4, -1e4], [0.0, 0.0]])), [0, 0, np.log(2)], atol=1e-6
    )


@pytest.mark.parametrize("stop", ["none", "generative"])
def test_symmetric_kl_with_the_whole_entropy_is_the_cross_entropy(stop):
    """1/2 [KL(p||q) + KL(q||p)] + 1/2 [H(p) + H(q)], in values and in gradients."""
    logits = np.random.default_rng(10).normal(0, 3, (PAIRS, 3)).astype(np.float32)

    def both(**settings):
        def total(z):
            values = penalties(z, NAMES, stop_gradient=stop, **settings)
            return values.sum(), values

        (_, values), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logits))
        return np.asarray(values), np.asarray(gradient)

    for found, expected in zip(both(kind="kl", entropy=1.0), both(kind="cross_entropy"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(both(kind="kl")[0] - both(kind="cross_entropy")[0]).max() > 0.1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["kl", "agreement"])
def test_entropy_is_added_with_its_weight(kind, target):
    """Two columns at probabilities 3/4 and 1/2: their entropies are ln 4 - 3/4 ln 3 and ln 2."""
    logits = jnp.array([[np.log(3.0), 0.0]] * PAIRS)
    settings = dict(kind=kind, target=target, consensus_P=jnp.ones(PAIRS))
    doubt = (np.log(4) - 0.75 * np.log(3) + np.log(2)) / 2
    without = penalties(logits, NAMES[:2], **settings)
    for weight in (0.5, -2.0):
        found = penalties(logits, NAMES[:2], entropy=weight, **settings)
        np.testing.assert_allclose(found, without + weight * doubt, rtol=1e-5, atol=1e-6)
