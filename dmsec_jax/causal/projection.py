"""From an acyclic directed mixed graph to the maximal ancestral graph of the same independences and ancestors.

Two vertices are adjacent in the maximal ancestral graph if and only if an inducing path joins them: every vertex inside is a collider and an
ancestor of one of the two ends (Richardson and Spirtes, Annals of Statistics 2002, Theorem 4.2). So the path starts and ends with an edge into
the inside, and inside are only i <-> j: for a pair of ends it is a search in the bidirected graph on the ends' ancestors.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int8

from dmsec_jax.causal import graphs
from dmsec_jax.causal.graphs import Edges


def maximal_ancestral(directed: Edges, bidirected: Edges) -> Int8[Array, "V V"]:
    """Marks of the maximal ancestral graph of an acyclic directed mixed graph.

    Cost O(V^4 x longest search); one [V, V] matrix at a time.
    """
    directed, bidirected = jnp.asarray(directed) != 0, jnp.asarray(bidirected) != 0
    above = graphs.ancestors(directed)
    adjacent = inducing_pairs(directed, bidirected)
    causes = adjacent & above
    return graphs.to_marks(causes, adjacent & ~above & ~above.T)


def inducing_pairs(directed: Edges, bidirected: Edges) -> Bool[Array, "V V"]:
    """Which pairs an inducing path joins; an edge is one."""
    directed, bidirected = jnp.asarray(directed) != 0, jnp.asarray(bidirected) != 0
    size = directed.shape[0]
    above = graphs.ancestors(directed)
    into = directed | bidirected  # [i, v]: an edge from i with an arrow at v

    def joined(i):  # [V]: with which j
        inside = above[:, i] | above.T  # [j, v]: v is an ancestor of i or of j
        inner = graphs.reached(into & inside, bidirected, inside)
        return (inner & into[i]).any(axis=1)

    direct = into | into.T
    found = jax.lax.map(joined, jnp.arange(size)) | direct
    return found & ~jnp.eye(size, dtype=bool)


def is_maximal(directed: Edges, bidirected: Edges) -> Bool[Array, ""]:
    """Whether every pair that no edge joins can be separated: no inducing path without an edge."""
    directed, bidirected = jnp.asarray(directed) != 0, jnp.asarray(bidirected) != 0
    return (inducing_pairs(directed, bidirected) == (directed | directed.T | bidirected)).all()


def of_hidden(directed: Edges, num_observed: int) -> Int8[Array, "O O"]:
    """Marks of the maximal ancestral graph over the first `num_observed` vertices of an acyclic graph, the others hidden."""
    return maximal_ancestral(*graphs.latent_projection(directed, num_observed))
