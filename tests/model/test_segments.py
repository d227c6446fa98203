"""Rows that share their beginning in a bin, against the same rows by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.model.attention import attention
from scir_jax.model.segments import BRANCH, spans

# Trunk and branches of each segment of a bin; a trunk alone is a row of its own.
BINS = (
    ((90, 70, 130), (33,), (5, 1, 2), (1, 60, 3, 41)),
    ((40,), (200, 90, 40), (61,), (30, 12, 3)),
)
TOKENS = 500


def laid():
    """(segments [B, T], rows): the places of the rows of every bin."""
    segments, rows = np.zeros((2, len(BINS), TOKENS), np.int32)[0], []
    for b, bin in enumerate(BINS):
        place = 0
        for number, (trunk, *branches) in enumerate(bin, start=1):
            segments[b, place : place + trunk] = number
            shared, place = np.arange(place, place + trunk), place + trunk
            rows += [] if branches else [(b, shared)]
            for branch, tokens in enumerate(branches, start=1):
                segments[b, place : place + tokens] = number + branch * BRANCH
                rows.append((b, np.concatenate([shared, np.arange(place, place + tokens)])))
                place += tokens
    return segments, rows


SEGMENTS, ROWS = laid()


def test_positions_are_those_in_the_rows():
    positions = np.asarray(spans(jnp.asarray(SEGMENTS)).positions)
    for b, places in ROWS:
        np.testing.assert_array_equal(positions[b, places], np.arange(len(places)))


@pytest.mark.parametrize(
    ("implementation", "backend"), [("xla", "cpu"), ("blocks", "cpu"), ("blocks", "gpu"), ("blocks", "tpu")]
)
@pytest.mark.parametrize(("window", "cap"), [(None, 2.0), (50, None)])
def test_values_and_gradients_are_those_of_the_rows_by_themselves(implementation, backend, window, cap):
    shapes = [(len(BINS), TOKENS, heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, cotangent = (
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes)
    )

    def together(q, k, v):
        settings = dict(window=window, cap=cap, implementation=implementation, backend=backend)
        return attention(q, k, v, segments_BT=jnp.asarray(SEGMENTS), **settings)

    def separate(q, k, v):
        """Each row by itself, in NumPy's way; a trunk's places are written by each of its rows, always the same."""
        mixed = jnp.zeros_like(q)
        for b, places in ROWS:
            keys, values = (jnp.repeat(x[b, places], 2, axis=1) for x in (k, v))
            scores = jnp.einsum("thd,shd->hts", q[b, places], keys) * 8**-0.5
            scores = scores if cap is None else cap * jnp.tanh(scores / cap)
            behind = np.arange(len(places))[:, None] - np.arange(len(places))
            seen = (behind >= 0) & (behind < (window or TOKENS))
            weights = jax.nn.softmax(jnp.where(seen, scores, -np.inf), axis=-1)
            mixed = mixed.at[b, places].set(jnp.einsum("hts,shd->thd", weights, values))
        return mixed

    real = (SEGMENTS > 0)[..., None, None]
    found, pullback = jax.vjp(jax.jit(together), q, k, v)
    expected, reference = jax.vjp(jax.jit(separate), q, k, v)
    np.testing.assert_allclose(np.where(real, found, 0), expected, atol=2e-5)
    cotangent = jnp.where(real, cotangent, 0)
    for ours, theirs in zip(pullback(cotangent), reference(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("implementation", ["xla", "blocks"])
def test_a_branch_sees_no_other_to_the_bit(implementation):
    q, k, v = (jax.random.normal(key, (len(BINS), TOKENS, 2, 8)) for key in jax.random.split(jax.random.key(1), 3))
    other = np.zeros(SEGMENTS.shape, bool)
    other[0, 90:160] = True  # the first branch of the first segment
    attend = jax.jit(lambda *x: attention(*x, segments_BT=jnp.asarray(SEGMENTS), implementation=implementation))
    before = np.asarray(attend(q, k, v))
    after = np.asarray(attend(q, *(jnp.where(other[..., None, None], x + 1, x) for x in (k, v))))
    assert (before != after)[other].any()
    np.testing.assert_array_equal(before[~other], after[~other])
