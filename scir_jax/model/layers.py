"""The decoder's Flax NNX modules, whose features an Architecture switches.

Shapes: B batch, T tokens, N token places of several groups of rows, S places in the cache, D width, H heads, K
key/value heads, d head dimension, F feed-forward width, r rank of an adapter.

A weight has its output axes before its input axes, as in a Hugging Face checkpoint, so that import and export only
reshape. Every parameter names its axes for scir_jax.model.sharding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scir_jax.model.architecture import Architecture
from scir_jax.model.attention import attention, backend_of
from scir_jax.model.cached import BLOCK, Cache, layer_places, over_cache
from scir_jax.model.lora import Lora
from scir_jax.model.segments import spans
from scir_jax.model.sharding import Layout

Kept = Callable[[float, tuple[int, ...]], jax.Array]  # Groups.kept with its key: (share, input axes) -> mask
_INIT_SCALE = 0.02
# Of [B, K, d] into [L, B, S, K, d] at a layer and a place of each row: devices that share rows exchange nothing. (A TPU's
# exchange nothing without it either.)
_ROW_BY_ROW = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2),
    inserted_window_dims=(0, 2),
    scatter_dims_to_operand_dims=(0, 2),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def normal(rngs: nnx.Rngs, sizes: dict[str, int]) -> nnx.Param:
    """Makes a parameter of normally distributed float32 numbers.

    Args:
      sizes: name of each axis -> its size.
    """
    value = _INIT_SCALE * jax.random.normal(rngs.params(), tuple(sizes.values()), jnp.float32)
    return nnx.Param(value, axes=tuple(sizes))


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32, with a scale that is shifted by `offset`."""

    def __init__(self, width: int, eps: float, offset: float = 0.0):
        self.eps = eps
        self.offset = offset
        self.scale = nnx.Param(jnp.full(width, 1 - offset, jnp.float32), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        # transformers rounds before it scales, or after where the scale has an offset.
        if self.offset:
            return (x32 * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return self.scale[...].astype(x.dtype) * x32.astype(x.dtype)


class Linear(nnx.Module):
    """W x, plus a bias and an adapter's scale B A x where there are some. `out` and `inputs` are axes and sizes."""

    def __init__(
        self,
        out: dict[str, int],
        inputs: dict[str, int],
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        lora: Lora | None = None,
    ):
        self.lora = lora
        self.inputs = len(inputs)
        self.weight = normal(rngs, out | inputs)
        if bias:
            self.bias = nnx.Param(jnp.zeros(tuple(out.values()), jnp.float32), axes=tuple(out))
        if lora is not None:
            shape = (lora.rank, *inputs.values())
            bound = functools.reduce(int.__mul__, inputs.values()) ** -0.5
            a = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
            self.lora_a = nnx.Param(a, axes=("rank", *inputs))
            # Zero: an adapter that is not trained yet changes nothing.
            self.lora_b = nnx.Param(jnp.zeros((*out.values(), lora.rank), jnp.float32), axes=(*out, "rank"))

    def __call__(self, x: jax.Array, kept: Kept | None = None) -> jax.Array:
        """x [..., *inputs] -> [..., *out]. With `kept`, the adapter's inputs are dropped out."""
        y = _contract(x, self.weight[...], self.inputs)
        if hasattr(self, "bias"):
            y = y + self.bias[...]
        if self.lora is not None:
            if kept is not None and self.lora.dropout:
                share = 1 - self.lora.dropout
                x = jnp.where(kept(share, x.shape[-self.inputs :]).reshape(x.shape), x / share, 0).astype(x.dtype)
            low = _contract(x, self.lora_a[...], self.inputs)
            y = y + (self.lora.scale * _contract(low, self.lora_b[...], 1)).astype(y.dtype)
        return y


def _contract(x: jax.Array, weight: jax.Array, axes: int) -> jax.Array:
    """Sums over as many last axes of both as `axes` says."""
    last = tuple(range(-axes, 0))
    return jnp.tensordot(x, weight, (last, last))


def rotate(x_BTHd: jax.Array, positions_BT: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Turns queries or keys by their positions: dimension i of the first half with dimension i of the second half."""
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies  # [B, T, 1, d/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHd.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with its four projections."""

    def __init__(self, arch: Architecture, implementation: str, layout: Layout | None, linear, rngs: nnx.Rngs):
        self.arch = arch
        self.implementation = implementation
        self.layout = layout
        width = {"embed": arch.hidden_size}
        heads = {"heads": arch.num_heads, "head_dim": arch.head_dim}
        kv_heads = {"kv_heads": arch.num_kv_heads, "head_dim": arch.head_dim}
        self.q = linear("q_proj", heads, width, bias=arch.qkv_bias)
        self.k = linear("k_proj", kv_heads, width, bias=arch.qkv_bias)
        self.v = linear("v_proj", kv_heads, width, bias=arch.qkv_bias)
        self.o = linear("o_proj", width, heads, bias=arch.o_bias)
        if arch.qk_norm:
            self.q_norm = RMSNorm(arch.head_dim, arch.norm_eps, arch.norm_offset)
            self.k_norm = RMSNorm(arch.head_dim, arch.norm_eps, arch.norm_offset)

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, kind: jax.Array, kept: Sequence[Kept | None]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes queries [B, T, H, d], keys and values [B, T, K, d]; queries and keys are rotated."""
        q, k, v = self.q(x_BTD, kept[0]), self.k(x_BTD, kept[1]), self.v(x_BTD, kept[2])
        if self.arch.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        table = [layer.rope.frequencies(self.arch.head_dim) for layer in self.arch.kinds]
        frequencies = table[0] if len(table) == 1 else jnp.asarray(table)[kind]
        return rotate(q, positions_BT, frequencies), rotate(k, positions_BT, frequencies), v

    def mix(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        kind: jax.Array,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Mixes the values that each query sees, [B, T, H, d].

        One of the different kinds of layers is chosen at run time, so that all are one scanned program.
        """
        tokens = k.shape[1]
        windows = [None if w is not None and w >= tokens else w for w in (layer.window for layer in self.arch.kinds)]
        attend = functools.partial(
            attention,
            segments_BT=segments_BT,
            scale=self.arch.query_scale,
            cap=self.arch.attention_cap,
            implementation=self.implementation,
            layout=self.layout,
        )
        if len(set(windows)) == 1:
            return attend(q, k, v, window=windows[0])
        return jax.lax.switch(kind, [functools.partial(attend, window=w) for w in windows], q, k, v)

    def look_back(
        self,
        q_B1Hd: jax.Array,
        caches: tuple[Cache, ...],
        numbers: Sequence[jax.Array],
        kind: jax.Array,
        positions_B: jax.Array,
    ) -> jax.Array:
        """Mixes the values of a layer's cache that the query of each row sees, [B, 1, H, d].

        Args:
          numbers: the layer's number in each stack; only that in its own is looked at.
        """
        scale = self.arch.head_dim**-0.5 if self.arch.query_scale is None else self.arch.query_scale
        settings: dict[str, Any] = dict(scale=scale, cap=self.arch.attention_cap, layout=self.layout)

        def attend(stack: int, window: int | None, caches: tuple[Cache, ...], numbers: Sequence[jax.Array]):
            (k, v), number = caches[stack], numbers[stack]
            if k.shape[2] > BLOCK:
                return over_cache(q_B1Hd[:, 0], k, v, number, positions_B, window=window, **settings)[:, None]
            return attention(q_B1Hd, k[number], v[number], positions_B=positions_B, window=window, **settings)

        held, ways = [cache.k.shape[2] for cache in caches], []
        for layer in self.arch.kinds:
            places = layer_places(layer, held[0])
            # A ring of the window's own size holds nothing that is out of sight.
            window = None if layer.window is not None and layer.window >= places else layer.window
            ways.append((held.index(places), window))
        if len(set(ways)) == 1:
            return attend(*ways[0], caches, numbers)
        return jax.lax.switch(kind, [functools.partial(attend, *way) for way in ways], caches, numbers)


class FeedForward(nnx.Module):
    """Gated feed-forward layer."""

    def __init__(self, arch: Architecture, linear):
        width, inner = {"embed": arch.hidden_size}, {"mlp": arch.intermediate_size}
        self.activation = arch.activation
        self.gate = linear("gate_proj", inner, width, bias=arch.mlp_bias)
        self.up = linear("up_proj", inner, width, bias=arch.mlp_bias)
        self.down = linear("down_proj", width, inner, bias=arch.mlp_bias)

    def __call__(self, x_BTD: jax.Array, kept: Sequence[Kept | None]) -> jax.Array:
        # One row axis: the weights' gradients are then plain matrix products.
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        gate, up = self.gate(x_ND, kept[0]), self.up(x_ND, kept[1])
        return self.down(ACTIVATIONS[self.activation](gate) * up, kept[2]).reshape(x_BTD.shape)


class Block(nnx.Module):
    """Attention and feed-forward, each with its residual. `kind` is the layer's place in `arch.kinds`."""

    def __init__(
        self,
        arch: Architecture,
        implementation: str,
        layout: Layout | None,
        lora: Lora | None,
        rngs: nnx.Rngs,
    ):
        def linear(name: str, out: dict[str, int], inputs: dict[str, int], bias: bool) -> Linear:
            return Linear(out, inputs, rngs, bias=bias, lora=lora if lora and name in lora.targets else None)

        norm = functools.partial(RMSNorm, arch.hidden_size, arch.norm_eps, arch.norm_offset)
        self.post_norms = arch.post_norms
        self.attention_norm = norm()
        self.attention = Attention(arch, implementation, layout, linear, rngs)
        self.mlp_norm = norm()
        self.mlp = FeedForward(arch, linear)
        if arch.post_norms:
            self.attention_post_norm = norm()
            self.mlp_post_norm = norm()

    def __call__(
        self, x_PND: jax.Array, groups: Groups, kind: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """A block over whole rows of one or several lengths; also their keys and values, [P, N, K, d].

        Args:
          x_PND: as `Groups.pack` gives it.
          key: for the adapters' dropout.
        """
        kept = [None] * 7 if key is None else [functools.partial(groups.kept, k) for k in jax.random.split(key, 7)]
        q, k, v = self.attention.project(self.attention_norm(x_PND), groups.positions(), kind, kept)
        rows = zip(*(groups.unpack(x) for x in (q, k, v)), groups.segments or [None] * len(groups.shapes), strict=True)
        mixed = groups.pack([self.attention.mix(q, k, v, kind, segments_BT=which) for q, k, v, which in rows])
        return self._finish(x_PND, mixed, kept), (k, v)

    def decode(
        self,
        x_B1D: jax.Array,
        positions_B: jax.Array,
        caches: tuple[Cache, ...],
        numbers: Sequence[jax.Array],
        kind: jax.Array,
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Computes a block at one position per row, whose key and value go into the cache of all layers.

        Args:
          numbers: the layer's number in each stack; past the end of those that it is not in.
        """
        kept = [None] * 7
        q, k, v = self.attention.project(self.attention_norm(x_B1D), positions_B[:, None], kind, kept)
        on_tpu = backend_of(self.attention.layout) == "tpu"

        def write(all_LBSKd: jax.Array, number: jax.Array, new_B1Kd: jax.Array) -> jax.Array:
            places_B = positions_B % all_LBSKd.shape[2]
            # Past the end nothing is written: no branch is needed, which might copy the stack.
            if on_tpu:
                # The TPU's compiler makes a loop of a scatter with batches, and copies of the whole cache for it.
                rows_B = jnp.arange(positions_B.shape[0])
                return all_LBSKd.at[number, rows_B, places_B].set(new_B1Kd[:, 0], mode="drop", unique_indices=True)
            at_B2 = jnp.stack([jnp.broadcast_to(number, places_B.shape), places_B], axis=1)
            return jax.lax.scatter(all_LBSKd, at_B2, new_B1Kd[:, 0], _ROW_BY_ROW, mode="drop", unique_indices=True)

        caches = tuple(
            Cache(write(cache.k, number, k), write(cache.v, number, v))
            for cache, number in zip(caches, numbers, strict=True)
        )
        return self._finish(x_B1D, self.attention.look_back(q, caches, numbers, kind, positions_B), kept), caches

    def _finish(self, x_BTD: jax.Array, mixed_BTHd: jax.Array, kept: Sequence[Kept | None]) -> jax.Array:
        update = self.attention.o(mixed_BTHd, kept[3])
        x_BTD = x_BTD + (self.attention_post_norm(update) if self.post_norms else update)
        update = self.mlp(self.mlp_norm(x_BTD), kept[4:])
        return x_BTD + (self.mlp_post_norm(update) if self.post_norms else update)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of rows that share a pass over the layers, so that weights are fetched and their gradients summed once.

    The rows of a device lie behind one another on an axis of token places, which is not split.

    Attributes:
      shapes: (B, T) of each group.
      parts: P, the parts into which the rows of every group are split over devices.
      segments: of each group [B, T] int32, where its rows hold several rows of their own, see scir_jax.model.segments:
        positions start anew with each. None: they hold one each.
    """

    shapes: tuple[tuple[int, ...], ...]
    parts: int = 1
    segments: tuple[jax.Array, ...] | None = None

    def pack(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Packs [B, T, ...] of every group into [P, N, ...]."""
        flat = [x.reshape(self.parts, -1, *x.shape[2:]) for x in arrays]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)

    def unpack(self, x: jax.Array) -> list[jax.Array]:
        """Unpacks [P, N, ...] into [B, T, ...] of every group."""
        sizes = [rows * tokens // self.parts for rows, tokens in self.shapes]
        ends = np.cumsum(sizes)
        parts = [x[:, end - size : end] for end, size in zip(ends, sizes, strict=True)]
        return [part.reshape(*shape, *x.shape[2:]) for part, shape in zip(parts, self.shapes, strict=True)]

    def kept(self, key: jax.Array, share: float, inputs: tuple[int, ...]) -> jax.Array:
        """Draws packed booleans [P, N, *inputs], true with probability `share`.

        They are drawn by row, so that P does not change them.
        """
        keys = jax.random.split(key, len(self.shapes))
        return self.pack(
            [jax.random.bernoulli(k, share, (*shape, *inputs)) for k, shape in zip(keys, self.shapes, strict=True)]
        )

    def positions(self) -> jax.Array:
        """Returns the position of every token place in its row, [1 or P, N] int32."""
        if self.segments is not None:
            return self.pack([spans(which).positions for which in self.segments])
        return jnp.concatenate([jnp.tile(jnp.arange(tokens), rows // self.parts) for rows, tokens in self.shapes])[None]


class Decoder(nnx.Module):
    """Embedding, L blocks whose parameters are stacked on a leading axis, final norm, head."""

    def __init__(
        self,
        arch: Architecture,
        implementation: str,
        layout: Layout | None,
        lora: Lora | None,
        rngs: nnx.Rngs,
    ):
        @nnx.split_rngs(splits=arch.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(layer_rngs):
            return Block(arch, implementation, layout, lora, layer_rngs)

        table = {"vocab": arch.vocab_size, "table": arch.hidden_size}
        self.embed = normal(rngs, table)
        self.layers = blocks(rngs)
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps, arch.norm_offset)
        if arch.reward:
            self.head = normal(rngs, {"reward": 1, "table": arch.hidden_size})
        elif not arch.tie_embeddings:
            self.head = normal(rngs, table)


def axes_of(state: Any) -> Any:
    """Returns the axis names of a state's parameters, as nested dictionaries; those of blocks lead with "layers"."""
    flat = nnx.to_flat_state(state)
    named = [
        (path, (("layers",) if path[0] == "layers" else ()) + tuple(param.get_metadata()["axes"]))
        for path, param in flat
    ]
    return nnx.traversals.unflatten_mapping(dict(named))
