"""Completed partially directed graphs: the common marks of all equivalent acyclic graphs by exhaustion, with knowledge and without."""

import functools

import jax
import mixed_graphs
import numpy as np
import pytest

from dmsec_jax.causal import cpdag, graphs, pag
from dmsec_jax.core.marks import ARROW, CIRCLE, TAIL


@functools.cache
def classes(size):
    """All acyclic graphs of that many vertices, grouped by their independences: a list of [members, V, V] marks."""
    directed, bidirected = mixed_graphs.all_simple_graphs(size)
    proper = ~bidirected.any(axis=(1, 2)) & np.asarray(jax.jit(jax.vmap(graphs.is_acyclic))(directed))
    directed, bidirected = directed[proper], bidirected[proper]
    return mixed_graphs.equivalence_classes(directed, bidirected)


@pytest.mark.parametrize(("size", "graphs_in_all", "classes_in_all"), [(2, 3, 2), (3, 25, 11), (4, 543, 185)])
def test_each_class_keeps_exactly_its_common_marks(size, graphs_in_all, classes_in_all):
    found = classes(size)
    assert (sum(map(len, found)), len(found)) == (graphs_in_all, classes_in_all)
    for group in found:
        assert all((cpdag.of_dag(member) == mixed_graphs.common(group)).all() for member in group)


def test_with_known_edges_the_marks_are_those_common_to_the_graphs_that_have_them():
    rng = np.random.default_rng(0)
    for group in classes(4):
        for member in group:
            known = (member == ARROW) & (rng.random(member.shape) < 0.3)
            having = group[((group == ARROW) | ~known).all(axis=(1, 2))]
            assert (cpdag.of_dag(member, known) == mixed_graphs.common(having)).all()


def test_knowledge_of_edges_that_are_not_there_is_ignored():
    chain = np.array([[0, ARROW, 0], [TAIL, 0, ARROW], [0, TAIL, 0]], np.int8)
    assert cpdag.of_dag(chain, np.ones((3, 3), bool)).tolist() == chain.tolist()


def test_a_collider_and_a_chain_by_hand():
    collider = np.array([[0, ARROW, 0], [TAIL, 0, TAIL], [0, ARROW, 0]], np.int8)
    assert cpdag.of_dag(collider).tolist() == collider.tolist()
    chain = np.array([[0, ARROW, 0], [TAIL, 0, ARROW], [0, TAIL, 0]], np.int8)
    assert cpdag.of_dag(chain).tolist() == [[0, CIRCLE, 0], [CIRCLE, 0, CIRCLE], [0, CIRCLE, 0]]


def test_it_tells_at_least_what_holds_with_hidden_causes_too():
    for directed in mixed_graphs.random_dags(3, 30, 9, 0.3):
        dag = np.asarray(graphs.to_marks(directed, np.zeros_like(directed)))
        found, partial = cpdag.of_dag(dag), pag.of_mag(dag)
        assert (found[partial != CIRCLE] == partial[partial != CIRCLE]).all()
        assert (found == CIRCLE).sum() == ((found == CIRCLE) & (found.T == CIRCLE)).sum()


@pytest.mark.parametrize("marks", [[[0, ARROW], [ARROW, 0]], [[0, ARROW, TAIL], [TAIL, 0, ARROW], [ARROW, TAIL, 0]]])
def test_what_is_no_acyclic_graph_is_refused(marks):
    with pytest.raises(ValueError, match="dag must be acyclic, with directed edges alone"):
        cpdag.of_dag(np.array(marks, np.int8))
