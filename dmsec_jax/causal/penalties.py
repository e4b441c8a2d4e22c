"""Smooth penalties that are zero exactly on a class of graphs, and which edges keep a graph out of it.

`directed` [V, V] and `bidirected` [V, V] (symmetric, zero diagonal) are coefficients; all that counts are their squares A and C.

    acyclic      squarings   tr (I + A / V)^m - V, m >= V a power of two     Zheng et al., NeurIPS 2018; Yu et al., ICML 2019
                 log_det     -log det(s I - A) + V log s                     Bello, Aragam, Ravikumar, NeurIPS 2022 (DAGMA)
    ancestral    sum_ij [(I + A / m)^m - I]_ij C_ij                          Bhattacharya et al., AISTATS 2021, Table 1
    bow-free     sum_ij A_ij C_ij                                            the same
    arid         the weight of arborescences of two vertices or more         after the same; below

Each class means: and acyclic, whose penalty comes beside. Powers are kept as E = (I + .)^m - I, with E -> 2 E + E E, so that nothing cancels.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmsec_jax.causal import graphs
from dmsec_jax.causal.graphs import Edges
from dmsec_jax.core.types import AnyArray

Coefficients = Float[AnyArray, "V V"]


def squarings(directed: Coefficients) -> Float[Array, ""]:
    """Acyclicity by ceil(log2 V) squarings; zero exactly without cycles, and finite everywhere."""
    size = directed.shape[0]
    return _closed_walks(jnp.square(directed) / size, _doublings(size))


def log_det(directed: Coefficients, s: float = 1.0) -> Float[Array, ""]:
    """Acyclicity by one factorisation; infinite where the spectral radius of A is s or more, where it means nothing."""
    size = directed.shape[0]
    matrix = s * jnp.eye(size) - jnp.square(directed)
    sign, log = jnp.linalg.slogdet(matrix)
    inside = (sign > 0) & (jnp.linalg.inv(jax.lax.stop_gradient(matrix)) >= -1e-5).all()  # an M-matrix
    return jnp.where(inside, size * jnp.log(s) - log, jnp.inf)


def ancestral(directed: Coefficients, bidirected: Coefficients) -> Float[Array, ""]:
    """Zero if and only if no i <-> j joins a vertex to its ancestor."""
    size = directed.shape[0]
    doublings = max(6, _doublings(size))
    paths = _power(jnp.square(directed) / 2**doublings, doublings)
    return (paths * jnp.square(bidirected)).sum()


def acyclic_ancestral(directed: Coefficients, bidirected: Coefficients) -> Float[Array, ""]:
    """Zero if and only if the graph is acyclic and `ancestral` is: both from the same powers of one matrix."""
    doublings = max(6, _doublings(directed.shape[0]))
    paths = _power(jnp.square(directed) / 2**doublings, doublings)
    return jnp.trace(paths) + (paths * jnp.square(bidirected)).sum()


def bow_free(directed: Coefficients, bidirected: Coefficients) -> Float[Array, ""]:
    """Zero if and only if no pair has both edges."""
    return (jnp.square(directed) * jnp.square(bidirected)).sum()


def arid(directed: Coefficients, bidirected: Coefficients) -> Float[Array, ""]:
    """Zero if and only if the reachable closure of each vertex is itself.

    For each v it follows `graphs.reachable_closures` with weights in place of sets: how much of each vertex is in v's district, then among its
    ancestors there, V rounds. Cost O(V^5): for graphs of tens of variables.
    """
    size = directed.shape[0]
    one = jnp.eye(size)
    spread = lambda weights: jnp.tanh(math.log(5000) * weights)  # towards 0 and 1 without leaving 0

    def flow(edges, inside):  # [v, u]: how much of u can be reached from v without leaving `inside`
        gate = inside / (
            inside + 1e-6
        )  # nearly 0 or 1: weights as such would shrink doubly exponentially from round to round
        grow = lambda _, reached: jnp.maximum(one, spread(reached @ edges) * gate)
        return jax.lax.fori_loop(0, size, grow, one)

    def narrowed(_, inside):
        district = flow(jnp.square(bidirected), inside)
        return flow(jnp.square(directed).T, district)

    inside = jax.lax.fori_loop(0, size, narrowed, jnp.ones((size, size)))
    return (inside * (1 - one)).sum()


def cyclic_too(directed: Coefficients) -> Float[Array, ""]:
    """Zero: for classes whose penalty includes that of cycles."""
    return jnp.float32(0)


def unrestricted(directed: Coefficients, bidirected: Coefficients) -> Float[Array, ""]:
    """Zero: every acyclic graph, also those without i <-> j."""
    return jnp.float32(0)


def on_cycles(directed: Edges, bidirected: Edges) -> Bool[Array, "V V"]:
    """i -> j where j is an ancestor of i."""
    return (directed != 0) & graphs.ancestors(directed).T


def not_ancestral(directed: Edges, bidirected: Edges) -> Bool[Array, "V V"]:
    """i <-> j between a vertex and its ancestor."""
    above = graphs.ancestors(directed)
    return (bidirected != 0) & (above | above.T)


def not_bow_free(directed: Edges, bidirected: Edges) -> Bool[Array, "V V"]:
    """i <-> j beside i -> j or i <- j."""
    return (bidirected != 0) & ((directed != 0) | (directed.T != 0))


@jax.jit
def not_arid(directed: Edges, bidirected: Edges) -> Bool[Array, "V V"]:
    """i <-> j inside an arborescence of two vertices or more."""
    closures = graphs.reachable_closures(directed, bidirected)
    large = closures & (closures.sum(axis=1, keepdims=True) > 1)
    return (bidirected != 0) & graphs.product(large.T, large)


def _doublings(size: int) -> int:
    return max(1, math.ceil(math.log2(max(size, 2))))


def _power(matrix: Float[Array, "V V"], doublings: int) -> Float[Array, "V V"]:
    """(I + matrix)^(2^doublings) - I."""
    for _ in range(doublings):
        matrix = 2 * matrix + matrix @ matrix
    return matrix


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _closed_walks(matrix: Float[Array, "V V"], doublings: int) -> Float[Array, ""]:
    """tr (I + matrix)^m - V with m = 2^doublings; its slope m ((I + matrix)^(m - 1))^T costs half of what going back through `_power` does."""
    return jnp.trace(_power(matrix, doublings))


@_closed_walks.defjvp
def _closed_walks_jvp(doublings, primals, tangents):
    (power,), (tangent,) = primals, tangents
    odd = jnp.zeros_like(power)
    for k in range(doublings):  # (I + matrix)^(2^k) - I, and (I + matrix)^(2^k - 1) - I
        odd = power + odd + power @ odd if k else power
        power = 2 * power + power @ power
    return jnp.trace(power), 2**doublings * (tangent * odd.T).sum() + 2**doublings * jnp.trace(tangent)
