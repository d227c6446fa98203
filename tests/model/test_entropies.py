"""Token entropies, the vocabulary taken a chunk at a time, against NumPy float64 and JAX's own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.model.logprobs import token_entropies
from tests.processes import quick_jit

V, D = 300, 8


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(3, 5, D)), 2 * rng.normal(size=(V, D))
    return [jnp.asarray(x, jnp.float32) for x in (hidden, head, rng.normal(size=(3, 5)))]


def expected(hidden, head, cap):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return -(np.exp(logp) * logp).sum(-1)


def plain(hidden, head, cap):
    logits = hidden @ head.T
    logp = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))
    return -(jnp.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("chunk", [70, 128, V, None])
def test_values_and_gradients(arrays, chunk, cap):
    hidden, head, weights = arrays
    found = token_entropies(hidden, head, chunk=chunk, cap=cap)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(hidden, head, cap), atol=1e-5)

    def gradients(function):
        return quick_jit(jax.grad(lambda h, w: (weights * function(h, w)).sum(), (0, 1)))(hidden, head)

    ours = gradients(lambda h, w: token_entropies(h, w, chunk=chunk, cap=cap))
    for x, y in zip(ours, gradients(lambda h, w: plain(h, w, cap)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def test_certain_and_uniform_predictions():
    head = jnp.asarray(np.concatenate([np.eye(4), np.zeros((4, 4))]), jnp.float32)
    hidden = jnp.asarray([[1e4, 0, 0, 0], [0, 0, 0, 0]], jnp.float32)
    np.testing.assert_allclose(token_entropies(hidden, head, chunk=3), [0, np.log(8)], atol=1e-6)
    grads = jax.grad(lambda h: token_entropies(h, head, chunk=3).sum())(hidden)
    assert np.isfinite(np.asarray(grads)).all()
