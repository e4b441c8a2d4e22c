"""Partial ancestral graphs: the common marks of all equivalent graphs by exhaustion, and the oracle of another package."""

import functools

import jax
import mixed_graphs
import numpy as np
import pytest

from dmsec_jax.causal import graphs, pag, projection
from dmsec_jax.core.marks import ARROW, CIRCLE, TAIL

SEEN, HIDDEN, COUNT = 9, 4, 30
PROJECT = jax.jit(jax.vmap(functools.partial(projection.of_hidden, num_observed=SEEN)))


@functools.cache
def classes(size):
    """All maximal ancestral graphs of that many vertices, grouped by their independences: a list of [members, V, V] marks."""
    directed, bidirected = mixed_graphs.all_simple_graphs(size)
    proper = jax.jit(jax.vmap(lambda d, b: graphs.is_ancestral(d, b) & projection.is_maximal(d, b)))
    keep = np.asarray(proper(directed, bidirected))
    directed, bidirected = directed[keep], bidirected[keep]
    return mixed_graphs.equivalence_classes(directed, bidirected)


def test_each_class_of_four_vertices_keeps_exactly_its_common_marks():
    found = classes(4)
    assert sum(map(len, found)) == 2492
    for group in found:
        assert (pag.of_mag(group[0]) == mixed_graphs.common(group)).all()
        assert (pag.of_mag(group[-1]) == mixed_graphs.common(group)).all()


@pytest.mark.slow
def test_every_graph_of_four_vertices_leads_to_the_graph_of_its_class():
    for group in classes(4):
        assert all((pag.of_mag(member) == mixed_graphs.common(group)).all() for member in group)


def test_equivalence_is_equality_of_independences():
    found = classes(4)[::5]
    for n, group in enumerate(found):
        assert pag.markov_equivalent(group[0], group[-1])
        assert not pag.markov_equivalent(group[0], found[n - 1][0])


def test_a_collider_and_a_chain_by_hand():
    collider = np.array([[0, ARROW, 0], [TAIL, 0, TAIL], [0, ARROW, 0]], np.int8)
    assert pag.of_mag(collider).tolist() == [[0, ARROW, 0], [CIRCLE, 0, CIRCLE], [0, ARROW, 0]]
    chain = np.array([[0, ARROW, 0], [TAIL, 0, ARROW], [0, TAIL, 0]], np.int8)
    assert pag.of_mag(chain).tolist() == [[0, CIRCLE, 0], [CIRCLE, 0, CIRCLE], [0, CIRCLE, 0]]


def test_names_do_not_matter():
    rng = np.random.default_rng(0)
    for mag in np.asarray(PROJECT(mixed_graphs.random_dags(6, COUNT, SEEN + HIDDEN, 0.25))):
        order = rng.permutation(SEEN)
        assert (pag.of_mag(mag)[np.ix_(order, order)] == pag.of_mag(mag[np.ix_(order, order)])).all()


def test_circles_are_refused():
    with pytest.raises(ValueError, match="mag must be made of 0, 2, 3"):
        pag.of_mag(np.array([[0, CIRCLE], [CIRCLE, 0]], np.int8))


@pytest.mark.slow  # its extra is installed for the rest of CI
@pytest.mark.parametrize("density", [0.15, 0.25, 0.35])
def test_the_oracle_of_andrey_agrees(density):
    latent = pytest.importorskip("andrey.data.latent", reason="needs the causal-peers extra")
    from andrey.core.structure import GraphStructure

    theirs_to_ours = np.array([0, TAIL, ARROW, CIRCLE], np.int8)
    directed = mixed_graphs.random_dags(7, COUNT, SEEN + HIDDEN, density)
    for graph, mag in zip(directed, np.asarray(PROJECT(directed)), strict=True):
        marks = (graph * 1 + graph.T * 2).astype(np.int8)  # theirs: [i, j] is the mark at i
        whole = GraphStructure.from_numpy(marks, kind="dag", node_types=(np.arange(SEEN + HIDDEN) >= SEEN) * np.int8(1))
        partial = theirs_to_ours[latent.marginal(whole, "pag").to_numpy()].T
        assert (pag.of_mag(mag) == partial).all()
        assert (mag == theirs_to_ours[latent.marginal(whole, "mag").to_numpy()].T).all()
