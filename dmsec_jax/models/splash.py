"""Attention on TPU that holds no matrix of logits: Pallas' splash kernel, with sequences filled up to the blocks that it works on.

Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022.
"""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from dmsec_jax.core import spread

LANES = 128
"""Blocks are multiples of this many positions."""
BLOCKS = (512, 384, 256, LANES)
WORTHWHILE = 2**20
"""From this many logits per example on; below, a plain product is as good."""


def worthwhile(n: int, m: int, heads: int) -> bool:
    """Whether N queries over M keys are long enough."""
    return heads * n * m >= WORTHWHILE


def attention(
    q: Float[Array, "B N heads D"], k: Float[Array, "B M heads D"], v: Float[Array, "B M heads D"]
) -> Float[Array, "B N heads D"]:
    """Scaled dot-product attention with float32 softmax and accumulators; the gradient recomputes the logits block by block.

    The compiler cannot divide a kernel among devices: with a mesh in force each takes its own rows.
    """
    return spread.apart(_attention, q, k, v)


def _attention(q, k, v):
    # on first use, which is on a TPU or when compiling for one
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        FullMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    (b, n, heads, width), m = q.shape, k.shape[1]
    q = q * jnp.asarray(width**-0.5, q.dtype)
    q, k, v = (rearrange(_filled(x), "b n h d -> (b h) n d") for x in (q, k, v))  # to the kernel examples are heads
    rows, columns = q.shape[1], k.shape[1]
    block_q, block_kv = _block(rows), _block(columns)
    kernel = make_splash_mha(
        MultiHeadMask([FullMask((rows, columns))] * (b * heads)),
        block_sizes=BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    real = None
    if columns > m:  # keys that were filled in belong to nobody
        real = SegmentIds(q=jnp.zeros(rows, jnp.int32), kv=(jnp.arange(columns) >= m).astype(jnp.int32))
    out = kernel(q, k, v, real)
    return rearrange(out[:, :n], "(b h) n d -> b n h d", b=b).astype(v.dtype)


def _filled(x):
    """[B, N, heads, D] with N up to whole blocks, zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, 0)))


def _block(length: int) -> int:
    return next(size for size in BLOCKS if length % size == 0)
