"""Attention, one implementation for all networks, and the transformer blocks of the UNet."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dmsec_jax.models import flash, splash
from dmsec_jax.models.layers import Conv, GroupNorm

MAX_LOGITS = 2**22
"""Queries are processed in chunks so that no more than this many attention logits per example and head group exist at once."""


def attention(q, k, v, *, mask=None, max_logits: int = MAX_LOGITS):
    """Scaled dot-product attention with float32 softmax, by what suits the device that the program is compiled for.

    TPU, long sequences: `splash.attention`. NVIDIA GPU, half precision: `flash.attention`. All else: `chunked`.

    Args:
        q: [B, N, heads, D]; k, v: [B, M, heads, D].
        mask: optional [N, M] boolean, True where a query may attend to a key.
        max_logits: largest number of logits per example held at once.

    Returns:
        [B, N, heads, D] in the dtype of `v`.
    """
    in_chunks = partial(chunked, mask=mask, max_logits=max_logits)
    kernels = {}
    if mask is None and splash.worthwhile(q.shape[1], k.shape[1], q.shape[2]):
        kernels["tpu"] = splash.attention
    if mask is None and flash.suits(q.dtype, q.shape[3]):
        kernels["cuda"] = flash.attention
    return jax.lax.platform_dependent(q, k, v, **kernels, default=in_chunks) if kernels else in_chunks(q, k, v)


def chunked(q, k, v, *, mask=None, max_logits: int = MAX_LOGITS):
    """Attention on any device. Long sequences are split over queries (exact: each query's softmax sees all keys), so the [N, M] matrix never
    exists whole. Arguments as `attention`."""
    _, n, heads, width = q.shape
    q = q * jnp.asarray(width**-0.5, q.dtype)

    attend = lambda queries, allowed: _attend(queries, k, v, allowed)
    chunks = min(n, -(-heads * n * k.shape[1] // max_logits))
    if chunks <= 1:
        return attend(q, mask)
    chunks = next((more for more in range(chunks, min(n, 2 * chunks) + 1) if n % more == 0), chunks)
    rest = -n % chunks  # no number near divides them: queries of zeros fill up the last chunk
    parts = rearrange(jnp.pad(q, ((0, 0), (0, rest), (0, 0), (0, 0))), "b (c n) h d -> c b n h d", c=chunks)
    masks = None if mask is None else jnp.pad(mask, ((0, rest), (0, 0))).reshape(chunks, (n + rest) // chunks, -1)
    out = jax.lax.map(jax.checkpoint(lambda part: attend(*part)), (parts, masks))
    return rearrange(out, "c b n h d -> b (c n) h d")[:, :n]


@jax.custom_vjp
def _attend(q, k, v, allowed):
    """Attention of scaled queries in one piece. Dividing by the sums after the second product, not before it, saves passes over [N, M]; so does
    the gradient, which takes the sum over keys from the result (Dao et al., "FlashAttention", 2022, Appendix B.2)."""
    return _attend_fwd(q, k, v, allowed)[0]


def _attend_fwd(q, k, v, allowed):
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    if allowed is not None:
        logits = jnp.where(allowed, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    shares = (1 / weights.sum(-1)).swapaxes(1, 2)[..., None]  # [B, N, heads, 1]
    weights = weights.astype(v.dtype)
    mixed = jnp.einsum("bhnm,bmhd->bnhd", weights, v, preferred_element_type=jnp.float32) * shares
    out = mixed.astype(v.dtype)
    return out, (q, k, v, weights, shares, out)


def _attend_bwd(kept, g):
    q, k, v, weights, shares, out = kept
    scaled = g.astype(jnp.float32) * shares
    inner = (scaled * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)[..., None]  # [B, heads, N, 1]
    scaled = scaled.astype(v.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dlogits = weights * (product("bnhd,bmhd->bhnm", scaled, v) - inner)
    dlogits = dlogits.astype(q.dtype)  # a masked key has weight 0
    dq = product("bhnm,bmhd->bnhd", dlogits, k)
    dk = product("bhnm,bnhd->bmhd", dlogits, q)
    dv = product("bhnm,bnhd->bmhd", weights, scaled)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


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


@jax.custom_vjp
def gated(both):
    """value * gelu(gate) of [..., 2 D] = (value, gate), with the exact GELU, in the dtype of `both`.

    Through erf, which costs half of the erfc of `jax.nn.gelu`; the gradient keeps nothing but its argument.
    """
    return _gated_fwd(both)[0]


def _gated_fwd(both):
    value, gate = jnp.split(both.astype(jnp.float32), 2, -1)
    return (value * (gate * _normal_cdf(gate))).astype(both.dtype), both


def _gated_bwd(both, g):
    value, gate = jnp.split(both.astype(jnp.float32), 2, -1)
    g, share = g.astype(jnp.float32), _normal_cdf(gate)
    slope = share + gate * (jnp.exp(-0.5 * jnp.square(gate)) * (2 * math.pi) ** -0.5)
    return (jnp.concatenate([g * (gate * share), g * value * slope], -1).astype(both.dtype),)


def _normal_cdf(x):
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


gated.defvjp(_gated_fwd, _gated_bwd)


class GEGLU(nn.Module):
    """Gated linear unit with exact GELU: `proj` to twice the width, value times gelu(gate)."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return gated(nn.Dense(2 * self.width, dtype=self.dtype, name="proj")(x))


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
