"""m-separation: which pairs does a set of vertices separate, in graphs with directed and bidirected edges.

A path connects i and j given Z if each vertex inside it is either a collider with a descendant in Z (or in Z), or no collider and not in Z
(Richardson, Scandinavian Journal of Statistics 2003). Walks serve as well as paths, so the search is a closure over 2 V states: a vertex, and
whether it was entered through an arrowhead.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from dmsec_jax.causal import graphs
from dmsec_jax.causal.graphs import Edges
from dmsec_jax.core.types import AnyArray


def separated(directed: Edges, bidirected: Edges, given: Bool[AnyArray, "V"]) -> Bool[Array, "V V"]:
    """All pairs at once; under `vmap`, all pairs given each of many sets.

    Args:
        directed, bidirected: an acyclic directed mixed graph.
        given: the conditioning set Z.

    Returns:
        [i, j]: Z separates i from j. False where i is j or one of them is in Z.
    """
    directed, bidirected = jnp.asarray(directed) != 0, jnp.asarray(bidirected) != 0
    given = jnp.asarray(given)
    size = directed.shape[0]
    opens = (graphs.ancestors(directed) & given[None]).any(axis=1)  # as a collider
    passes = ~given  # as any other
    # edges by their marks: [mark at the start, mark at the end], 0 tail, 1 arrow
    edges = {(0, 1): directed, (1, 0): directed.T, (1, 1): bidirected}

    def move(entered, leaving_allowed):  # [V, W, 2]: from (v, entered) to (w, mark at w)
        ends = [jnp.zeros_like(directed), jnp.zeros_like(directed)]
        for (leaving, mark), exists in edges.items():
            collider = entered == 1 and leaving == 1
            ends[mark] |= exists & jnp.where(collider, opens, leaving_allowed)[:, None]
        return jnp.stack(ends, axis=2)

    moves = jnp.stack([move(0, passes), move(1, passes)], axis=1).reshape(2 * size, 2 * size)
    first = jnp.stack([directed.T, directed | bidirected], axis=2).reshape(size, 2 * size)
    connected = graphs.product(first, graphs.ancestors(moves)).reshape(size, size, 2).any(axis=2)
    both_outside = passes[:, None] & passes[None] & ~jnp.eye(size, dtype=bool)
    return ~connected & both_outside
