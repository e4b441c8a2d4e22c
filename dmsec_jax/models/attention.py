"""Attention, one implementation for all networks, and the transformer blocks of the UNet."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dmsec_jax.models import splash
from dmsec_jax.models.layers import Conv, GroupNorm

MAX_LOGITS = 2**22
"""Queries are processed in chunks so that no more than this many attention logits per example and head group exist at once."""


def attention(q, k, v, *, mask=None, max_logits: int = MAX_LOGITS):
    """Scaled dot-product attention with float32 softmax, by what suits the device that the program is compiled for.

    TPU, long sequences: `splash.attention`. All else: `chunked`.

    Args:
        q: [B, N, heads, D]; k, v: [B, M, heads, D].
        mask: optional [N, M] boolean, True where a query may attend to a key.
        max_logits: largest number of logits per example held at once.

    Returns:
        [B, N, heads, D] in the dtype of `v`.
    """
    in_chunks = partial(chunked, mask=mask, max_logits=max_logits)
    if mask is None and splash.worthwhile(q.shape[1], k.shape[1], q.shape[2]):
        return jax.lax.platform_dependent(q, k, v, tpu=splash.attention, default=in_chunks)
    return in_chunks(q, k, v)


def chunked(q, k, v, *, mask=None, max_logits: int = MAX_LOGITS):
    """Attention on any device. Long sequences are split over queries (exact: each query's softmax sees all keys), so the [N, M] matrix never
    exists whole. Arguments as `attention`."""
    _, n, heads, width = q.shape
    q = q * jnp.asarray(width**-0.5, q.dtype)

    def attend(queries, allowed):
        logits = jnp.einsum("bnhd,bmhd->bhnm", queries, k, preferred_element_type=jnp.float32)
        if allowed is not None:
            logits = jnp.where(allowed, logits, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, -1).astype(v.dtype), v)

    chunks = 1
    while heads * (n // chunks) * k.shape[1] > max_logits and n % (2 * chunks) == 0:
        chunks *= 2
    if chunks == 1:
        return attend(q, mask)
    parts = rearrange(q, "b (c n) h d -> c b n h d", c=chunks)
    masks = None if mask is None else mask.reshape(chunks, n // chunks, -1)
    out = jax.lax.map(jax.checkpoint(lambda part: attend(*part)), (parts, masks))
    return rearrange(out, "c b n h d -> b (c n) h d")


class Attention(nn.Module):
    """Multi-head attention `to_q`, `to_k`, `to_v`, `to_out_0` of [B, N, C] over `context` [B, M, D] or itself."""

    heads: int
    qkv_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(
                f"attention width must be a multiple of the number of heads {self.heads}, got {width}; change attention_head_dim"
            )
        dense = lambda name, bias: nn.Dense(width, use_bias=bias, dtype=self.dtype, name=name)
        split = lambda a: rearrange(a, "b n (h d) -> b n h d", h=self.heads)
        q = split(dense("to_q", self.qkv_bias)(x))
        k, v = split(dense("to_k", self.qkv_bias)(context)), split(dense("to_v", self.qkv_bias)(context))
        return dense("to_out_0", True)(rearrange(attention(q, k, v), "b n h d -> b n (h d)"))


class GEGLU(nn.Module):
    """Gated linear unit with exact GELU: `proj` to twice the width, value times gelu(gate)."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        value, gate = jnp.split(nn.Dense(2 * self.width, dtype=self.dtype, name="proj")(x), 2, -1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """`net_0` (GEGLU to four times the width) and `net_2` (back)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        return nn.Dense(width, dtype=self.dtype, name="net_2")(GEGLU(4 * width, self.dtype, name="net_0")(x))


class BasicTransformerBlock(nn.Module):
    """Self-attention `attn1`, cross-attention `attn2`, feed-forward `ff`, each after a layer norm and with a residual."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)
        x = x + Attention(self.heads, dtype=self.dtype, name="attn1")(norm("norm1")(x))
        x = x + Attention(self.heads, dtype=self.dtype, name="attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class Transformer2D(nn.Module):
    """Transformer over the positions of a feature map, between `proj_in` and `proj_out` (1x1 convolutions in SD 1.x, linear in 2.x)."""

    heads: int
    depth: int = 1
    groups: int = 32
    linear_projection: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        height, width, channels = x.shape[1:]
        if self.linear_projection:
            project = lambda name: nn.Dense(channels, dtype=self.dtype, name=name)
        else:
            project = lambda name: Conv(channels, size=1, dtype=self.dtype, name=name)
        tokens = project("proj_in")(GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x))
        tokens = rearrange(tokens, "b h w c -> b (h w) c")
        for i in range(self.depth):
            tokens = BasicTransformerBlock(self.heads, self.dtype, name=f"transformer_blocks_{i}")(tokens, context)
        return x + project("proj_out")(rearrange(tokens, "b (h w) c -> b h w c", h=height, w=width))
