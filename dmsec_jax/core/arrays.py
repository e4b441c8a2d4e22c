"""Shapes of arrays."""

import jax.numpy as jnp
from jaxtyping import Array


def expand(per_example: Array, like: Array) -> Array:
    """[B] (or a scalar) with trailing axes of size 1, ready to multiply `like` [B, ...]."""
    per_example = jnp.asarray(per_example)
    return per_example.reshape(per_example.shape + (1,) * (like.ndim - 1)) if per_example.ndim else per_example
