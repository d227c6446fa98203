"""Chunked log-probabilities against float64 NumPy, and what they allocate."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.model import decoder
from scir_jax.model.architecture import Architecture, Layer
from scir_jax.model.logprobs import log_normalizer, read_verdicts, token_logprobs, verdict_logits

ROWS, VOCAB, WIDTH = (3, 5), 301, 16


def example(scale=1.0):
    rng = np.random.default_rng(0)
    hidden = scale * rng.normal(size=(*ROWS, WIDTH))
    head = rng.normal(size=(VOCAB, WIDTH))
    targets = rng.integers(0, VOCAB, ROWS)
    targets.flat[:3] = 0, VOCAB - 1, 127  # the ends of the vocabulary and of a chunk
    return hidden, head, targets


def exact_normalizer(hidden, head):
    logits = hidden @ head.T
    maximum = logits.max(-1, keepdims=True)
    return np.log(np.exp(logits - maximum).sum(-1)) + maximum[..., 0]


def exact(hidden, head, targets):
    logits = np.take_along_axis(hidden @ head.T, targets[..., None], -1)[..., 0]
    return logits - exact_normalizer(hidden, head)


def exact_gradients(hidden, head, targets, weights):
    logits = hidden @ head.T
    probabilities = np.exp(logits - exact_normalizer(hidden, head)[..., None])
    dlogits = weights[..., None] * (np.eye(VOCAB)[targets] - probabilities)
    return dlogits @ head, np.einsum("btv,btd->vd", dlogits, hidden)


@pytest.mark.parametrize("chunk", [None, 1, 7, 128, 300, VOCAB, 5000])
def test_values_and_gradients_for_every_chunk(chunk):
    hidden, head, targets = example()
    weights = np.random.default_rng(1).normal(size=ROWS)

    @jax.jit
    def run(hidden, head):
        def weighted(hidden, head):
            logprobs = token_logprobs(hidden, head, targets, chunk=chunk)
            return (logprobs * weights).sum(), logprobs

        return jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(hidden, head)

    (_, logprobs), (dhidden, dhead) = run(jnp.float32(hidden), jnp.float32(head))
    assert logprobs.dtype == jnp.float32
    assert logprobs.shape == ROWS
    np.testing.assert_allclose(logprobs, exact(hidden, head, targets), atol=2e-5)
    expected = exact_gradients(hidden, head, targets, weights)
    np.testing.assert_allclose(dhidden, expected[0], atol=2e-5)
    np.testing.assert_allclose(dhead, expected[1], atol=2e-5)


def test_exact_gradients_agree_with_finite_differences():
    hidden, head, targets = example()
    weights = np.random.default_rng(1).normal(size=ROWS)
    direction = np.random.default_rng(2).normal(size=head.shape)
    step = 1e-5
    up, down = (exact(hidden, head + sign * step * direction, targets) for sign in (1, -1))
    slope = (exact_gradients(hidden, head, targets, weights)[1] * direction).sum()
    assert (weights * (up - down)).sum() / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_target():
    hidden, head, targets = example(scale=100.0)
    logprobs = token_logprobs(jnp.float32(hidden), jnp.float32(head), targets, chunk=64)
    np.testing.assert_allclose(logprobs, exact(hidden, head, targets), rtol=1e-5, atol=1e-3)


def test_bfloat16_hidden_states_give_float32_results_and_gradients_in_their_own_dtype():
    hidden, head, targets = example()
    low = jnp.asarray(hidden, jnp.bfloat16)
    logprobs = token_logprobs(low, jnp.float32(head), targets, chunk=64)
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, exact(hidden, head, targets), atol=0.1)
    gradient = jax.grad(lambda h, w: token_logprobs(h, w, targets, chunk=64).sum(), (0, 1))
    dhidden, dhead = gradient(low, jnp.float32(head))
    assert (dhidden.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dhead, exact_gradients(hidden, head, targets, np.ones(ROWS))[1], atol=0.1)


def test_a_target_outside_the_vocabulary_has_no_probability_and_can_be_masked():
    hidden, head, targets = example()
    targets[0, 0] = -1
    hidden, head = jnp.float32(hidden), jnp.float32(head)
    assert token_logprobs(hidden, head, targets)[0, 0] == -np.inf

    def loss(head):
        logprobs = token_logprobs(hidden, head, targets)
        return jnp.where(targets >= 0, logprobs, 0.0).sum()

    assert np.isfinite(jax.grad(loss)(head)).all()


def test_log_normalizer_and_its_gradient():
    hidden, head, _ = example()
    for chunk in (None, 50):
        value = log_normalizer(jnp.float32(hidden), jnp.float32(head), chunk=chunk)
        np.testing.assert_allclose(value, exact_normalizer(hidden, head), atol=1e-5)
        gradient = jax.grad(lambda h, w=chunk: log_normalizer(h, jnp.float32(head), chunk=w).sum())(jnp.float32(hidden))
        probabilities = np.exp(hidden @ head.T - exact_normalizer(hidden, head)[..., None])
        np.testing.assert_allclose(gradient, probabilities @ head, atol=1e-5)


def test_verdict_logits_and_mass():
    hidden, head, _ = example()
    hidden, ids = hidden[:, 0], np.array([300, 4])
    logits = hidden @ head.T
    probabilities = np.exp(logits - exact_normalizer(hidden, head)[..., None])
    low = jnp.float32(hidden), jnp.float32(head)
    np.testing.assert_allclose(verdict_logits(*low, ids), logits[:, ids], atol=1e-5)
    np.testing.assert_allclose(read_verdicts(*low, [ids])[0][1], probabilities[:, ids].sum(-1), atol=1e-6)
    gradient = jax.grad(lambda h, w: read_verdicts(h, w, [ids])[0][1].sum(), (0, 1))(*low)
    assert not any(np.any(g) for g in gradient)


def test_shapes_that_do_not_fit_are_refused():
    hidden, head, targets = example()
    with pytest.raises(ValueError, match="do not fit together"):
        token_logprobs(hidden, head, targets[:, :2])
    with pytest.raises(ValueError, match="chunk must be"):
        token_logprobs(hidden, head, targets, chunk=0)


def compiled_gradient(vocab, width=1024, batch=4, length=2048):
    step = jax.jit(jax.value_and_grad(lambda h, w, t: token_logprobs(h, w, t).sum(), argnums=(0, 1)))
    shapes = ((batch, length, width), jnp.float32), ((vocab, width), jnp.float32), ((batch, length), jnp.int32)
    return step.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


def test_memory_is_far_below_the_logits_and_does_not_grow_with_the_vocabulary():
    sizes = {vocab: compiled_gradient(vocab).memory_analysis().temp_size_in_bytes for vocab in (32000, 64000, 128256)}
    assert sizes[128256] < 2**30  # all logits would be 4 GiB
    head_growth = 4 * 1024 * (128256 - 32000)
    assert sizes[128256] <= sizes[32000] + head_growth
    assert sizes[128256] <= 1.1 * sizes[32000], sizes  # the gradient itself is an output


def vocabulary_shapes(compiled, vocab):
    """The shapes in the compiled program that have an axis as long as the vocabulary."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())}
    return {shape for shape in shapes if any(size % vocab == 0 for size in shape)}


@pytest.mark.parametrize("tied", [True, False])
def test_a_judge_step_has_no_array_over_the_vocabulary_but_the_head(tied):
    vocab = 32003
    arch = Architecture("mistral", vocab, 16, 24, 2, 1, 8, layers=(Layer(),) * 2, tie_embeddings=tied)
    model = decoder.define(arch)

    def judge(params, ids_BT, last_B, verdict_ids):
        hidden_BD = model.hidden(params, ids_BT)[jnp.arange(ids_BT.shape[0]), last_B]
        logits_B2 = verdict_logits(hidden_BD, model.head(params), verdict_ids)
        ((_, mass_B),) = read_verdicts(hidden_BD, model.head(params), [verdict_ids])
        return (logits_B2[:, 0] - logits_B2[:, 1]).sum(), mass_B

    ids = jax.ShapeDtypeStruct((4, 12), jnp.int32)
    last, verdicts = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    for step in (judge, jax.value_and_grad(judge, has_aux=True)):
        compiled = jax.jit(step).lower(model.abstract(), ids, last, verdicts).compile()
        assert vocabulary_shapes(compiled, vocab) == {(vocab, 16)}


def test_the_check_for_vocabulary_axes_finds_one():
    vocab = 32003
    shapes = jax.ShapeDtypeStruct((4, 16), jnp.float32), jax.ShapeDtypeStruct((vocab, 16), jnp.float32)
    full = jax.jit(lambda h, w: jax.nn.logsumexp(h @ w.T, axis=-1)).lower(*shapes).compile()
    assert vocabulary_shapes(full, vocab) - {(vocab, 16), (16, vocab)}
