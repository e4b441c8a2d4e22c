"""Maximal ancestral graphs against separation in the graph that has the hidden vertices."""

import functools

import jax
import jax.numpy as jnp
import mixed_graphs
import numpy as np
import pytest

from dmsec_jax.causal import graphs, projection, separation
from dmsec_jax.core.marks import ARROW, TAIL

SEEN, HIDDEN, COUNT = 6, 3, 240
PROJECT = jax.jit(jax.vmap(functools.partial(projection.of_hidden, num_observed=SEEN)))


@jax.jit
@jax.vmap
def by_separation(directed):
    """[i, j]: not separated by the visible ancestors of the two, in the whole graph."""
    above = graphs.ancestors(directed)
    visible = np.arange(SEEN + HIDDEN) < SEEN

    def judged(i, j):
        ends = (np.arange(SEEN + HIDDEN) == i) | (np.arange(SEEN + HIDDEN) == j)
        given = (above[:, i] | above[:, j]) & visible & ~ends
        return ~separation.separated(directed, directed & False, given)[i, j]

    first, second = np.triu_indices(SEEN, 1)
    found = jax.vmap(judged)(first, second)
    upper = jnp.zeros((SEEN, SEEN), bool).at[first, second].set(found)
    return upper | upper.T


@pytest.mark.slow  # compiles for long
def test_adjacent_is_what_visible_ancestors_cannot_separate():
    directed = mixed_graphs.random_dags(3, COUNT, SEEN + HIDDEN, 0.3)
    marks = np.asarray(PROJECT(directed))
    want = np.asarray(by_separation(directed))
    assert ((marks != 0) == want).all()
    above = np.asarray(jax.jit(jax.vmap(graphs.ancestors))(directed))[:, :SEEN, :SEEN]
    assert (marks[want & above.transpose(0, 2, 1)] == TAIL).all()  # a tail where the vertex causes the other
    assert (marks[want & ~above.transpose(0, 2, 1)] == ARROW).all()
    added = want & ~np.asarray(jax.vmap(lambda d: sum(graphs.latent_projection(d, SEEN)) > 0)(directed))
    assert (added | added.transpose(0, 2, 1)).sum() > 0  # inducing paths that are no edge occur


def test_no_set_at_all_separates_adjacent_pairs():
    directed, bidirected = mixed_graphs.random_admgs(4, 30, 5, 0.35, 0.3)
    marks = np.asarray(jax.jit(jax.vmap(projection.maximal_ancestral))(directed, bidirected))
    sets = mixed_graphs.subsets(5)
    separable = jax.jit(jax.vmap(lambda d, b: jax.vmap(lambda z: separation.separated(d, b, z))(sets).any(axis=0)))
    assert ((marks == 0) == np.asarray(separable(directed, bidirected)) | np.eye(5, dtype=bool)).all()


def test_projections_are_maximal_ancestral_and_stay():
    marks = PROJECT(mixed_graphs.random_dags(5, COUNT, SEEN + HIDDEN, 0.3))

    def judged(mag):
        directed, bidirected = graphs.to_edges(mag)
        again = projection.maximal_ancestral(directed, bidirected)
        good = graphs.is_ancestral(directed, bidirected) & projection.is_maximal(directed, bidirected)
        return good & (again == mag).all()

    assert np.asarray(jax.jit(jax.vmap(judged))(marks)).all()


def test_the_smallest_graph_that_is_ancestral_and_not_maximal():
    # 0 <-> 1 <-> 2 <-> 3 with 1 -> 3 and 2 -> 0 (Richardson and Spirtes 2002, Fig. 7)
    directed, bidirected = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    directed[1, 3] = directed[2, 0] = True
    for i, j in ((0, 1), (1, 2), (2, 3)):
        bidirected[i, j] = bidirected[j, i] = True
    assert jax.jit(graphs.is_ancestral)(directed, bidirected)
    assert not jax.jit(projection.is_maximal)(directed, bidirected)
    mag = np.asarray(jax.jit(projection.maximal_ancestral)(directed, bidirected))
    assert mag[0, 3] == mag[3, 0] == ARROW
