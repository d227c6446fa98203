"""The decoder: Flax NNX modules that describe it, and pure functions of its parameters.

The modules are split once, when a model is defined, into a static definition and a pytree of
parameters (plain nested dictionaries). Everything that computes takes those parameters.

Shapes: B batch, T tokens, P prompt tokens, S places in the cache, D width, H heads, K key/value
heads, d head dimension, F feed-forward width, V vocabulary, L layers. A weight has its output axes
before its input axes, as in a Hugging Face checkpoint, so that import and export only reshape.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scir_jax.model.architecture import Architecture
from scir_jax.model.attention import IMPLEMENTATIONS, attention

Params = dict[str, Any]
_INIT_SCALE = 0.02
REMAT = ("none", "full", "dots")


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer: [L, B, S, K, d] each, compute dtype."""

    k: jax.Array
    v: jax.Array


def _normal(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(_INIT_SCALE * jax.random.normal(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        # Rounded before it is scaled, as transformers does.
        return self.scale[...].astype(x.dtype) * x32.astype(x.dtype)


def rotate(x_BTHd: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: dimension i of the first half turns with dimension i of the second half."""
    half = x_BTHd.shape[-1] // 2
    # On the host: an accelerator's float32 power is too coarse for positions in the thousands.
    frequencies = (theta ** (-np.arange(half) / half)).astype(np.float32)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies  # [B, T, 1, d/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHd.dtype)


class Attention(nnx.Module):
    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        heads, kv_heads, dim, width = arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.hidden_size
        self.theta = arch.rope_theta
        self.q = _normal(rngs, heads, dim, width)
        self.k = _normal(rngs, kv_heads, dim, width)
        self.v = _normal(rngs, kv_heads, dim, width)
        self.o = _normal(rngs, width, heads, dim)

    def project(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = jnp.einsum("btD,hdD->bthd", x_BTD, self.q[...])
        k = jnp.einsum("btD,kdD->btkd", x_BTD, self.k[...])
        v = jnp.einsum("btD,kdD->btkd", x_BTD, self.v[...])
        return rotate(q, positions_BT, self.theta), rotate(k, positions_BT, self.theta), v

    def output(self, x_BTHd: jax.Array) -> jax.Array:
        return jnp.einsum("bthd,Dhd->btD", x_BTHd, self.o[...])


class SwiGLU(nnx.Module):
    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        self.gate = _normal(rngs, arch.intermediate_size, arch.hidden_size)
        self.up = _normal(rngs, arch.intermediate_size, arch.hidden_size)
        self.down = _normal(rngs, arch.hidden_size, arch.intermediate_size)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        # One row axis: the weights' gradients are then plain matrix products.
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        gate = jnp.einsum("nD,fD->nf", x_ND, self.gate[...])
        up = jnp.einsum("nD,fD->nf", x_ND, self.up[...])
        return jnp.einsum("nf,Df->nD", jax.nn.silu(gate) * up, self.down[...]).reshape(x_BTD.shape)


class Block(nnx.Module):
    def __init__(self, arch: Architecture, implementation: str, rngs: nnx.Rngs):
        self.window = arch.sliding_window
        self.implementation = implementation
        self.attention_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.attention = Attention(arch, rngs)
        self.mlp_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.mlp = SwiGLU(arch, rngs)

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """A block over whole rows; also their keys and values, [B, T, K, d]."""
        positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        q, k, v = self.attention.project(self.attention_norm(x_BTD), positions_BT)
        mixed = attention(q, k, v, window=self.window, implementation=self.implementation)
        return self._finish(x_BTD, mixed), (k, v)

    def decode(
        self, x_B1D: jax.Array, positions_B: jax.Array, cache: Cache, layer: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """A block at one position a row, whose key and value go into the cache of all layers."""
        q, k, v = self.attention.project(self.attention_norm(x_B1D), positions_B[:, None])
        rows_B = jnp.arange(positions_B.shape[0])
        cache = Cache(
            cache.k.at[layer, rows_B, positions_B].set(k[:, 0]),
            cache.v.at[layer, rows_B, positions_B].set(v[:, 0]),
        )
        mixed = attention(q, cache.k[layer], cache.v[layer], positions_B=positions_B, window=self.window)
        return self._finish(x_B1D, mixed), cache

    def _finish(self, x_BTD: jax.Array, mixed_BTHd: jax.Array) -> jax.Array:
        x_BTD = x_BTD + self.attention.output(mixed_BTHd)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Decoder(nnx.Module):
    """Embedding, L blocks whose parameters are stacked on a leading axis, final norm, head."""

    def __init__(self, arch: Architecture, implementation: str, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=arch.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(layer_rngs):
            return Block(arch, implementation, layer_rngs)

        self.embed = _normal(rngs, arch.vocab_size, arch.hidden_size)
        self.layers = blocks(rngs)
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        if not arch.tie_embeddings:
            self.head = _normal(rngs, arch.vocab_size, arch.hidden_size)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without its parameters. Hashable, so that it may be a static argument of jit."""

    arch: Architecture
    compute_dtype: str
    attention: str
    remat: str
    activations: Any = None

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters: normal with standard deviation 0.02, norm scales 1."""
        decoder = Decoder(self.arch, self.attention, nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))

    def abstract(self) -> Params:
        """The parameters' shapes and dtypes, as jax.ShapeDtypeStruct; nothing is allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> Params:
        """Like the parameters, with a tuple of axis names for every array (None: never sharded)."""
        axes = {
            "embed": ("vocab", "embed"),
            "layers": {
                "attention_norm": {"scale": ("layers", None)},
                "attention": {
                    "q": ("layers", "heads", "head_dim", "embed"),
                    "k": ("layers", "kv_heads", "head_dim", "embed"),
                    "v": ("layers", "kv_heads", "head_dim", "embed"),
                    "o": ("layers", "embed", "heads", "head_dim"),
                },
                "mlp_norm": {"scale": ("layers", None)},
                "mlp": {
                    "gate": ("layers", "mlp", "embed"),
                    "up": ("layers", "mlp", "embed"),
                    "down": ("layers", "embed", "mlp"),
                },
            },
            "norm": {"scale": (None,)},
        }
        if not self.arch.tie_embeddings:
            axes["head"] = ("vocab", "embed")
        return axes

    def head(self, params: Params) -> jax.Array:
        """The output head [V, D] in the parameters' dtype: the embedding where they are tied."""
        return params["embed" if self.arch.tie_embeddings else "head"]

    def hidden(self, params: Params, ids_BT: jax.Array) -> jax.Array:
        """Final-normed hidden states [B, T, D] (compute dtype) of right-padded rows of token ids.

        A position depends on the ids up to and including its own, so that the padding may hold any
        valid id. Ids outside 0..V-1 are clamped, not reported: check them where they are read.
        """

        def step(x_BTD, layer_params):
            x_BTD, _ = self._block(layer_params)(x_BTD)
            return self._constrain(x_BTD), None

        x_BTD, _ = jax.lax.scan(self._checkpoint(step), self._embed(params, ids_BT), params["layers"])
        return self._final_norm(params, x_BTD)

    def prefill(self, params: Params, ids_BP: jax.Array, cache_length: int) -> tuple[jax.Array, Cache]:
        """Hidden states [B, P, D] of right-padded prompts, and a cache with S = cache_length places.

        The places of a prompt's padding hold keys that no query may see. `decode` keeps to that by
        starting at the prompt's length: it overwrites each place before it first looks at it.

        Raises:
          ValueError: if the prompts do not fit into the cache.
        """
        spare = cache_length - ids_BP.shape[1]
        if spare < 0:
            raise ValueError(f"a cache of {cache_length} places cannot hold prompts of {ids_BP.shape[1]} tokens.")

        def step(x_BPD, layer_params):
            x_BPD, keys_values = self._block(layer_params)(x_BPD)
            return self._constrain(x_BPD), keys_values

        x_BPD, (k_LBPKd, v_LBPKd) = jax.lax.scan(step, self._embed(params, ids_BP), params["layers"])
        padding = [(0, 0), (0, 0), (0, spare), (0, 0), (0, 0)]
        return self._final_norm(params, x_BPD), Cache(jnp.pad(k_LBPKd, padding), jnp.pad(v_LBPKd, padding))

    def decode(self, params: Params, ids_B: jax.Array, positions_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Hidden states [B, D] of one token a row at positions_B (int32), and the updated cache.

        The token's key and value are written at its position. A position at or past the end of the
        cache is not written, and its hidden state is then not that of the full row.
        """

        def step(carry, layer_and_params):
            x_B1D, cache = carry
            layer, layer_params = layer_and_params
            # The cache of all layers is carried, so that a step writes one place and copies nothing.
            x_B1D, cache = self._block(layer_params).decode(x_B1D, positions_B, cache, layer)
            return (self._constrain(x_B1D), cache), None

        carry = (self._embed(params, ids_B[:, None]), cache)
        (x_B1D, cache), _ = jax.lax.scan(step, carry, (jnp.arange(self.arch.num_layers), params["layers"]))
        return self._final_norm(params, x_B1D)[:, 0], cache

    def _embed(self, params: Params, ids_BT: jax.Array) -> jax.Array:
        table_VD = params["embed"]
        if isinstance(self.activations, jax.sharding.NamedSharding):
            # Gathered before the look-up: looking up in a split table gives hidden states split along D, which
            # would have to be gathered whole on their way to being split along B.
            whole = jax.sharding.NamedSharding(self.activations.mesh, jax.sharding.PartitionSpec())
            table_VD = jax.lax.with_sharding_constraint(table_VD.astype(self.compute_dtype), whole)
        x_BTD = table_VD.at[ids_BT].get(mode="clip").astype(self.compute_dtype)
        return self._constrain(x_BTD)

    def _block(self, layer_params: Params) -> Block:
        # Cast one layer at a time: the whole model is never there in both precisions.
        cast = jax.tree.map(lambda p: p.astype(self.compute_dtype), layer_params)
        return nnx.merge(_definitions(self).block, cast)

    def _final_norm(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        return nnx.merge(_definitions(self).norm, params["norm"])(x_BTD)

    def _constrain(self, x_BTD: jax.Array) -> jax.Array:
        if self.activations is None:
            return x_BTD
        return jax.lax.with_sharding_constraint(x_BTD, self.activations)

    def _checkpoint(self, step):
        if self.remat == "none":
            return step
        policies = jax.checkpoint_policies
        policy = {
            "full": policies.nothing_saveable,
            "dots": policies.dots_with_no_batch_dims_saveable,
        }[self.remat]
        # A scan's body is not merged with its recomputation, so that the barriers are not needed.
        return jax.checkpoint(step, policy=policy, prevent_cse=False)


class _Definitions(NamedTuple):
    block: nnx.GraphDef
    norm: nnx.GraphDef


@functools.cache
def _definitions(model: Model) -> _Definitions:
    decoder = nnx.eval_shape(lambda: Decoder(model.arch, model.attention, nnx.Rngs(0)))
    return _Definitions(nnx.graphdef(decoder.layers), nnx.graphdef(decoder.norm))


def define(
    arch: Architecture,
    *,
    compute_dtype: str = "float32",
    attention: str = "auto",
    remat: str = "none",
    activations: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
) -> Model:
    """The model of an architecture.

    Args:
      compute_dtype: "float32", "bfloat16" or "float16": of activations and of the weights in use.
      attention: "auto", "xla" or "cudnn", see scir_jax.model.attention.
      remat: what the backward pass computes again: "none", "full" (all but the blocks' inputs), or
        "dots" (all but the blocks' inputs and the outputs of matrix products with weights).
      activations: a sharding for hidden states [B, T, D], imposed between the blocks.

    Raises:
      ValueError: for an unknown value of `compute_dtype`, `attention` or `remat`.
    """
    for name, value, known in (
        ("compute_dtype", compute_dtype, ("float32", "bfloat16", "float16")),
        ("attention", attention, IMPLEMENTATIONS),
        ("remat", remat, REMAT),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
    return Model(arch, compute_dtype, attention, remat, activations)
