"""Sampling responses: one prefill for each prompt, shared by its N responses, then cached decoding.

Every response's randomness is keyed by (seed, iteration, prompt, sample), so that it does not depend on the batch it
is in. Temperature, top-p and top-k are arrays: changing them compiles nothing.
Shapes: B prompts, N responses to each prompt, M = B N rows, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scir_jax.data.batches import Prompts, PromptSpec
from scir_jax.engine import mesh as meshes
from scir_jax.model.decoder import Cache, Model, Params

Array = jax.Array


class Samples(NamedTuple):
    """ids [B, N, R] int32; lengths [B, N] with the stop token; logps [B, N] float32, summed, untempered."""

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


class _State(NamedTuple):
    step: Array
    hidden_MD: Array
    cache: Cache
    ids_MR: Array
    lengths_M: Array
    logps_M: Array
    done_M: Array


def sampler(
    model: Model, mesh: Mesh, spec: PromptSpec, *, stop_ids: tuple[int, ...], pad_id: int
) -> Callable[..., Samples]:
    """Makes the jitted function (params, Prompts, key, Sampling) -> Samples.

    A prompt with a negative index is padding and stops at once.
    """
    responses, response_tokens = spec.answers, spec.answer_tokens

    def sample(params: Params, prompts: Prompts, key, sampling: Sampling) -> Samples:
        ids_BP, lengths_B, index_B = prompts
        # Cast once: decoding would otherwise read and cast the float32 weights for every token.
        params = jax.tree.map(lambda p: p.astype(model.compute_dtype), params)
        hidden_BPD, cache = model.prefill(params, ids_BP, ids_BP.shape[1] + response_tokens)
        last_BD = jnp.take_along_axis(hidden_BPD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        repeat = lambda x, axis: jnp.repeat(x, responses, axis=axis)
        keys_M = jax.vmap(
            lambda prompt: jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, prompt), n))(
                jnp.arange(responses)
            )
        )(index_B).reshape(-1)
        starts_M = repeat(lengths_B, 0)
        rows = starts_M.shape[0]
        stops = jnp.asarray(stop_ids, jnp.int32)

        def body(state: _State) -> _State:
            logits_MV = model.logits(params, state.hidden_MD)
            step_keys_M = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_M, state.step)
            token_M = choose(logits_MV, step_keys_M, sampling)
            logp_M = jnp.take_along_axis(logits_MV, token_M[:, None], axis=1)[:, 0] - jax.nn.logsumexp(
                logits_MV, axis=1
            )
            running_M = ~state.done_M
            ids_MR = state.ids_MR.at[:, state.step].set(jnp.where(running_M, token_M, pad_id))
            done_M = state.done_M | (token_M[:, None] == stops).any(axis=1)
            hidden_MD, cache = model.decode(params, token_M, starts_M + state.step, state.cache)
            return _State(
                state.step + 1,
                hidden_MD,
                cache,
                ids_MR,
                state.lengths_M + running_M,
                state.logps_M + jnp.where(running_M, logp_M, 0),
                done_M,
            )

        start = _State(
            jnp.zeros((), jnp.int32),
            repeat(last_BD, 0),
            jax.tree.map(lambda x: repeat(x, 1), cache),
            jnp.full((rows, response_tokens), pad_id, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.float32),
            repeat(index_B, 0) < 0,
        )
        end = jax.lax.while_loop(lambda s: (s.step < response_tokens) & ~s.done_M.all(), body, start)
        shape = (ids_BP.shape[0], responses)
        return Samples(end.ids_MR.reshape(*shape, -1), end.lengths_M.reshape(shape), end.logps_M.reshape(shape))

    batch, one = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    return jax.jit(
        sample,
        in_shardings=(meshes.param_shardings(model, mesh), batch, one, one),
        out_shardings=one,
    )


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
      stream: "responses", "evaluation", "init", "world", "dropout" or "verdicts".
    """
    streams = {"responses": 0, "evaluation": 1, "init": 2, "world": 3, "dropout": 4, "verdicts": 5}
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), streams[stream]), iteration)
