"""Maximum cliques by branch and bound on bit sets, with a budget counted in search nodes and never in seconds.

The search is Tomita's (greedy colouring as the bound) in the bit-parallel form of San Segundo et al., "An exact
bit-parallel algorithm for the maximum clique problem", Computers & OR 38 (2011): a set of vertices is one Python
integer. The order of search depends on the graph alone (degree, then index), so that the result is the same on every
machine and with any number of threads.
"""

from typing import NamedTuple

import numpy as np

from dmsec_jax.core.checks import require

NODE_BUDGET = 5_000


class Clique(NamedTuple):
    members: tuple[int, ...]
    """Vertices, ascending."""
    exact: bool
    """False where the budget ended the search: `members` is then maximal, perhaps not maximum."""
    nodes: int
    """Search nodes visited."""


class Partition(NamedTuple):
    groups: tuple[tuple[int, ...], ...]
    """Disjoint and covering, each ascending, in the order in which they were found."""
    threshold: float
    exact: bool
    """False where a budget ended some search."""
    nodes: int


def maximum_clique(adjacency, *, node_budget: int = NODE_BUDGET) -> Clique:
    """A largest set of mutually adjacent vertices; among equals the first in the order of search.

    Args:
        adjacency: [N, N] bool, symmetric; the diagonal is ignored.
        node_budget: the search stops after this many nodes, or as soon as its best clique cannot be extended,
            whichever is later.

    Raises:
        ValueError: if `adjacency` is not square and symmetric.
    """
    adjacency = _checked(adjacency)
    count = len(adjacency)
    order = np.lexsort((-np.arange(count), -adjacency.sum(axis=1)))  # branching starts from the end: low index first
    members, exact, nodes = _search(_bit_rows(adjacency[np.ix_(order, order)]), node_budget)
    return Clique(members=tuple(sorted(int(order[v]) for v in members)), exact=exact, nodes=nodes)


def partition(similarity, threshold: float, *, node_budget: int = NODE_BUDGET) -> Partition:
    """Greedy partition: take a maximum clique of the graph {similarity >= threshold}, remove it, repeat to the end.

    Args:
        similarity: [N, N] float, symmetric.
        threshold: edges are the pairs at or above it.
        node_budget: shared by all searches of this partition; once it is spent, each further search ends at its
            first maximal clique.
    """
    adjacency = _checked(np.asarray(similarity) >= threshold)
    left = np.arange(len(adjacency))
    groups, exact, nodes = [], True, 0
    while left.size:
        inner = adjacency[np.ix_(left, left)]
        if not inner.any():  # no edges: singletons, by index
            groups += [(int(v),) for v in left]
            break
        clique = maximum_clique(inner, node_budget=node_budget - nodes)
        groups.append(tuple(int(left[v]) for v in clique.members))
        exact, nodes = exact and clique.exact, nodes + clique.nodes
        left = np.delete(left, clique.members)
    return Partition(groups=tuple(groups), threshold=float(threshold), exact=exact, nodes=nodes)


def _checked(adjacency) -> np.ndarray:
    """The graph as a bool matrix without loops."""
    adjacency = np.array(adjacency, bool)
    square = adjacency.ndim == 2 and adjacency.shape[0] == adjacency.shape[1]
    require(square, "adjacency", "[N, N]", f"shape {adjacency.shape}", "compare a similarity matrix with a threshold")
    require(bool((adjacency == adjacency.T).all()), "adjacency", "symmetric", "a one-sided edge", "symmetrise it first")
    np.fill_diagonal(adjacency, False)
    return adjacency


def _bit_rows(adjacency: np.ndarray) -> list[int]:
    """Row v as an integer whose bit u is set where u and v are adjacent."""
    packed = np.packbits(adjacency, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _colour(candidates: int, rows: list[int], enough: int) -> tuple[list[int], list[int]]:
    """Greedy colouring: vertices by colour, and their colours; those <= `enough` cannot improve the best."""
    vertices, colours, colour = [], [], 0
    while candidates:
        colour += 1
        independent = candidates
        while independent:
            lowest = independent & -independent
            v = lowest.bit_length() - 1
            candidates ^= lowest
            independent &= ~(rows[v] | lowest)
            if colour > enough:
                vertices.append(v)
                colours.append(colour)
    return vertices, colours


def _search(rows: list[int], budget: int) -> tuple[list[int], bool, int]:
    """Depth first, on a stack of (candidates, vertices to branch on, their colours); returns (best, exact, nodes)."""
    everything = (1 << len(rows)) - 1
    stack = [(everything, *_colour(everything, rows, 0))]
    best: list[int] = []
    current: list[int] = []
    nodes = 0
    while stack:
        candidates, vertices, colours = stack.pop()
        if not vertices or len(current) + colours[-1] <= len(best):
            if current:
                current.pop()
            continue
        v = vertices.pop()
        colours.pop()
        stack.append((candidates & ~(1 << v), vertices, colours))
        nodes += 1
        current.append(v)
        if len(current) > len(best):
            best = current.copy()
        inner = candidates & rows[v]
        branches, bounds = _colour(inner, rows, len(best) - len(current))
        if nodes >= budget and not (inner and len(current) == len(best)):  # never while the best clique can still grow
            pruned = not branches and all(
                depth + left[-1] <= len(best) for depth, (*_, left) in enumerate(stack) if left
            )
            return best, pruned, nodes
        stack.append((inner, branches, bounds))
    return best, True, nodes
