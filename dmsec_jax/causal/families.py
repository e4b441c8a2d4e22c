"""Families of random skeletons, as the probability of an edge on each pair given a position of every vertex.

Edges are independent given the positions, so one Bernoulli site covers all families and a graph can be conditioned on; in expectation each has
`edges_per_vertex` x V edges.

    er            every pair alike (Erdos and Renyi)
    scale-free    proportional to the product of fitnesses rank^(-1/2): degrees with tail exponent 3 (Goh, Kahng, Kim, PRL 2001)
    sbm           four groups; a pair across groups is ten times less likely (stochastic block model)
    small-world   neighbours on a ring, a fifth of the edges rewired (after Watts and Strogatz 1998)
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmsec_jax.core.types import AnyArray

Family = Literal["er", "scale-free", "sbm", "small-world"]
GROUPS, ACROSS, REWIRED = 4, 0.1, 0.2


def pair_probabilities(family: Family, position: Float[AnyArray, "V"], edges_per_vertex: float) -> Float[Array, "P"]:
    """Probability of an edge on each pair, row by row above the diagonal.

    Args:
        position: uniform in [0, 1]: a place on the ring, in the groups, in the order of fitness.
    """
    size = position.shape[0]
    first, second = np.triu_indices(size, 1)
    expected = edges_per_vertex * size
    if family == "er":
        return jnp.full(len(first), jnp.minimum(expected / len(first), 1.0))
    rank = jnp.argsort(jnp.argsort(position))
    if family == "scale-free":
        fitness = (rank + 1.0) ** -0.5
        return _scaled(fitness[first] * fitness[second], expected)
    if family == "sbm":
        group = jnp.floor(position * GROUPS)
        return _scaled(jnp.where(group[first] == group[second], 1.0, ACROSS), expected)
    apart = jnp.abs(rank[first] - rank[second])
    apart = jnp.minimum(apart, size - apart)
    ring = jnp.clip(edges_per_vertex - apart + 1, 0.0, 1.0)
    return jnp.minimum((1 - REWIRED) * ring + REWIRED * expected / len(first), 1.0)


def _scaled(weight: Float[Array, "P"], expected: float) -> Float[Array, "P"]:
    """Probabilities proportional to `weight` that sum to `expected`, but for those that are cut at 1."""
    for _ in range(4):
        weight = jnp.minimum(weight * expected / weight.sum(), 1.0)
    return weight
