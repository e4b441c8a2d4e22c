"""Random and exhaustive families of graphs, and slow definitions of what dmsec_jax.causal computes in closed form."""

import itertools

import jax
import numpy as np

from dmsec_jax.causal import graphs, separation
from dmsec_jax.core.marks import CIRCLE


def random_dags(seed, count, size, density):
    """[count, size, size] Boolean acyclic graphs, vertices in random order."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((count, size, size)) < density, 1)
    orders = rng.random((count, size)).argsort(axis=1)
    return np.stack([one[np.ix_(order, order)] for one, order in zip(upper, orders, strict=True)])


def random_admgs(seed, count, size, density, bidirected_density):
    """(directed, bidirected), each [count, size, size]; a pair may have both edges."""
    rng = np.random.default_rng(seed + 1)
    upper = np.triu(rng.random((count, size, size)) < bidirected_density, 1)
    return random_dags(seed, count, size, density), upper | upper.transpose(0, 2, 1)


def all_simple_graphs(size):
    """(directed, bidirected) of all graphs with none, ->, <- or <-> on each pair; cycles included."""
    pairs = list(itertools.combinations(range(size), 2))
    kinds = np.array(list(itertools.product(range(4), repeat=len(pairs))))
    directed = np.zeros((len(kinds), size, size), bool)
    bidirected = directed.copy()
    for (i, j), kind in zip(pairs, kinds.T, strict=True):
        directed[:, i, j], directed[:, j, i] = kind == 1, kind == 2
        bidirected[:, i, j] = bidirected[:, j, i] = kind == 3
    return directed, bidirected


def subsets(size):
    """[2^size, size] Boolean."""
    return np.array(list(itertools.product([False, True], repeat=size)))


def descendants(directed, start):
    """By depth-first search; `start` included."""
    found, edge = {start}, [start]
    while edge:
        new = set(np.flatnonzero(directed[edge.pop()])) - found
        found |= new
        edge += new
    return found


def connected(directed, bidirected, i, j, given):
    """m-connection by the definition: any simple path whose colliders have a descendant in `given` and whose others are not in it."""

    def ways(a, b):  # (arrow at a, arrow at b) of each edge
        here = [((False, True), directed[a, b]), ((True, False), directed[b, a]), ((True, True), bidirected[a, b])]
        return [marks for marks, exists in here if exists]

    opens = [bool(descendants(directed, v) & given) for v in range(len(directed))]

    def search(path, entered):
        v = path[-1]
        if v == j:
            return True
        for w in set(range(len(directed))) - set(path):
            for leaving, entering in ways(v, w):
                passable = len(path) == 1 or (opens[v] if entered and leaving else v not in given)
                if passable and search([*path, w], entering):
                    return True
        return False

    return search([i], False)


def equivalence_classes(directed, bidirected):
    """Graphs [N, V, V] grouped by their independences: a list of [members, V, V] marks."""
    sets = subsets(directed.shape[-1])
    independences = jax.jit(jax.vmap(lambda d, b: jax.vmap(lambda z: separation.separated(d, b, z))(sets)))
    marks = np.asarray(jax.vmap(graphs.to_marks)(directed, bidirected))
    groups = {}
    for one, mark in zip(np.asarray(independences(directed, bidirected)), marks, strict=True):
        groups.setdefault(one.tobytes(), []).append(mark)
    return [np.stack(group) for group in groups.values()]


def common(group):
    """What all members [N, V, V] have, a circle where they differ."""
    return np.where((group == group[0]).all(axis=0), group[0], CIRCLE)
