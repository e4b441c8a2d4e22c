"""Projected gradient steps, each example on its own: batching never changes a result.

Norms are over all axes but the first; `step` and `radius` are numbers or [B].
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmsec_jax.core.arrays import expand
from dmsec_jax.core.checks import fail

Norm = Literal["l2", "linf"]
Size = float | Float[Array, ""] | Float[Array, "B"]


def norm(x: Float[Array, "B ..."]) -> Float[Array, "B"]:
    """Euclidean norm of each example."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def direction(gradient: Float[Array, "B ..."], kind: Norm) -> Float[Array, "B ..."]:
    """Steepest ascent of unit size in the norm: gradient / |gradient|_2, or its sign; zero where the gradient is zero.

    Raises:
        ValueError: on another kind of norm.
    """
    if kind == "l2":
        size = expand(norm(gradient), gradient)
        return gradient / jnp.where(size > 0, size, 1.0)
    if kind == "linf":
        return jnp.sign(gradient)
    raise fail("norm", "l2 or linf", repr(kind), "choose one of them")


def project(delta: Float[Array, "B ..."], radius: Size, kind: Norm) -> Float[Array, "B ..."]:
    """The nearest point of the ball of that radius around zero.

    Raises:
        ValueError: on another kind of norm.
    """
    radius = expand(jnp.asarray(radius, delta.dtype), delta)
    if kind == "l2":
        size = expand(norm(delta), delta)
        return delta * jnp.minimum(1.0, radius / jnp.maximum(size, jnp.finfo(delta.dtype).tiny))
    if kind == "linf":
        return jnp.clip(delta, -radius, radius)
    raise fail("norm", "l2 or linf", repr(kind), "choose one of them")
