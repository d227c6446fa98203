"""Log-probabilities of tokens, computed over one chunk of the vocabulary at a time, and the verdict read-out.

With N hidden states and V tokens the logits are an [N, V] array, by far the largest of a training step. Here they exist
for one chunk of C columns at a time: forward, a running maximum and sum give the log-sum-exp; backward, each chunk is
computed again from the saved log-sum-exp.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from scir_jax.model.sharding import Layout

_CHUNK_BYTES = 64 * 2**20  # of one chunk's float32 logits
_CHUNK_MULTIPLE = 128  # the width of a TPU's vector register and a good multiple elsewhere
VERDICT_CHUNK = 4096
_NO_TARGET = -1


def token_logprobs(
    hidden: jax.Array,
    head_VD: jax.Array,
    targets: jax.Array,
    *,
    chunk: int | None = None,
    cap: float | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """Computes log softmax(hidden @ head.T)[target], without the logits of the whole vocabulary.

    Products are made in the dtype of `hidden` and summed in float32, in which everything else is computed too.
    Differentiable in `hidden` and `head_VD`, in reverse mode, once.

    Args:
      hidden: [..., D], the decoder's final hidden states.
      head_VD: [V, D], any float dtype; its gradient is accumulated in float32.
      targets: integers [...] in 0..V-1. For a target outside, the result is -inf: mask it out with `jnp.where` before
        it is summed.
      chunk: vocabulary columns at a time. By default as many as make 64 MiB of float32 logits per device, at least 128.
      cap: logits become cap * tanh(logits / cap) (Gemma 2).
      layout: of a mesh over whose devices the hidden states are dealt out; the head comes to them one chunk at a time,
        and neither it nor its gradient is ever whole on a device.

    Returns:
      float32 [...].

    Raises:
      ValueError: if the shapes do not fit together.
    """
    hidden, targets = jnp.asarray(hidden), jnp.asarray(targets)
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != head_VD.shape[-1]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head_VD.shape} and targets {targets.shape} do not fit together."
        )
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_size(hidden_ND.shape[0], head_VD.shape[0], chunk, layout)
    picked_N, normalizer_N = _pick_and_normalize(chunk, cap, layout, hidden_ND, head_VD, targets.reshape(-1))
    return (picked_N - normalizer_N).reshape(targets.shape)


def token_entropies(
    hidden: jax.Array,
    head_VD: jax.Array,
    *,
    chunk: int | None = None,
    cap: float | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """Computes the entropy of softmax(hidden @ head.T) in nats, without the logits of the whole vocabulary.

    Differentiable in `hidden` and `head_VD`, in reverse mode, once.

    Args:
      hidden, head_VD, chunk, cap, layout: as in `token_logprobs`.

    Returns:
      float32 [...].
    """
    hidden = jnp.asarray(hidden)
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_size(hidden_ND.shape[0], head_VD.shape[0], chunk, layout)
    return _entropy(chunk, cap, layout, hidden_ND, head_VD).reshape(hidden.shape[:-1])


def log_normalizer(
    hidden: jax.Array,
    head_VD: jax.Array,
    *,
    chunk: int | None = None,
    cap: float | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """Computes log sum_v exp(hidden @ head[v]) for hidden [..., D] and head [V, D]: float32 [...].

    Args:
      chunk, cap, layout: as in `token_logprobs`.
    """
    hidden = jnp.asarray(hidden)
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_size(hidden_ND.shape[0], head_VD.shape[0], chunk, layout)
    nothing_N = jnp.full(hidden_ND.shape[0], _NO_TARGET, jnp.int32)
    _, normalizer_N = _pick_and_normalize(chunk, cap, layout, hidden_ND, head_VD, nothing_N)
    return normalizer_N.reshape(hidden.shape[:-1])


def verdict_logits(
    hidden_BD: jax.Array, head_VD: jax.Array, verdict_ids: jax.Array, *, cap: float | None = None
) -> jax.Array:
    """Computes the logits [B, 2] (float32) of the two verdict tokens: two rows of the head, no others."""
    rows_2D = head_VD[jnp.asarray(verdict_ids)].astype(hidden_BD.dtype)
    return soft_cap(jnp.einsum("bd,vd->bv", hidden_BD, rows_2D, preferred_element_type=jnp.float32), cap)


def read_verdicts(
    hidden_BD: jax.Array,
    head_VD: jax.Array,
    verdict_ids: Sequence[Sequence[int]],
    *,
    cap: float | None = None,
    layout: Layout | None = None,
) -> list[tuple[jax.Array, jax.Array]]:
    """Reads each template's verdict off hidden states: its logits, and their mass P(A) + P(B) under the whole vocabulary.

    The mass says how far the model answers the question. It is a measure, not an objective: no gradient passes through.

    Args:
      verdict_ids: ids of the verdicts of each template, K of them: two, or as many as there are points.
      cap, layout: as in `token_logprobs`.

    Returns:
      For each template float32 [B, K] and [B].
    """
    found = [verdict_logits(hidden_BD, head_VD, jnp.asarray(ids, jnp.int32), cap=cap) for ids in verdict_ids]
    stopped = jax.lax.stop_gradient((hidden_BD, head_VD))
    normalizer_B = log_normalizer(*stopped, chunk=VERDICT_CHUNK, cap=cap, layout=layout)
    both = [jax.nn.logsumexp(jax.lax.stop_gradient(logits_B2), axis=-1) for logits_B2 in found]
    return [(logits_B2, jnp.exp(both_B - normalizer_B)) for logits_B2, both_B in zip(found, both, strict=True)]


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """Computes cap * tanh(logits / cap); None caps nothing."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def chunk_size(rows: int, vocab: int, chunk: int | None = None, layout: Layout | None = None) -> int:
    """Returns how many vocabulary columns to take at a time: `chunk`, or the default of `token_logprobs`, at most all.

    Raises:
      ValueError: `chunk` is below 1.
    """
    if chunk is None:
        rows = rows if layout is None else layout.shard_size("token", rows)
        chunk = _CHUNK_BYTES // (4 * max(rows, 1)) // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE
        chunk = max(chunk, _CHUNK_MULTIPLE)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}.")
    return min(chunk, vocab)


def _constrain(layout: Layout | None, x: jax.Array, *axes: str | None) -> jax.Array:
    return x if layout is None else layout.constrain(x, *axes)


def _chunk_logits(
    index: jax.Array,
    chunk: int,
    cap: float | None,
    layout: Layout | None,
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes one chunk: its first row, head rows [C, D], logits [N, C] and where the target is [N, C].

    The last chunk starts early enough to be whole, instead of a padded copy of the head. The columns that it shares
    with the chunk before count there: here their logits are -inf.
    """
    start = jnp.minimum(index * chunk, head_VD.shape[0] - chunk)
    rows_CD = jax.lax.dynamic_slice_in_dim(head_VD, start, chunk).astype(hidden_ND.dtype)
    # The rows are sliced and rounded where they lie, then gathered.
    rows_CD = _constrain(layout, _constrain(layout, rows_CD, None, "table"), None, None)
    logits_NC = jnp.einsum("nd,cd->nc", hidden_ND, rows_CD, preferred_element_type=jnp.float32)
    logits_NC = soft_cap(logits_NC, cap)
    logits_NC = _constrain(layout, logits_NC, "token", None)
    columns_C = start + jnp.arange(chunk)
    new_C = columns_C >= index * chunk
    return (
        start,
        rows_CD,
        jnp.where(new_C, logits_NC, -jnp.inf),
        (targets_N[:, None] == columns_C) & new_C,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _pick_and_normalize(
    chunk: int,
    cap: float | None,
    layout: Layout | None,
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes the target's logit (-inf without one) and the log-sum-exp of all logits: float32 [N] each."""
    hidden_ND = _constrain(layout, hidden_ND, "token", None)

    def step(index, carry):
        maximum_N, sum_N, picked_N = carry
        _, _, logits_NC, target_NC = _chunk_logits(index, chunk, cap, layout, hidden_ND, head_VD, targets_N)
        new_maximum_N = jnp.maximum(maximum_N, logits_NC.max(axis=-1))
        exponentials_NC = jnp.exp(logits_NC - new_maximum_N[:, None])
        sum_N = sum_N * jnp.exp(maximum_N - new_maximum_N) + exponentials_NC.sum(axis=-1)
        picked_N = jnp.maximum(picked_N, jnp.where(target_NC, logits_NC, -jnp.inf).max(axis=-1))
        return new_maximum_N, sum_N, picked_N

    rows = hidden_ND.shape[0]
    lowest_N = jnp.full(rows, -jnp.inf, jnp.float32)
    start = (lowest_N, jnp.zeros(rows, jnp.float32), lowest_N)
    maximum_N, sum_N, picked_N = jax.lax.fori_loop(0, -(-head_VD.shape[0] // chunk), step, start)
    return picked_N, maximum_N + jnp.log(sum_N)


def _forward(chunk, cap, layout, hidden_ND, head_VD, targets_N):
    picked_N, normalizer_N = _pick_and_normalize(chunk, cap, layout, hidden_ND, head_VD, targets_N)
    return (picked_N, normalizer_N), (hidden_ND, head_VD, targets_N, normalizer_N)


def _backward(chunk, cap, layout, saved, cotangents):
    hidden_ND, head_VD, targets_N, normalizer_N = saved
    picked_cotangent_N, normalizer_cotangent_N = cotangents

    def gradient(logits_NC, target_NC):
        probabilities_NC = jnp.exp(logits_NC - normalizer_N[:, None])
        dlogits_NC = normalizer_cotangent_N[:, None] * probabilities_NC
        return dlogits_NC + jnp.where(target_NC, picked_cotangent_N[:, None], 0.0)

    return _accumulate(chunk, cap, layout, hidden_ND, head_VD, targets_N, gradient)


def _accumulate(chunk, cap, layout, hidden_ND, head_VD, targets_N, gradient):
    """Computes the gradients of hidden states and head.

    Args:
      gradient: (logits [N, C], is target [N, C]) -> gradient of the logits [N, C].
    """
    hidden_ND = _constrain(layout, hidden_ND, "token", None)

    def step(index, carry):
        dhidden_ND, dhead_VD = carry
        start, rows_CD, logits_NC, target_NC = _chunk_logits(index, chunk, cap, layout, hidden_ND, head_VD, targets_N)
        dlogits_NC = gradient(logits_NC, target_NC)
        if cap is not None:
            # The columns shared with the chunk before are -inf here, and their derivative is 0 already.
            dlogits_NC *= 1 - jnp.square(jnp.where(jnp.isfinite(logits_NC), logits_NC, 0) / cap)
        dlogits_NC = dlogits_NC.astype(hidden_ND.dtype)
        dhidden_ND += jnp.einsum("nc,cd->nd", dlogits_NC, rows_CD, preferred_element_type=jnp.float32)
        drows_CD = jnp.einsum("nc,nd->cd", dlogits_NC, hidden_ND, preferred_element_type=jnp.float32)
        drows_CD = _constrain(layout, drows_CD, None, "table")
        # The rows are added, since the last chunk overlaps the one before it; in the overlap drows is zero.
        drows_CD += jax.lax.dynamic_slice_in_dim(dhead_VD, start, chunk)
        dhead_VD = jax.lax.dynamic_update_slice_in_dim(dhead_VD, drows_CD, start, axis=0)
        return _constrain(layout, dhidden_ND, "token", None), _constrain(layout, dhead_VD, None, "table")

    zeros = (
        _constrain(layout, jnp.zeros(hidden_ND.shape, jnp.float32), "token", None),
        _constrain(layout, jnp.zeros(head_VD.shape, jnp.float32), None, "table"),
    )
    dhidden_ND, dhead_VD = jax.lax.fori_loop(0, -(-head_VD.shape[0] // chunk), step, zeros)
    no_gradient = np.zeros(targets_N.shape, jax.dtypes.float0)
    return dhidden_ND.astype(hidden_ND.dtype), dhead_VD.astype(head_VD.dtype), no_gradient


_pick_and_normalize.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _entropy(
    chunk: int, cap: float | None, layout: Layout | None, hidden_ND: jax.Array, head_VD: jax.Array
) -> jax.Array:
    """Computes H = log sum_v exp(z_v) - sum_v p_v z_v of the logits z: float32 [N]."""
    return _entropy_forward(chunk, cap, layout, hidden_ND, head_VD)[0]


def _entropy_forward(chunk, cap, layout, hidden_ND, head_VD):
    hidden_ND = _constrain(layout, hidden_ND, "token", None)
    nothing_N = jnp.full(hidden_ND.shape[0], _NO_TARGET, jnp.int32)

    def step(index, carry):
        maximum_N, sum_N, weighted_N = carry
        _, _, logits_NC, _ = _chunk_logits(index, chunk, cap, layout, hidden_ND, head_VD, nothing_N)
        new_maximum_N = jnp.maximum(maximum_N, logits_NC.max(axis=-1))
        exponentials_NC = jnp.exp(logits_NC - new_maximum_N[:, None])
        shrink_N = jnp.exp(maximum_N - new_maximum_N)
        finite_NC = jnp.where(jnp.isfinite(logits_NC), logits_NC, 0)
        weighted_N = weighted_N * shrink_N + (exponentials_NC * finite_NC).sum(axis=-1)
        return new_maximum_N, sum_N * shrink_N + exponentials_NC.sum(axis=-1), weighted_N

    zero_N = jnp.zeros(hidden_ND.shape[0], jnp.float32)
    start = (jnp.full_like(zero_N, -jnp.inf), zero_N, zero_N)
    maximum_N, sum_N, weighted_N = jax.lax.fori_loop(0, -(-head_VD.shape[0] // chunk), step, start)
    normalizer_N = maximum_N + jnp.log(sum_N)
    entropy_N = normalizer_N - weighted_N / sum_N
    return entropy_N, (hidden_ND, head_VD, nothing_N, normalizer_N, entropy_N)


def _entropy_backward(chunk, cap, layout, saved, cotangent_N):
    hidden_ND, head_VD, nothing_N, normalizer_N, entropy_N = saved

    def gradient(logits_NC, _):
        # dH / dz_v = -p_v (log p_v + H)
        log_p_NC = jnp.where(jnp.isfinite(logits_NC), logits_NC - normalizer_N[:, None], 0)
        probabilities_NC = jnp.exp(logits_NC - normalizer_N[:, None])
        return -cotangent_N[:, None] * probabilities_NC * (log_p_NC + entropy_N[:, None])

    return _accumulate(chunk, cap, layout, hidden_ND, head_VD, nothing_N, gradient)[:2]


_entropy.defvjp(_entropy_forward, _entropy_backward)
