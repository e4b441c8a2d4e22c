"""Networks from features of pairs of variables [V, V, F] to one logit per pair, the same whatever the variables are called.

    EdgeMLP           sees one pair at a time: a multilayer perceptron with shared weights
    EdgeTransformer   pairs (i, k) and (k, j) inform (i, j): triangular mixing (Jumper et al. 2021), gated, residual, with a symmetric head

The logits of `init` are near `BIAS`, that of a sparse graph.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmsec_jax.core.types import AnyArray, Key, Params

BIAS = -2.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeMLP:
    """About 6 000 weights at the default width; linear in the number of pairs."""

    width: int = 64
    depth: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeTransformer:
    """O(V^3 width) per layer; for accelerators, or small graphs."""

    width: int = 32
    depth: int = 3


SkeletonConfig = EdgeMLP | EdgeTransformer


def init(key: Key, cfg: SkeletonConfig, num_features: int) -> Params:
    """Parameters, float32."""
    return _module(cfg).init(key, jnp.zeros((3, 3, num_features)))["params"]


def apply(cfg: SkeletonConfig, params: Params, features: Float[AnyArray, "V V F"]) -> Float[Array, "V V"]:
    """Symmetric logits; those of the diagonal mean nothing."""
    logits = _module(cfg).apply({"params": params}, features)
    return (logits + logits.T) / 2


def _module(cfg):
    return _Perceptron(cfg) if isinstance(cfg, EdgeMLP) else _Triangles(cfg)


def _head(x):
    return nn.Dense(1, bias_init=nn.initializers.constant(BIAS), kernel_init=nn.initializers.normal(0.01), name="head")(
        x
    )[..., 0]


class _Perceptron(nn.Module):
    cfg: EdgeMLP

    @nn.compact
    def __call__(self, x):
        for i in range(self.cfg.depth):
            x = nn.gelu(nn.Dense(self.cfg.width, name=f"dense_{i}")(x))
        return _head(x)


class _Triangles(nn.Module):
    cfg: EdgeTransformer

    @nn.compact
    def __call__(self, x):
        width = self.cfg.width
        off = ~jnp.eye(x.shape[0], dtype=bool)[:, :, None]
        x = nn.Dense(width, name="embed")(x)
        for i in range(self.cfg.depth):
            y = nn.LayerNorm(name=f"norm_{i}")(x)
            left, right, gate = jnp.split(nn.Dense(3 * width, name=f"mix_{i}")(y), 3, axis=-1)
            left, right = (jnp.where(off, jax.nn.sigmoid(gate) * side, 0.0) for side in (left, right))
            mixed = jnp.einsum("ikh,jkh->ijh", left, right) / x.shape[0] ** 0.5
            x = x + nn.Dense(width, name=f"out_{i}")(nn.LayerNorm(name=f"norm_mixed_{i}")(mixed))
            y = nn.gelu(nn.Dense(2 * width, name=f"wide_{i}")(nn.LayerNorm(name=f"norm_wide_{i}")(x)))
            x = x + nn.Dense(width, name=f"narrow_{i}")(y)
        return _head(nn.LayerNorm(name="norm")(x))
