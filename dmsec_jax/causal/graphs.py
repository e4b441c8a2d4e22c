"""Acyclic directed mixed graphs as matrices: edges and marks, ancestors, the classes of graphs, and what hiding variables does.

    directed[i, j]      true where i -> j
    bidirected[i, j]    true where i <-> j, symmetric: a hidden common cause
    marks[i, j]         `core.marks`: the mark at j on the edge between i and j

Any number but zero counts as an edge, so coefficients may be passed as they are. The functions on edges are pure `jax.numpy` of fixed shape, to
be used under `jit` and `vmap`. Products of Boolean matrices are float32 products > 0: sums of non-negative numbers, hence exact in this respect.

The classes, from the smallest: ancestral (no i <-> j where i is an ancestor of j), arid (no vertex has a converging arborescence other than
itself; every linear Gaussian model is identified), bow-free (no pair has both i -> j and i <-> j). Bhattacharya et al., AISTATS 2021, Sec. 3;
Shpitser, Evans, Richardson, UAI 2018.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int8, Shaped

from dmsec_jax.core.checks import require
from dmsec_jax.core.marks import ARROW, NONE, TAIL
from dmsec_jax.core.types import AnyArray

Edges = Shaped[AnyArray, "V V"]


def product(a: Shaped[AnyArray, "*B I V"], b: Shaped[AnyArray, "*B V J"]) -> Bool[Array, "*B I J"]:
    """Product of Boolean matrices: is there a v with a[i, v] and b[v, j]?"""
    return (a != 0).astype(jnp.float32) @ (b != 0).astype(jnp.float32) > 0


def ancestors(directed: Edges) -> Bool[Array, "V V"]:
    """[i, j]: i is j, or there is a directed path from i to j. Cycles are allowed."""
    reach = (jnp.asarray(directed) != 0) | jnp.eye(directed.shape[0], dtype=bool)

    def doubled(state):
        reach, _ = state
        further = product(reach, reach)
        return further, (further != reach).any()

    # paths are far shorter than the number of vertices, so that a few doublings find all
    return jax.lax.while_loop(lambda state: state[1], doubled, (reach, jnp.bool_(True)))[0]


def is_acyclic(directed: Edges) -> Bool[Array, ""]:
    """Whether no vertex can return to itself."""
    return ~((jnp.asarray(directed) != 0) & ancestors(directed).T).any()


def is_ancestral(directed: Edges, bidirected: Edges) -> Bool[Array, ""]:
    """Whether the graph is acyclic and no i <-> j joins a vertex to its ancestor."""
    above = ancestors(directed)
    return is_acyclic(directed) & ~((jnp.asarray(bidirected) != 0) & (above | above.T)).any()


def is_bow_free(directed: Edges, bidirected: Edges) -> Bool[Array, ""]:
    """Whether the graph is acyclic and no pair has both i -> j and i <-> j."""
    return is_acyclic(directed) & ~((jnp.asarray(directed) != 0) & (jnp.asarray(bidirected) != 0)).any()


def is_arid(directed: Edges, bidirected: Edges) -> Bool[Array, ""]:
    """Whether the graph is acyclic and the reachable closure of every vertex is itself."""
    closures = reachable_closures(directed, bidirected)
    return is_acyclic(directed) & (closures == jnp.eye(closures.shape[0], dtype=bool)).all()


def reachable_closures(directed: Edges, bidirected: Edges) -> Bool[Array, "V V"]:
    """Row v: the least set that contains v, one district and only ancestors of v, both within itself (the root of an arborescence).

    Starting from all vertices, what is outside v's district and then what is not an ancestor of v is dropped, until nothing is.
    """
    directed, bidirected = jnp.asarray(directed) != 0, jnp.asarray(bidirected) != 0
    one = jnp.eye(directed.shape[0], dtype=bool)

    def narrowed(inside):
        district = reached(one, bidirected, inside)
        return reached(one, directed.T, district)

    def changed(pair):
        return (pair[0] != pair[1]).any()

    everything = jnp.ones_like(one)
    return jax.lax.while_loop(changed, lambda pair: (narrowed(pair[0]), pair[0]), (narrowed(everything), everything))[0]


def reached(start: Bool[Array, "S V"], steps: Bool[Array, "V V"], inside: Bool[Array, "S V"]) -> Bool[Array, "S V"]:
    """Row s: what can be reached from `start[s]` by `steps` without leaving `inside[s]`."""

    def grown(found):
        return found | (product(found, steps) & inside)

    def changed(pair):
        return (pair[0] != pair[1]).any()

    return jax.lax.while_loop(changed, lambda pair: (grown(pair[0]), pair[0]), (grown(start), start))[0]


def latent_projection(directed: Edges, num_observed: int) -> tuple[Bool[Array, "O O"], Bool[Array, "O O"]]:
    """The mixed graph over the first `num_observed` vertices of an acyclic graph, the others hidden (Verma, 1993).

        i -> j     a directed path from i to j, all of it between hidden
        i <-> j    a hidden vertex with such paths to both

    Returns:
        (directed, bidirected); a pair may have both. To hide others, order first: `directed[np.ix_(order, order)]`.
    """
    directed = jnp.asarray(directed) != 0
    seen, hidden = slice(None, num_observed), slice(num_observed, None)
    if num_observed == directed.shape[0]:
        return directed, jnp.zeros_like(directed)
    down = product(
        ancestors(directed[hidden, hidden]), directed[hidden, seen]
    )  # [H, O]: hidden paths that surface at O
    shown = directed[seen, seen] | product(directed[seen, hidden], down)
    shared = product(down.T, down) & ~jnp.eye(num_observed, dtype=bool)
    return shown, shared


def to_marks(directed: Edges, bidirected: Edges) -> Int8[Array, "V V"]:
    """Marks of a graph with at most one edge on a pair; where there are both, only i -> j is kept."""
    directed, bidirected = jnp.asarray(directed) != 0, jnp.asarray(bidirected) != 0
    head = directed | (bidirected & ~directed.T)
    return jnp.where(head, ARROW, jnp.where(directed.T, TAIL, NONE)).astype(jnp.int8)


def to_edges(marks: Int8[AnyArray, "V V"]) -> tuple[Bool[AnyArray, "V V"], Bool[AnyArray, "V V"]]:
    """(directed, bidirected) of marks without circles."""
    head = marks == ARROW
    return head & (marks.T == TAIL), head & head.T


def skeleton(marks: Int8[AnyArray, "V V"]) -> Bool[AnyArray, "V V"]:
    """Which pairs are adjacent."""
    return marks != NONE


def check_marks(name: str, marks: Int8[AnyArray, "V V"], *, circles: bool) -> np.ndarray:
    """The marks as NumPy's, with what the type does not say: two marks or none on a pair, none on the diagonal, circles only where allowed.

    Raises:
        ValueError: otherwise, and on tail against tail, which only selection bias makes.
    """
    marks = np.asarray(marks)
    known = bool(np.isin(marks, (0, 1, 2, 3) if circles else (0, 2, 3)).all())
    require(
        known, name, "made of 0, 1, 2, 3" if circles else "made of 0, 2, 3", np.unique(marks).tolist(), "see core.marks"
    )
    paired = bool(((marks == NONE) == (marks.T == NONE)).all() and not marks.diagonal().any())
    require(paired, name, "two marks or none on each pair", "a lone mark", "write marks[i, j] and marks[j, i]")
    undirected = bool(((marks == TAIL) & (marks.T == TAIL)).any())
    require(not undirected, name, "free of edges i - j", "tail against tail", "selection bias is not covered")
    return marks
