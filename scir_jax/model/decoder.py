"""The decoder as pure functions of its parameters.

The modules of scir_jax.model.layers are split once, when a model is defined, into a static definition and a pytree of
parameters (plain nested dictionaries). Everything that computes takes those parameters.

Shapes: B batch, T tokens, P prompt tokens, S places in the cache, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from scir_jax.model import layers
from scir_jax.model.architecture import Architecture
from scir_jax.model.attention import IMPLEMENTATIONS, backend_of, refusal
from scir_jax.model.cached import Cache, of_prompts, stacks
from scir_jax.model.logprobs import soft_cap
from scir_jax.model.lora import Lora
from scir_jax.model.sharding import RULES, Layout

Params = dict[str, Any]
REMAT = ("none", "full", "dots")
UNROLLED = 8
"""layers at the most that are written out one after another where their activations are kept: they compile as fast as a
loop, and a step on a CPU takes a quarter less"""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without its parameters. Hashable, so that it may be a static argument of jit."""

    arch: Architecture
    compute_dtype: str
    attention: str
    remat: str
    layout: Layout | None = None
    lora: Lora | None = None

    def init(self, key: jax.Array) -> Params:
        """Makes fresh float32 parameters: normal with standard deviation 0.02; norms and adapters change nothing."""
        return nnx.to_pure_dict(nnx.state(self._decoder(key), nnx.Param))

    def abstract(self) -> Params:
        """Returns the parameters' shapes and dtypes, as jax.ShapeDtypeStruct; nothing is allocated."""
        # A tree of the caller's own, whatever the caller does to it.
        return jax.tree.map(lambda leaf: leaf, _abstract(self.arch, self.lora))

    def logical_axes(self) -> Params:
        """Returns a tuple of axis names for every array (None: never sharded), in the structure of the parameters."""
        return layers.axes_of(_shapes(self.arch, self.lora))

    def head(self, params: Params) -> jax.Array:
        """Returns the output head [V, D] in the parameters' dtype: the embedding where they are tied."""
        return params["embed" if self.arch.tie_embeddings else "head"]

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Computes float32 logits [..., V] of hidden states [..., D]: at one position per row, never at all of them.

        On a mesh of several devices hidden states are [B, D].
        """
        head_VD = self.head(params).astype(hidden.dtype)
        if self.layout is not None and self.layout.mesh.size > 1:
            logits = self.layout.project(hidden, head_VD)
        else:
            logits = jnp.einsum("...d,vd->...v", hidden, head_VD, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.arch.final_cap)

    def hidden(self, params: Params, ids_BT: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Computes final-normed hidden states [B, T, D] (compute dtype) of right-padded rows of token ids.

        A position depends on the ids up to and including its own, so that the padding may hold any valid id. Ids
        outside 0..V-1 are clamped, not reported: check them where they are read.

        Args:
          key: key of the adapters' dropout; None drops nothing.
        """

        return self.hidden_of(params, (ids_BT,), key)[0]

    def hidden_of(
        self, params: Params, groups: Sequence[jax.Array], key: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Computes `hidden` of several groups of rows, each of its own length, in one pass over the layers.

        The layers' weights are gathered once for all groups. There is one gradient of them, and not one per group to be
        added.
        """
        rows = self._groups([ids_BT.shape for ids_BT in groups])
        return tuple(map(self._constrain, rows.unpack(self._hidden(params, groups, rows, key))))

    def hidden_of_bins(
        self,
        params: Params,
        bins: Sequence[jax.Array],
        segments: Sequence[jax.Array] | None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Computes `hidden` of bins, each of which may hold several rows.

        Args:
          bins: ids [B, T] of each group of bins.
          segments: numbers of the same shapes that tell the rows of a bin apart; None: a bin holds one row.
          key: key of the adapters' dropout; None drops nothing.

        Returns:
          [P, N, D]: the bins of each of the P devices that share a batch, behind one another, group by group.
        """
        rows = self._groups([ids_BT.shape for ids_BT in bins])
        if segments is not None:
            rows = dataclasses.replace(rows, segments=tuple(segments))
        return self._constrain(self._hidden(params, bins, rows, key))

    def _hidden(
        self, params: Params, groups: Sequence[jax.Array], rows: layers.Groups, key: jax.Array | None
    ) -> jax.Array:
        def step(x_PND, layer):
            layer_params, kind, layer_key = layer
            x_PND, _ = self._block(layer_params)(self._constrain(x_PND), rows, kind, layer_key)
            return self._split_places(x_PND), None

        keys = None if key is None else jax.random.split(key, self.arch.num_layers)
        xs = (params["layers"], self._kinds(), keys)
        x_PND = self._split_places(rows.pack([self._embed(params, ids_BT) for ids_BT in groups]))
        unroll = self.remat == "none" and self.arch.num_layers <= UNROLLED
        x_PND, _ = jax.lax.scan(self._checkpoint(step), x_PND, xs, unroll=unroll)
        return self._final_norm(params, x_PND)

    def prefill(self, params: Params, ids_BP: jax.Array) -> tuple[jax.Array, Cache]:
        """Computes hidden states [B, P, D] of right-padded prompts, and keys and values of all layers at all places."""
        rows = layers.Groups((ids_BP.shape,), ids_BP.shape[0])

        def step(x_BPD, layer):
            layer_params, kind = layer
            x_BPD, keys_values = self._block(layer_params)(x_BPD, rows, kind)
            return self._constrain(x_BPD), keys_values

        xs = (params["layers"], self._kinds())
        x_BPD, keys_values = jax.lax.scan(step, self._embed(params, ids_BP), xs)
        return self._final_norm(params, x_BPD), self._lay_out(Cache(*keys_values))

    def empty_cache(self, rows: int, places: int) -> tuple[Cache, ...]:
        """Makes a cache for rows of up to so many tokens, one Cache per stack of scir_jax.model.cached."""
        made = []
        for stack in stacks(self.arch, places):
            shape = (len(stack.layers), rows, stack.places, self.arch.num_kv_heads, self.arch.head_dim)
            made.append(Cache(jnp.zeros(shape, self.compute_dtype), jnp.zeros(shape, self.compute_dtype)))
        return tuple(made)

    def fill(
        self,
        caches: tuple[Cache, ...],
        prompts: Cache,
        lengths_B: jax.Array,
        put: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> tuple[Cache, ...]:
        """Puts prompts into a cache.

        The places of a prompt's padding hold keys that no query may see. `decode` keeps to that by starting at the
        prompt's length: it overwrites each place before it first looks at it.

        Args:
          prompts: as `prefill` gives them.
          lengths_B: int32, tokens of the prompts.
          put: what the prompts leave [B, S, K, d], what rows of the cache hold there -> what these are to hold.

        Raises:
          ValueError: the prompts do not fit into the cache.
        """
        tokens, places = prompts.k.shape[2], caches[0].k.shape[2]
        if stacks(self.arch, tokens)[0].places > places:
            raise ValueError(f"a cache of {places} places cannot hold prompts of {tokens} tokens.")

        def layer(cache: Cache, numbers: tuple[jax.Array, jax.Array]) -> tuple[Cache, None]:
            number, of_all = numbers

            def insert(all_LMSKd: jax.Array, new_LBPKd: jax.Array) -> jax.Array:
                new_BSKd = of_prompts(new_LBPKd[of_all], lengths_B, all_LMSKd.shape[2])
                at = (number, slice(None), slice(new_BSKd.shape[1]))
                return all_LMSKd.at[at].set(put(new_BSKd, all_LMSKd[at]))

            return Cache(insert(cache.k, prompts.k), insert(cache.v, prompts.v)), None

        # Layer by layer: what a prompt leaves in several rows is never there for all layers.
        held = [jnp.asarray(stack.layers) for stack in stacks(self.arch, places)]
        filled = (
            jax.lax.scan(layer, cache, (jnp.arange(len(numbers)), numbers))[0]
            for cache, numbers in zip(caches, held, strict=True)
        )
        return tuple(map(self._lay_out, filled))

    def decode(
        self, params: Params, ids_B: jax.Array, positions_B: jax.Array, caches: tuple[Cache, ...]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Computes hidden states [B, D] of one token per row at positions_B (int32), and the updated cache.

        The token's key and value are written at its position. From the end of the cache on, layers without a window
        see no more than its last places, and the hidden state is then not that of the full row.
        """

        def step(carry, layer):
            x_B1D, caches = carry
            numbers, layer_params, kind = layer
            # The cache of all layers is carried, so that a step writes one place and copies nothing.
            x_B1D, caches = self._block(layer_params).decode(x_B1D, positions_B, caches, numbers, kind)
            return (self.split_width(x_B1D), tuple(map(self._lay_out, caches))), None

        carry = (self.split_width(self._embed(params, ids_B[:, None])), tuple(map(self._lay_out, caches)))
        xs = (self._numbers(caches), params["layers"], self._kinds())
        (x_B1D, caches), _ = jax.lax.scan(step, carry, xs)
        return self._final_norm(params, x_B1D)[:, 0], caches

    def _groups(self, shapes: Sequence[tuple[int, ...]]) -> layers.Groups:
        parts = 1 if self.layout is None else self.layout.parts(*RULES["batch"])
        return layers.Groups(tuple(shapes), parts if all(rows % parts == 0 for rows, _ in shapes) else 1)

    def _embed(self, params: Params, ids_BT: jax.Array) -> jax.Array:
        table_VD = params["embed"]
        if self.layout is not None and self.layout.mesh.size > 1:
            x_BTD = self.layout.look_up(table_VD, ids_BT, self.compute_dtype)
        else:
            x_BTD = table_VD.at[ids_BT].get(mode="clip").astype(self.compute_dtype)
        if self.arch.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(self.arch.embed_scale, self.compute_dtype)
        return self._constrain(x_BTD)

    def _kinds(self) -> jax.Array:
        """Returns each layer's place among the different kinds of layers, [L] int32."""
        kinds = self.arch.kinds
        return jnp.asarray([kinds.index(layer) for layer in self.arch.layers], jnp.int32)

    def _numbers(self, caches: tuple[Cache, ...]) -> tuple[jax.Array, ...]:
        """Returns each layer's number in every stack, [L] int32 each; past the end where it is not in the stack."""
        found = []
        for _, held in stacks(self.arch, caches[0].k.shape[2]):
            numbers = [held.index(i) if i in held else len(held) for i in range(self.arch.num_layers)]
            found.append(jnp.asarray(numbers, jnp.int32))
        return tuple(found)

    def _decoder(self, key: jax.Array) -> layers.Decoder:
        return layers.Decoder(self.arch, self.attention, self.layout, self.lora, nnx.Rngs(params=key))

    def _block(self, layer_params: Params) -> layers.Block:
        # Cast one layer at a time: the whole model is never there in both precisions.
        cast = jax.tree.map(lambda p: p.astype(self.compute_dtype), layer_params)
        return nnx.merge(_definitions(self).block, cast)

    def _final_norm(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        # Cast as a block's are: a float32 scale and one that was stored in the computation's dtype give the same.
        cast = jax.tree.map(lambda p: p.astype(self.compute_dtype), params["norm"])
        return nnx.merge(_definitions(self).norm, cast)(x_BTD)

    def _constrain(self, x_BTD: jax.Array) -> jax.Array:
        return self._lay(x_BTD, "batch", None, None)

    def _split_places(self, x_PND: jax.Array) -> jax.Array:
        return self._lay(x_PND, "batch", "place", None)

    def split_width(self, x_B1D: jax.Array) -> jax.Array:
        """Lays one token per row out like the weights: a few activations travel at each step, and no weights."""
        return self._lay(x_B1D, "replica", None, "embed")

    def _lay_out(self, cache: Cache) -> Cache:
        return Cache(*(self._lay(x, None, "batch", None, "kv_heads", None) for x in cache))

    def _lay(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return x if self.layout is None else self.layout.constrain(x, *axes)

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


@functools.cache
def _shapes(arch: Architecture, lora: Lora | None) -> nnx.State:
    """Defines the parameters, which nothing else of a model changes."""
    model = define(arch, attention="xla", lora=lora)
    return nnx.state(nnx.eval_shape(lambda: model._decoder(jax.random.key(0))), nnx.Param)


@functools.cache
def _abstract(arch: Architecture, lora: Lora | None) -> Params:
    return jax.eval_shape(define(arch, attention="xla", lora=lora).init, jax.random.key(0))


class _Definitions(NamedTuple):
    block: nnx.GraphDef
    norm: nnx.GraphDef


@functools.cache
def _definitions(model: Model) -> _Definitions:
    decoder = nnx.eval_shape(lambda: model._decoder(jax.random.key(0)))
    return _Definitions(nnx.graphdef(decoder.layers), nnx.graphdef(decoder.norm))


def define(
    arch: Architecture,
    *,
    compute_dtype: str = "float32",
    attention: str = "auto",
    remat: str = "none",
    layout: Layout | None = None,
    lora: Lora | None = None,
) -> Model:
    """Makes the model of an architecture, without its parameters.

    Args:
      compute_dtype: "float32", "bfloat16" or "float16": of activations and of the weights in use.
      attention: "auto", "xla", "blocks", "cudnn" or "splash", see scir_jax.model.attention.
      remat: what the backward pass computes again: "none", "full" (all but the blocks' inputs), or "dots" (all but the
        blocks' inputs and the outputs of matrix products with weights).
      layout: of activations and caches on a mesh, whose devices the model is compiled for.
      lora: adapters beside the model's own parameters.

    Raises:
      ValueError: for an unknown value of `compute_dtype`, `attention` or `remat`, and for an attention that the devices
        cannot compute.
    """
    for name, value, known in (
        ("compute_dtype", compute_dtype, ("float32", "bfloat16", "float16")),
        ("attention", attention, IMPLEMENTATIONS),
        ("remat", remat, REMAT),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
    if attention not in ("auto", "xla", "blocks"):
        reason = refusal(attention, backend_of(layout), compute_dtype, arch.attention_cap)
        if reason:
            raise ValueError(f"attention is {attention}, but {reason}; set it to auto or blocks.")
    return Model(arch, compute_dtype, attention, remat, layout, lora)
