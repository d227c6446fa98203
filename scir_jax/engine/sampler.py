"""Sampling answers in slots: a slot whose answer is finished takes the next prompt's, while the others go on.

Every answer's randomness is keyed by (seed, iteration, prompt, sample), so that it depends on no slot, batch or
interruption. The prompt is computed once for all its answers. Temperature, top-p and top-k are arrays: changing them
compiles nothing.
Shapes: M slots, R tokens of an answer, B prompts that come in together, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scir_jax.data.batches import Admission, SlotSpec
from scir_jax.engine import mesh as meshes
from scir_jax.model.cached import Cache
from scir_jax.model.decoder import Model, Params

Array = jax.Array
SEGMENT = 32
"""tokens of each answer between two looks at what is finished"""


class Samples(NamedTuple):
    """Of every slot: ids [M, R] int32; lengths [M] with the stop token; logps [M] float32, summed, untempered."""

    ids: Array
    lengths: Array
    logps: Array


class Sampling(NamedTuple):
    """Scalar arrays: temperature float32 (0: greedy), top_p float32 (1: off), top_k int32 (0: off)."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray

    @classmethod
    def of(cls, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Sampling:
        """Makes settings of plain numbers."""
        return cls(np.float32(temperature), np.float32(top_p), np.int32(top_k))


class Slots(NamedTuple):
    """Answers that are being sampled.

    Attributes:
      hidden: [M, D] hidden state behind the last token, compute dtype.
      cache: M rows, see scir_jax.model.cached.
      prompt: [M] int32 the prompt's number.
      sample: [M] int32 the answer's number among those of its prompt.
      start: [M] int32 tokens of the prompt.
      ids: [M, R] int32.
      lengths: [M] int32 tokens so far.
      logps: [M] float32.
      done: [M] bool.
    """

    hidden: Array
    cache: tuple[Cache, ...]
    prompt: Array
    sample: Array
    start: Array
    ids: Array
    lengths: Array
    logps: Array
    done: Array


class Sampler:
    """The jitted functions of a sampler on one mesh.

    Attributes:
      empty: () -> Slots, all of them done.
      admit: (params, Slots, Admission) -> Slots, compiled for each length of prompts; donates the slots.
      decode: (params, Slots, key, Sampling, int32) -> (Slots, done [M]): the next tokens of each answer, SEGMENT at the
        most, or until so many slots are done; donates the slots.
      read: (Slots) -> Samples, whole on every device.
    """

    def __init__(self, model: Model, mesh: Mesh, spec: SlotSpec, *, stop_ids: tuple[int, ...], pad_id: int):
        self._model, self._spec = model, spec
        self._stop_ids, self._pad_id = stop_ids, pad_id
        self._shards = meshes.batch_shards(mesh)
        batch, one, params = meshes.batch_sharding(mesh), meshes.replicated(mesh), meshes.param_shardings(model, mesh)
        cache = meshes.cache_sharding(model, mesh)
        abstract = jax.eval_shape(self._empty)
        slots = jax.tree.map(lambda _: batch, abstract)._replace(cache=jax.tree.map(lambda _: cache, abstract.cache))
        self.abstract = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), abstract, slots
        )
        self.empty = jax.jit(self._empty, out_shardings=slots)
        self.admit = jax.jit(self._admit, in_shardings=(params, slots, batch), out_shardings=slots, donate_argnums=1)
        self.decode = jax.jit(
            self._decode, in_shardings=(params, slots, one, one, one), out_shardings=(slots, one), donate_argnums=1
        )
        self.read = jax.jit(self._read, in_shardings=(slots,), out_shardings=one)

    def _empty(self) -> Slots:
        model, rows = self._model, self._spec.slots
        zeros = lambda *tail: jnp.zeros((rows, *tail), jnp.int32)  # noqa: E731
        return Slots(
            jnp.zeros((rows, model.arch.hidden_size), model.compute_dtype),
            model.empty_cache(rows, self._spec.places),
            prompt=zeros(),
            sample=zeros(),
            start=zeros(),
            ids=zeros(self._spec.answer_tokens),
            lengths=zeros(),
            logps=jnp.zeros(rows, jnp.float32),
            done=jnp.ones(rows, bool),
        )

    def _admit(self, params: Params, slots: Slots, coming: Admission) -> Slots:
        model, shards = self._model, self._shards
        params = self._cast(params)
        hidden_BTD, prompts = model.prefill(params, coming.ids)
        last_BD = jnp.take_along_axis(hidden_BTD, (coming.length - 1)[:, None, None], axis=1)[:, 0]
        new_M = coming.source >= 0
        # A slot's prompt is one of its own device.
        source_DM = jnp.maximum(coming.source, 0).reshape(shards, -1)

        def of_source(x_B: Array) -> Array:
            x_DB = x_B.reshape(shards, -1, *x_B.shape[1:])
            at = source_DM.reshape(*source_DM.shape, *[1] * (x_B.ndim - 1))
            return jnp.take_along_axis(x_DB, at, axis=1).reshape(-1, *x_B.shape[1:])

        def put(new: Array, old: Array) -> Array:
            return jnp.where(new_M.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        cache = model.fill(slots.cache, prompts, coming.length, lambda new, old: put(of_source(new), old))
        return Slots(
            put(of_source(last_BD), slots.hidden),
            cache,
            prompt=put(of_source(coming.index), slots.prompt),
            sample=put(coming.sample, slots.sample),
            start=put(of_source(coming.length), slots.start),
            ids=put(jnp.int32(self._pad_id), slots.ids),
            lengths=put(jnp.int32(0), slots.lengths),
            logps=put(jnp.float32(0), slots.logps),
            done=put(jnp.bool_(False), slots.done),
        )

    def _decode(
        self, params: Params, slots: Slots, key: Array, sampling: Sampling, until: Array
    ) -> tuple[Slots, Array]:
        model = self._model
        # Cast once: decoding would otherwise read and cast the float32 weights for every token.
        params = self._cast(params)
        stops = jnp.asarray(self._stop_ids, jnp.int32)
        rows_M = jnp.arange(slots.done.shape[0])

        def noise_key(prompt: Array, sample: Array, step: Array) -> Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, prompt), sample), step)

        def body(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
            step, s = carry
            logits_MV = model.logits(params, s.hidden)
            token_M = choose(logits_MV, jax.vmap(noise_key)(s.prompt, s.sample, s.lengths), sampling)
            logp_M = jnp.take_along_axis(logits_MV, token_M[:, None], axis=1)[:, 0] - jax.nn.logsumexp(
                logits_MV, axis=1
            )
            running_M = ~s.done
            # What is done stands at place 0, so that it does not decide how much of the cache is looked at.
            position_M = jnp.where(running_M, s.start + s.lengths, 0)
            hidden_MD, cache = model.decode(params, token_M, position_M, s.cache)
            at_M = jnp.where(running_M, s.lengths, self._spec.answer_tokens)
            lengths_M = s.lengths + running_M
            ended_M = (token_M[:, None] == stops).any(axis=1) | (lengths_M >= self._spec.answer_tokens)
            return step + 1, s._replace(
                hidden=hidden_MD,
                cache=cache,
                ids=s.ids.at[rows_M, at_M].set(token_M, mode="drop"),
                lengths=lengths_M,
                logps=s.logps + jnp.where(running_M, logp_M, 0),
                done=s.done | ended_M,
            )

        def goes_on(carry: tuple[Array, Slots]) -> Array:
            step, s = carry
            return (step < SEGMENT) & (s.done.sum() < until)

        _, end = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), slots))
        return end, end.done

    def _read(self, slots: Slots) -> Samples:
        return Samples(slots.ids, slots.lengths, slots.logps)

    def _cast(self, params: Params) -> Any:
        return jax.tree.map(lambda p: p.astype(self._model.compute_dtype), params)


def choose(logits_MV: Array, keys_M: Array, sampling: Sampling) -> Array:
    """Chooses a token for each row: the argmax at temperature 0, else a draw from the filtered distribution.

    Returns:
      [M] int32.
    """
    scaled = logits_MV / jnp.maximum(sampling.temperature, 1e-6)
    limited = (sampling.top_p < 1) | (sampling.top_k > 0)
    # The vocabulary is searched only where a limit is set.
    scaled = jax.lax.cond(limited, lambda x: limit(x, sampling.top_p, sampling.top_k), lambda x: x, scaled)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_MV.shape[1:], jnp.float32))(keys_M)
    drawn = jnp.argmax(scaled + noise, axis=1)
    return jnp.where(sampling.temperature > 0, drawn, jnp.argmax(logits_MV, axis=1)).astype(jnp.int32)


def limit(scaled_MV: Array, top_p: Array, top_k: Array) -> Array:
    """Puts -inf outside the top_k highest logits and outside the smallest set of them with probability >= top_p.

    Of equal logits at the end of the set all are kept. Nothing is sorted: the lowest logit that is kept is found bit by
    bit.
    """
    order_MV = _ordered(scaled_MV)

    def above(values_MV: Array, amounts_MV: Array, least: Array) -> Array:
        return jnp.where(order_MV >= _threshold(order_MV, amounts_MV, least)[:, None], values_MV, -jnp.inf)

    most = jnp.minimum(top_k, scaled_MV.shape[1]).astype(jnp.float32)
    kept_MV = jax.lax.cond(top_k > 0, lambda: above(scaled_MV, jnp.ones_like(scaled_MV), most), lambda: scaled_MV)
    return jax.lax.cond(top_p < 1, lambda: above(kept_MV, jax.nn.softmax(kept_MV, axis=1), top_p), lambda: kept_MV)


def _ordered(values: Array) -> Array:
    """Returns uint32 numbers in the order of float32 ones."""
    bits = jax.lax.bitcast_convert_type(values + 0.0, jnp.uint32)  # + 0.0: -0 and 0 are equal
    return jnp.where(bits >> 31 != 0, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order_MV: Array, amounts_MV: Array, least: Array) -> Array:
    """Finds in each row the largest number at or above which the amounts sum to at least `least`, uint32 [M]."""

    def step(index, found_M):
        candidate_M = found_M | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        total_M = jnp.where(order_MV >= candidate_M[:, None], amounts_MV, 0).sum(axis=1)
        return jnp.where(total_M >= least, candidate_M, found_M)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros(order_MV.shape[0], jnp.uint32))


def stream_key(seed: int, stream: str, iteration: int) -> Array:
    """Returns the key of one use of randomness; prompt and sample numbers are folded in on the device.

    Args:
      stream: "responses", "evaluation", "init", "world", "dropout", "verdicts" or "constructed".
    """
    names = ("responses", "evaluation", "init", "world", "dropout", "verdicts", "constructed")
    streams = {name: number for number, name in enumerate(names)}
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), streams[stream]), iteration)
