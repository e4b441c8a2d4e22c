"""Mixed graphs by hand, and their classes against slow definitions."""

import jax
import mixed_graphs
import numpy as np
import pytest

from dmsec_jax.causal import graphs
from dmsec_jax.core.marks import ARROW, CIRCLE, TAIL

CLASSES = jax.jit(
    jax.vmap(
        lambda d, b: (
            graphs.is_acyclic(d),
            graphs.is_ancestral(d, b),
            graphs.is_arid(d, b),
            graphs.is_bow_free(d, b),
            graphs.ancestors(d),
        )
    )
)

PROJECTION = jax.jit(graphs.latent_projection, static_argnums=1)
TO_MARKS = jax.jit(graphs.to_marks)


def edges(size, *arrows):
    directed = np.zeros((size, size), bool)
    for i, j in arrows:
        directed[i, j] = True
    return directed


def test_ancestors_are_what_a_search_finds():
    directed = mixed_graphs.random_dags(0, 20, 5, 0.4)
    above = np.asarray(jax.jit(jax.vmap(graphs.ancestors))(directed))
    for d, found in zip(directed, above, strict=True):
        for v in range(5):
            assert set(np.flatnonzero(found[v])) == mixed_graphs.descendants(d, v)


def test_cycles_are_seen_at_every_length():
    rings = np.zeros((7, 7, 7), bool)
    for length, ring in enumerate(rings, start=1):
        ring[:length, :length] = np.roll(np.eye(length), 1, axis=1)
    acyclic = jax.jit(jax.vmap(graphs.is_acyclic))
    assert not np.asarray(acyclic(rings)).any()
    for length, ring in enumerate(rings, start=1):
        ring[length - 1, 0] = False
    assert np.asarray(acyclic(rings)).all()


def test_classes_by_their_definitions():
    directed, bidirected = mixed_graphs.random_admgs(1, 300, 5, 0.5, 0.5)
    bidirected[::2] &= ~(directed | directed.transpose(0, 2, 1))[::2]  # half of them without bows
    acyclic, ancestral, arid, bow_free, _ = map(np.asarray, CLASSES(directed, bidirected))
    assert acyclic.all()
    for n, (d, b) in enumerate(zip(directed, bidirected, strict=True)):
        below = [mixed_graphs.descendants(d, v) for v in range(5)]
        assert ancestral[n] == (
            not any(b[i, j] and (j in below[i] or i in below[j]) for i in range(5) for j in range(5))
        )
        assert bow_free[n] == (not (d & b).any())
        assert arid[n] == (
            not any(arborescence(d, b, inside) for inside in mixed_graphs.subsets(5) if inside.sum() > 1)
        )
    assert 0 < ancestral.sum() < arid.sum() < bow_free.sum() < 300
    assert (ancestral <= arid).all()
    assert (arid <= bow_free).all()


def arborescence(directed, bidirected, inside):
    """Whether the vertices `inside` are one district and all ancestors of one of them, by edges among themselves."""
    kept = np.flatnonzero(inside)
    d, b = directed[np.ix_(kept, kept)], bidirected[np.ix_(kept, kept)]
    district = mixed_graphs.descendants(b, 0)
    roots = [v for v in range(len(kept)) if all(v in mixed_graphs.descendants(d, u) for u in range(len(kept)))]
    return len(district) == len(kept) and bool(roots)


def test_hiding_by_hand():
    # 0 -> 3h -> 1, 3h -> 2, 4h -> 3h: hiding h leaves 0 -> 1, 0 -> 2 and 1 <-> 2
    directed, bidirected = PROJECTION(edges(5, (0, 3), (3, 1), (3, 2), (4, 3)), 3)
    assert np.argwhere(directed).tolist() == [[0, 1], [0, 2]]
    assert np.argwhere(bidirected).tolist() == [[1, 2], [2, 1]]
    nothing_hidden = PROJECTION(edges(3, (0, 1), (1, 2)), 3)
    assert np.argwhere(nothing_hidden[0]).tolist() == [[0, 1], [1, 2]]
    assert not np.asarray(nothing_hidden[1]).any()


def test_a_graph_without_bows_need_not_be_arid():
    # 0 -> 1 -> 2 -> 3 with 0 <-> 2, 0 <-> 3, 1 <-> 3: one district, all ancestors of 3
    directed, bidirected = edges(4, (0, 1), (1, 2), (2, 3)), edges(4, (0, 2), (0, 3), (1, 3))
    _, ancestral, arid, bow_free, _ = (part[0] for part in CLASSES(directed[None], (bidirected | bidirected.T)[None]))
    assert bow_free
    assert not arid
    assert not ancestral
    closures = jax.jit(graphs.reachable_closures)(directed, bidirected | bidirected.T)
    assert np.asarray(closures).sum(axis=1).tolist() == [1, 1, 1, 4]


def test_marks_and_edges_are_two_spellings():
    directed, bidirected = edges(3, (0, 1)), edges(3, (1, 2), (2, 1))
    marks = np.asarray(TO_MARKS(directed, bidirected))
    assert marks.tolist() == [[0, ARROW, 0], [TAIL, 0, ARROW], [0, ARROW, 0]]
    assert [part.tolist() for part in graphs.to_edges(marks)] == [directed.tolist(), bidirected.tolist()]
    assert graphs.skeleton(marks).sum() == 4
    both = np.asarray(TO_MARKS(directed, directed | directed.T))
    assert both.tolist() == np.asarray(TO_MARKS(directed, directed & False)).tolist()


def test_coefficients_count_as_edges():
    weights = np.array([[0.0, -0.5], [0.0, 0.0]], np.float32)
    assert np.asarray(jax.jit(graphs.ancestors)(weights)).tolist() == [[True, True], [False, True]]
    assert not jax.jit(graphs.is_bow_free)(weights, weights + weights.T)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ([[0, 4], [2, 0]], "made of 0, 1, 2, 3"),
        ([[0, 2], [0, 0]], "a lone mark"),
        ([[2, 2], [2, 0]], "a lone mark"),
        ([[0, TAIL], [TAIL, 0]], "tail against tail"),
    ],
)
def test_broken_marks_are_refused(marks, message):
    with pytest.raises(ValueError, match=message):
        graphs.check_marks("pag", np.array(marks, np.int8), circles=True)


def test_circles_are_refused_where_a_graph_is_meant():
    circles = np.array([[0, CIRCLE], [CIRCLE, 0]], np.int8)
    assert graphs.check_marks("pag", circles, circles=True).tolist() == circles.tolist()
    with pytest.raises(ValueError, match="mag must be made of 0, 2, 3"):
        graphs.check_marks("mag", circles, circles=False)
