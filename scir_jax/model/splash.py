"""Splash attention, JAX's Pallas kernel for TPUs, over the rows and heads that a device holds.

The kernel goes over blocks of queries and keys with a running softmax: the [T, S] scores never exist, and blocks that
the mask leaves empty are skipped.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128
BLOCKS = (512, 384, 256)
FUSED_BLOCKS = 4


def blocks(tokens: int) -> tuple[int, int]:
    """Returns the padded length of a row, and the size of its blocks, which divides it.

    A row of up to 512 tokens is one block, a multiple of the kernel's 128 lanes. Longer ones have blocks of 512, 384 or
    256 queries by as many keys, whichever pads least, the largest of those: the scores of 512 x 512 in float32, several
    of which the backward pass holds, fit into 16 MiB of on-chip memory beside heads of up to 256 dimensions.
    """

    def padded(block: int) -> int:
        return -(-tokens // block) * block

    if tokens <= BLOCKS[0]:
        return padded(LANES), padded(LANES)
    block = min(BLOCKS, key=lambda size: (padded(size), -size))
    return padded(block), block


def splash(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segments_BT: jax.Array | None,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    interpret: bool,
) -> jax.Array:
    """Computes causal attention on one device, as scir_jax.model.attention describes it.

    Args:
      interpret: run the kernel's program operation by operation, on any backend: slow, to check it.

    Returns:
      [B, T, H, d] in the queries' dtype.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    # The kernel has no scale. Scaling rounds queries in bfloat16 once more, unless the scale is a power of two.
    q_BTHd = (q_BTHd.astype(jnp.float32) * scale).astype(q_BTHd.dtype)
    tokens, heads = q_BTHd.shape[1:3]
    length, block = blocks(tokens)
    kernel = _kernel(heads, length, block, window, cap, interpret)

    def heads_first(x_BTHd: jax.Array) -> jax.Array:
        # The padding is at the right end, where no query of the row looks.
        return jnp.pad(x_BTHd, ((0, 0), (0, length - tokens), (0, 0), (0, 0))).swapaxes(1, 2)

    segments = None
    if segments_BT is not None:
        # Any id does for the padding, whose queries see at least themselves.
        segments_BT = jnp.pad(segments_BT, ((0, 0), (0, length - tokens)))
        segments = SegmentIds(segments_BT, segments_BT)
    mixed_BHTd = jax.vmap(kernel)(heads_first(q_BTHd), heads_first(k_BTKd), heads_first(v_BTKd), segments)
    return mixed_BHTd.swapaxes(1, 2)[:, :tokens]


@functools.cache
def _kernel(heads: int, length: int, block: int, window: int | None, cap: float | None, interpret: bool):
    """Makes the kernel as a function of q [H, T, d], k, v [K, T, d] and segments; its mask depends on no input."""
    # Imported late: Pallas takes a second that runs without it need not spend.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    shape = (length, length)
    mask = library.CausalMask(shape) if window is None else library.LocalMask(shape, (window - 1, 0), offset=0)
    # One backward kernel instead of two computes the scores once, with five matrix products per block and not seven.
    # But it writes the gradient of the queries once for every block of keys, in their dtype.
    fused = length <= FUSED_BLOCKS * block
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    # Which blocks to visit is known now. As NumPy arrays they are constants of whichever program uses the kernel,
    # whereas arrays made while one program is traced belong to it and to its devices.
    with jax.ensure_compile_time_eval():
        kernel = library.make_splash_mha_single_device(
            library.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            attn_logits_soft_cap=cap,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)
