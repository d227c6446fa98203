"""Grouped-query attention and the one switch between its implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from scir_jax.model import cached
from scir_jax.model.blocks import CPU_BLOCK, blockwise
from scir_jax.model.segments import spans, visible
from scir_jax.model.sharding import Layout
from scir_jax.model.splash import splash

IMPLEMENTATIONS = ("auto", "xla", "blocks", "cudnn", "splash")
# Shorter rows are one block of the kernel or less: nothing can be skipped, and their scores are small.
SPLASH_TOKENS = 256
# Rows of up to so many tokens take XLA's where nothing else computes them.
XLA_TOKENS = {"cpu": CPU_BLOCK, "gpu": 512, "tpu": 512}


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    *,
    positions_B: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    implementation: str = "auto",
    layout: Layout | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Computes causal attention over right-padded rows, or one decoding step against a cache.

    Without `positions_B`, S = T and query t sees the keys s <= t. Padding is at the right end of a row, where no valid
    query looks, so that no padding mask is needed; the outputs at padded positions are finite and meaningless.

    With `positions_B`, T = 1 and the query of row b stands at positions_B[b] over a cache of S places, see
    scir_jax.model.cached: it sees what is held up to and including its own. XLA computes that, whatever is asked for.

    Args:
      q_BTHd: queries, H a multiple of K.
      k_BSKd, v_BSKd: keys and values, of the queries' dtype.
      positions_B: int32, or None.
      segments_BT: int32, or None: what a query sees besides, see scir_jax.model.segments; not in cuDNN, nor with
        `positions_B`. Splash takes no branches.
      window: with a sliding window, a query sees only its own place and the window - 1 before it.
      scale: of the scores; d ** -0.5 by default.
      cap: scores become cap * tanh(scores / cap); not in cuDNN.
      implementation: "xla", which holds all scores; "blocks", which holds those of one block, everywhere; "cudnn" (GPU,
        bfloat16 or float16); "splash" (TPU, bfloat16 or float32; on a CPU its operations are interpreted, to check it);
        or "auto": on a GPU cuDNN where it computes what is asked for, on a TPU splash for rows of at least 256 tokens,
        else blocks for rows that are several blocks long, and XLA for shorter ones.
      layout: of the arrays on a mesh.
      backend: "cpu", "gpu" or "tpu", what the program is compiled for; by default that of the layout's devices, and
        JAX's own without a layout.

    Returns:
      [B, T, H, d] in the queries' dtype; the softmax is computed in float32.

    Raises:
      ValueError: for an unknown implementation, one that cannot compute this (see `refusal`), and for segments in cuDNN
        or beside positions.
    """
    if backend is None:
        backend = backend_of(layout)
    reason = refusal(implementation, backend, q_BTHd.dtype, cap)
    if reason:
        raise ValueError(f"attention is {implementation}, but {reason}; set it to auto or blocks.")
    if scale is None:
        scale = q_BTHd.shape[-1] ** -0.5
    if positions_B is not None:
        if segments_BT is not None:
            raise ValueError("attention at positions of a cache takes no segments.")
        places = k_BSKd.shape[1]
        visible_BS = cached.visible(positions_B, jnp.arange(places), places, window)
        # One query has no [T, S] scores to save, and cuDNN would need the mask as a float bias.
        return _xla(q_BTHd, k_BSKd, v_BSKd, visible_BS[:, None, None, None, :], scale, cap)
    tokens = q_BTHd.shape[1]
    if window is not None and window >= tokens:
        window = None
    implementation = chosen(
        implementation,
        backend,
        q_BTHd.dtype,
        tokens=tokens,
        head_dim=q_BTHd.shape[-1],
        cap=cap,
        segmented=segments_BT is not None,
    )
    if implementation in ("blocks", "splash"):
        settings: dict[str, Any] = dict(window=window, scale=scale, cap=cap)
        if implementation == "blocks":
            attend = functools.partial(blockwise, **settings, backend=backend)
        else:
            attend = functools.partial(splash, **settings, interpret=backend == "cpu")
        return _on_devices(attend, layout, q_BTHd, k_BSKd, v_BSKd, segments_BT)
    if implementation == "cudnn":
        if segments_BT is not None:
            raise ValueError("cuDNN attention takes no segments; use attention blocks or auto.")
        return jax.nn.dot_product_attention(
            q_BTHd,
            k_BSKd,
            v_BSKd,
            is_causal=True,
            scale=scale,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    queries_T1, keys_T = jnp.arange(tokens)[:, None], jnp.arange(tokens)
    if segments_BT is not None:
        of = jax.tree.map(lambda x: x[:, None, None, :, None], spans(segments_BT))
        seen = visible(of, queries_T1, keys_T, window)
    else:
        seen = keys_T <= queries_T1
        if window is not None:
            seen &= keys_T > queries_T1 - window
    return _xla(q_BTHd, k_BSKd, v_BSKd, seen, scale, cap)


def _on_devices(
    attend: Callable[..., jax.Array],
    layout: Layout | None,
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segments_BT: jax.Array | None,
) -> jax.Array:
    """Lets each device compute attention over its own rows and heads."""
    if layout is None or layout.mesh.size == 1:
        return attend(q_BTHd, k_BTKd, v_BTKd, segments_BT)
    # The queries' heads are split as the keys' are, so that a device holds whole groups.
    heads = layout.spec(("batch", None, "kv_heads", None), k_BTKd.shape)
    # A kernel's outputs do not say over which mesh axes they vary.
    return jax.shard_map(
        attend,
        mesh=layout.mesh,
        in_specs=(heads, heads, heads, PartitionSpec(heads[0], None)),
        out_specs=heads,
        check_vma=False,
    )(q_BTHd, k_BTKd, v_BTKd, segments_BT)


def backend_of(layout: Layout | None) -> str:
    """Returns what programs are compiled for: "cpu", "gpu" or "tpu".

    That is the layout's devices, which may be those of another machine than this one.
    """
    platform = jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def refusal(implementation: str, backend: str, dtype, cap: float | None) -> str | None:
    """Says why a backend cannot compute attention with this implementation.

    Args:
      implementation: one of IMPLEMENTATIONS.
      backend: as `backend_of` says.
      dtype: of queries, keys and values.
      cap: of the scores.

    Returns:
      Half a sentence, or None where the backend can.

    Raises:
      ValueError: the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}.")
    dtype = jnp.dtype(dtype)
    if implementation == "cudnn":
        if backend != "gpu":
            return f"cuDNN runs on GPUs and this is a {backend.upper()}"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN computes it in bfloat16, not in {dtype}"
        if cap is not None:
            return "the attention scores of this model are capped, which cuDNN cannot"
    if implementation == "splash":
        if backend not in ("tpu", "cpu"):
            return f"splash attention runs on TPUs and this is a {backend.upper()}"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"splash attention computes in bfloat16 or float32, not in {dtype}"
    return None


def chosen(
    implementation: str,
    backend: str,
    dtype,
    *,
    tokens: int,
    head_dim: int,
    cap: float | None = None,
    segmented: bool = False,
) -> str:
    """Returns the implementation that computes rows of `tokens`: "xla", "blocks", "cudnn" or "splash".

    Args:
      implementation: what is asked for; "auto" is decided here.
      backend, dtype, cap: as in `refusal`.
      segmented: rows hold several segments.
    """
    if implementation != "auto":
        return implementation
    if backend == "gpu" and not refusal("cudnn", backend, dtype, cap):
        if not segmented and head_dim % 8 == 0 and head_dim <= 128:
            return "cudnn"
    if backend == "tpu" and tokens >= SPLASH_TOKENS and not refusal("splash", backend, dtype, cap):
        return "splash"
    return "blocks" if tokens > XLA_TOKENS[backend] else "xla"


def _xla(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, visible: jax.Array, scale: float, cap: float | None
) -> jax.Array:
    """Computes attention as two batched matrix products; `visible` broadcasts to [B, K, G, T, S], G = H / K.

    The queries of a group are stacked as rows of one product with their shared key head. XLA compiles that (and its
    gradient) to plain batched products, several times faster on a CPU than the five-axis einsum.
    """
    batch, tokens, heads, dim = q_BTHd.shape
    places, kv_heads = k_BSKd.shape[1:3]
    group = heads // kv_heads
    q_BKRd = q_BTHd.reshape(batch, tokens, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    q_BKRd = q_BKRd.reshape(batch, kv_heads, group * tokens, dim)
    scores = jnp.matmul(q_BKRd, k_BSKd.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, tokens, places) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    # The masked value is finite, so that a row that sees nothing (none does) would not become NaN.
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = weights.astype(v_BSKd.dtype).reshape(batch, kv_heads, group * tokens, places)
    mixed = jnp.matmul(weights, v_BSKd.transpose(0, 2, 1, 3))
    mixed = mixed.reshape(batch, kv_heads, group, tokens, dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, tokens, heads, dim)
