"""Attention over a cache in blocks: XLA's values, and no bit depends on the cache's size or on other rows; rings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.model import decoder
from scir_jax.model.architecture import Architecture, Layer
from scir_jax.model.attention import attention
from scir_jax.model.cached import BLOCK, cache_places, of_prompts, over_cache
from tests.caches import prefilled
from tests.processes import quick_jit

LAYERS, PLACES = 3, 3 * BLOCK
POSITIONS = np.array([0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 7, PLACES - 1], np.int32)


def drawn(heads, kv_heads, dim, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(0, 2, (len(POSITIONS), heads, dim))
    k, v = rng.normal(0, 2, (2, LAYERS, len(POSITIONS), PLACES, kv_heads, dim))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


@pytest.mark.parametrize(
    "heads, kv_heads, dim, window, cap",
    [(4, 2, 16, None, None), (4, 4, 8, 300, None), (8, 2, 32, 5, 3.0), (3, 1, 160, PLACES - 1, 20.0)],
)
def test_values_are_those_of_xla(heads, kv_heads, dim, window, cap):
    q, k, v = drawn(heads, kv_heads, dim)
    attend = functools.partial(over_cache, window=window, scale=0.3, cap=cap)
    found = quick_jit(attend)(q, k, v, jnp.int32(1), POSITIONS)
    settings = dict(positions_B=jnp.asarray(POSITIONS), window=window, scale=0.3, cap=cap, implementation="xla")
    expected = attention(q[:, None], k[1], v[1], **settings)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 300])
def test_neither_the_cache_nor_other_rows_change_a_bit(dtype, window):
    q, k, v = drawn(4, 2, 16, dtype)

    def rows(positions, places=PLACES, poison=False):
        # What no query may see can be anything.
        unseen = jnp.arange(places)[None, :] > jnp.asarray(positions)[:, None]
        kept = [jnp.where(unseen[None, :, :, None, None] & poison, 1e30, x[:, :, :places]) for x in (k, v)]
        call = lambda q, k, v, at: over_cache(q, k, v, jnp.int32(1), at, window=window, scale=0.3, cap=None)  # noqa: E731
        return np.asarray(quick_jit(call)(q, *kept, jnp.asarray(positions)).astype(jnp.float32))

    whole = rows(POSITIONS)
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(rows(POSITIONS, poison=True), whole)
    # The rows that end early, beside others that end early too, and in a cache of one block less.
    early = np.minimum(POSITIONS, 9)
    np.testing.assert_array_equal(rows(early)[:2], whole[:2])
    short = np.minimum(POSITIONS, 2 * BLOCK - 1)
    np.testing.assert_array_equal(rows(short, 2 * BLOCK)[:4], whole[:4])


def test_a_ring_holds_what_a_window_sees():
    """Against float64 softmaxes over the last positions of whole rows, and other rows change no bit."""
    window, places, length = 2 * BLOCK + 90, 3 * BLOCK, 8 * BLOCK
    positions = np.array([0, window - 1, places - 1, places, 5 * BLOCK + 3, length - 1], np.int32)
    rng = np.random.default_rng(1)
    q = rng.normal(0, 2, (len(positions), 4, 16)).astype(np.float32)
    k, v = rng.normal(0, 2, (2, len(positions), length, 2, 16)).astype(np.float32)

    def rows(q, k, v, at):
        rings = [of_prompts(x, at + 1, places)[None] for x in (k, v)]
        return over_cache(q, *rings, jnp.int32(0), at, window=window, scale=0.3, cap=None)

    run = quick_jit(rows)
    found = np.asarray(run(q, k, v, positions))
    for row, at in enumerate(positions):
        seen = slice(max(at - window + 1, 0), at + 1)
        for head in range(4):
            scores = 0.3 * k[row, seen, head // 2].astype(np.float64) @ q[row, head]
            weights = np.exp(scores - scores.max())
            expected = weights @ v[row, seen, head // 2] / weights.sum()
            np.testing.assert_allclose(found[row, head], expected, rtol=0, atol=1e-5)
    order = [4, 5, 1, 0, 3, 2]
    others = np.where(positions == 5 * BLOCK + 3, positions, 7)
    np.testing.assert_array_equal(run(q, k, v, others)[4], found[4])
    np.testing.assert_array_equal(run(*(x[order] for x in (q, k, v, positions))), found[order])


def test_places_are_whole_blocks_where_there_are_several():
    assert [cache_places(n) for n in (1, 48, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1)] == [
        *(1, 48, BLOCK),
        *(2 * BLOCK, 2 * BLOCK, 3 * BLOCK),
    ]
    q, k, v = drawn(2, 2, 8)
    with pytest.raises(ValueError, match="a cache of 300 places does not have whole blocks"):
        over_cache(q, k[:, :, :300], v[:, :, :300], jnp.int32(0), POSITIONS, window=None, scale=1.0, cap=None)


@pytest.mark.parametrize("layers", [(Layer(),) * 2, tuple(map(Layer, (37, None, 300)))], ids=["full", "windows"])
def test_decoding_over_several_blocks_is_the_whole_row(layers):
    arch = Architecture("mistral", 50, 32, 48, 4, 2, 8, layers=layers, max_positions=1024)
    model = decoder.define(arch)
    params = jax.tree.map(lambda p: 5 * p if p.ndim > 2 else p, quick_jit(model.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    starts, steps, places = np.array([3, 2 * BLOCK - 2, 600], np.int32), 5, 3 * BLOCK
    ids = rng.integers(0, arch.vocab_size, (3, 620)).astype(np.int32)
    expected = quick_jit(model.hidden)(params, ids)

    def decoded(params, ids):
        _, cache = prefilled(model, params, ids[:, :600], starts, places)
        found = []
        for step in range(steps):
            at = starts + step
            hidden, cache = model.decode(params, ids[jnp.arange(3), at], jnp.asarray(at), cache)
            found.append(hidden)
        return jnp.stack(found, axis=1)

    found = quick_jit(decoded)(params, ids)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(found[row], expected[row, start : start + steps], rtol=0, atol=2e-5)
