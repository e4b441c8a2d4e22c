"""Guidance as arithmetic on callables (z_t, t) -> prediction, and hooks on the predicted clean latent.

Weights may be Python numbers or traced arrays, scalar or [B], so that a sweep over guidance scales is a batch axis.
Mixes work on raw predictions. For weights that sum to one, mixing v-predictions and mixing the noise they stand for is
the same; for others it is not: convert with `schedule.to_eps` first.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmsec_jax.core.arrays import expand
from dmsec_jax.core.checks import require
from dmsec_jax.core.types import ModelFn

Weight = float | Float[Array, "..."]


def mix(fns: Sequence[ModelFn], weights: Sequence[Weight]) -> ModelFn:
    """(z_t, t) -> sum_i weights[i] fns[i](z_t, t).

    Raises:
        ValueError: unless there is one weight for each callable.
    """
    return mix_outputs(lambda z_t, t: tuple(fn(z_t, t) for fn in fns), weights, len(fns))


def mix_outputs(many_fn: Callable[[Array, Array], Sequence[Array]], weights: Sequence[Weight], count: int) -> ModelFn:
    """`mix` for one callable that returns `count` predictions at once, for example of two models that share their work.

    Raises:
        ValueError: unless there are `count` weights.
    """
    require(
        len(weights) == count, "weights", f"{count} numbers, one for each prediction", len(weights), "give one each"
    )

    def mixed(z_t, t):
        outputs = many_fn(z_t, t)
        return sum(expand(jnp.asarray(w, z_t.dtype), z_t) * out for w, out in zip(weights, outputs, strict=True))

    return mixed


def classifier_free(cond_fn: ModelFn, uncond_fn: ModelFn, weight: Weight) -> ModelFn:
    """uncond + weight (cond - uncond)   (Ho & Salimans 2022, Eq. 6 with weight = 1 + w).

    A weight of 1 is the conditional model itself.
    """
    return mix((cond_fn, uncond_fn), (weight, 1.0 - weight))


def classifier_free_rescaled(cond_fn: ModelFn, uncond_fn: ModelFn, weight: Weight, phi: Weight = 0.7) -> ModelFn:
    """`classifier_free`, brought back to the conditional prediction's standard deviation by the share phi in [0, 1].

    Against the overexposure of large weights   (Lin et al. 2024, Eqs. 14-16).
    """

    def guided(z_t, t):
        cond, uncond = cond_fn(z_t, t), uncond_fn(z_t, t)
        mixed = uncond + expand(jnp.asarray(weight, z_t.dtype), z_t) * (cond - uncond)
        rescaled = mixed * _std(cond) / _std(mixed)
        return mixed + expand(jnp.asarray(phi, z_t.dtype), z_t) * (rescaled - mixed)

    return guided


def percentile_threshold(
    x0: Float[Array, "B ..."], percentile: float = 0.995, limit: float = jnp.inf
) -> Float[Array, "B ..."]:
    """Dynamic thresholding   (Saharia et al. 2022, Imagen, Sec. 2.3), per example: clip to [-s, s] and divide by s.

    s is the `percentile` (in [0, 1]) of |x0|, at least 1 and at most `limit`.
    """
    flat = jnp.abs(x0).reshape(x0.shape[0], -1)
    bound = expand(jnp.clip(jnp.quantile(flat, percentile, axis=1), 1.0, limit), x0)
    return jnp.clip(x0, -bound, bound) / bound


def std_threshold(x0: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """x0 / max(1, std(x0)), per example, with the unbiased standard deviation (n - 1)."""
    return x0 / jnp.maximum(1.0, _std(x0))


def _std(x: Array) -> Array:
    return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True, ddof=1)
