"""The preference losses against float64 NumPy, at the start of training and far from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.method import preference
from tests.method_reference import differences, options, ref_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("kind", options("PreferenceConfig", "loss"))
def test_preference_loss(kind, smoothing):
    rng = np.random.default_rng(10)
    margin = np.float32(rng.normal(0, 8, 60)).astype(float)
    q = np.float32(np.concatenate([np.repeat([0.0, 1.0, 0.5], 10), rng.uniform(0, 1, 30)])).astype(float)
    for beta in (0.1, 0.7):
        settings = dict(kind=kind, beta=beta, label_smoothing=smoothing)
        expected = functools.partial(ref_loss, **settings)
        np.testing.assert_allclose(
            preference.loss(jnp.float32(margin), jnp.float32(q), **settings), expected(margin, q), rtol=1e-5, atol=1e-5
        )
        found = jax.grad(lambda m: preference.loss(m, jnp.float32(q), **settings).sum())(jnp.float32(margin))
        np.testing.assert_allclose(found, differences(lambda m: expected(m, q).sum(), margin), rtol=1e-3, atol=1e-5)
        # Swapping the answers swaps the label.
        np.testing.assert_allclose(
            preference.loss(jnp.float32(-margin), jnp.float32(1 - q), **settings),
            expected(margin, q),
            rtol=1e-5,
            atol=1e-5,
        )


def test_preference_loss_at_the_start_and_far_away():
    at_zero = functools.partial(preference.loss, jnp.zeros(3), jnp.array([0.0, 1.0, 0.3]), beta=0.1)
    np.testing.assert_allclose(at_zero(kind="sigmoid"), np.log(2), atol=1e-7)
    np.testing.assert_allclose(at_zero(kind="sigmoid", label_smoothing=0.2), np.log(2), atol=1e-7)
    np.testing.assert_allclose(at_zero(kind="ipo"), 25, rtol=1e-6)
    np.testing.assert_allclose(at_zero(kind="hinge"), 1, atol=1e-7)
    far = jnp.array([1e5, -1e5])
    value, gradient = jax.value_and_grad(lambda m: preference.loss(m, jnp.ones(2), kind="sigmoid", beta=0.1).sum())(far)
    assert value == pytest.approx(1e4) and np.array_equal(gradient, np.float32([0, -0.1]))


@pytest.mark.parametrize("per_token", [False, True])
def test_margin(per_token):
    policy, reference = np.random.default_rng(11).normal(-20, 9, (2, 30, 2)).astype(np.float32)
    lengths = np.random.default_rng(12).integers(1, 30, (30, 2))
    ratio = (policy.astype(float) - reference) / (lengths if per_token else 1)
    found = preference.margin(policy, reference, lengths, length_normalised=per_token)
    np.testing.assert_allclose(found, ratio[:, 0] - ratio[:, 1], atol=1e-5)
    np.testing.assert_array_equal(preference.margin(policy, policy, lengths, length_normalised=per_token), 0)
