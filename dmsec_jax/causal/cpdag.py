"""From an acyclic graph without hidden causes to what all such graphs with the same independences share (the completed partially directed graph).

Meek, "Causal inference and causal explanation with background knowledge", UAI 1995: unshielded colliders, edges whose direction is known, and rules
1-4 until none applies, which is complete. On the host, in NumPy; products of Boolean matrices.
"""

import numpy as np
from jaxtyping import Bool, Int8

from dmsec_jax.causal import graphs
from dmsec_jax.core.checks import require
from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL

Matrix = Bool[np.ndarray, "V V"]


def of_dag(dag: Int8[np.ndarray, "V V"], known: Matrix | None = None) -> Int8[np.ndarray, "V V"]:
    """Marks that all acyclic graphs with the independences of `dag` share: i -> j, or i o-o j where the direction differs among them.

    Args:
        known: edges of `dag` that are certain beforehand, so that only graphs that have them count; others are ignored.

    Raises:
        ValueError: on marks that are no acyclic graph with directed edges alone.
    """
    dag = graphs.check_marks("dag", dag, circles=False)
    edges, bidirected = graphs.to_edges(dag)
    proper = not bidirected.any() and bool(graphs.is_acyclic(edges))
    require(
        proper, "dag", "acyclic, with directed edges alone", "a cycle or i <-> j", "see causal.pag for hidden causes"
    )
    linked = edges | edges.T
    apart = ~linked & ~np.eye(len(dag), dtype=bool)
    cause = edges & (apart @ edges)  # a -> b <- c, a and c apart
    if known is not None:
        cause |= edges & known
    before = None
    while before is None or (before != cause).any():
        before = cause.copy()
        cause |= _followed(cause, linked & ~(cause | cause.T), apart)
    marks = np.where(linked, CIRCLE, NONE).astype(np.int8)
    marks[cause], marks[cause.T] = ARROW, TAIL
    return marks


def _followed(cause: Matrix, free: Matrix, apart: Matrix) -> Matrix:
    """The directions that follow from those of `cause` for the edges of `free`, by one application of each rule.

    1   c -> a - b, c and b apart                             =>  a -> b
    2   a -> c -> b, a - b                                    =>  a -> b
    3   a - c -> b, a - d -> b, a - b, c and d apart          =>  a -> b
    4   a - c -> d -> b, a - b, c and b apart                 =>  a -> b  (a and d are always linked there: else rule 1 had made b -> a)
    """
    found = free & ((cause.T @ apart) | (cause @ cause))
    for a, b in np.argwhere(free & ~found).tolist():
        sides = free[a] & cause[:, b]
        ways = cause[free[a] & apart[:, b]].any(axis=0)  # d of a - c -> d
        found[a, b] = apart[np.ix_(sides, sides)].any() or (ways & cause[:, b]).any()
    return found
