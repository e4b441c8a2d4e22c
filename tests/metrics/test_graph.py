"""Measures of graphs by hand, and against andrey's where it has the same."""

import numpy as np
import pytest
from scipy import stats

from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL
from dmsec_jax.metrics import graph


def marks(size, *edges):
    """Edges as (i, mark at i, mark at j, j)."""
    matrix = np.zeros((size, size), np.int8)
    for i, at_i, at_j, j in edges:
        matrix[j, i], matrix[i, j] = at_i, at_j
    return matrix


# found: 0 -> 1, 1 o-> 2, 2 <-> 3;   true: 0 <- 1, 1 o-> 2, 0 -> 3
FOUND = marks(4, (0, TAIL, ARROW, 1), (1, CIRCLE, ARROW, 2), (2, ARROW, ARROW, 3))
TRUE = marks(4, (1, TAIL, ARROW, 0), (1, CIRCLE, ARROW, 2), (0, TAIL, ARROW, 3))


@pytest.mark.parametrize(
    ("measure", "hits", "found", "true"),
    [
        (graph.skeleton_scores, 2, 3, 3),
        (graph.arrowhead_scores, 1, 4, 3),  # at 2; the arrowheads at 1 and 0 stand at different ends of one edge
        (graph.tail_scores, 0, 1, 2),
        (graph.endpoint_scores, 2, 6, 6),
        (graph.edge_scores, 1, 3, 3),
        (graph.bidirected_scores, 0, 1, 0),
    ],
)
def test_scores_by_hand(measure, hits, found, true):
    scores = measure(FOUND, TRUE)
    assert scores[3:] == (hits, found, true)
    assert scores.precision == hits / found
    assert scores.recall == (hits / true if true else 1.0)
    assert scores.f1 == 2 * hits / (found + true)


def test_an_arrowhead_into_the_same_vertex_by_another_edge_is_no_hit():
    by_0, by_2 = marks(3, (0, TAIL, ARROW, 1)), marks(3, (2, TAIL, ARROW, 1))
    assert graph.arrowhead_scores(by_0, by_2).hits == 0
    assert graph.tail_scores(by_0, by_2).hits == 0


def test_distance_by_hand():
    assert graph.distance(FOUND, TRUE) == 2 + 0 + 2 + 2
    assert graph.distance(marks(2, (0, CIRCLE, ARROW, 1)), marks(2, (0, TAIL, ARROW, 1))) == 1
    assert graph.distance(TRUE, TRUE) == 0


def test_nothing_to_find_and_nothing_found_is_perfect():
    empty = np.zeros((3, 3), np.int8)
    assert graph.skeleton_scores(empty, empty)[:3] == (1.0, 1.0, 1.0)
    assert graph.skeleton_scores(marks(3, (0, TAIL, ARROW, 1)), empty)[:3] == (0.0, 1.0, 0.0)


@pytest.mark.slow  # its extra is installed for the rest of CI
def test_andrey_counts_alike():
    theirs = pytest.importorskip("andrey.metrics", reason="needs the causal-peers extra")
    from andrey.core.structure import GraphStructure

    rng = np.random.default_rng(0)

    def random():
        adjacent = np.triu(rng.random((7, 7)) < 0.5, 1)
        ends = rng.choice([CIRCLE, ARROW, TAIL], (7, 7)).astype(np.int8)
        return np.where(adjacent | adjacent.T, ends, NONE).astype(np.int8)

    codes = np.array([0, 3, 2, 1], np.int8)
    read = lambda matrix: GraphStructure.from_numpy(codes[matrix].T, kind="pag")
    for _ in range(20):
        found, true = random(), random()
        pair = read(found), read(true)
        assert graph.distance(found, true) == theirs.shd(*pair, endpoint_aware=True)
        for ours, name in [
            (graph.skeleton_scores, "skeleton_scores"),
            (graph.arrowhead_scores, "orientation_scores"),
            (graph.bidirected_scores, "confounder_pair_scores"),
        ]:
            scores, expected = ours(found, true), getattr(theirs, name)(*pair)
            if scores.found and scores.true:
                assert scores[:3] == pytest.approx([expected[key] for key in ("precision", "recall", "f1")])


PROBABILITY = np.array([0.05, 0.15, 0.95, 0.95, 0.55])
ADJACENT = np.array([0, 1, 1, 0, 1])


def test_probabilities_by_hand():
    # positives .15, .95, .55 against .05, .95: wins 1 + 0, 1 + half, 1 + 0 of 6
    assert graph.auroc(PROBABILITY, ADJACENT) == pytest.approx(3.5 / 6)
    # by falling probability: {.95, .95} precision 1/2 for 1/3 recall, .55 2/3, .15 3/4
    assert graph.auprc(PROBABILITY, ADJACENT) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    assert graph.log_loss(PROBABILITY, ADJACENT) == pytest.approx(-np.log([0.95, 0.15, 0.95, 0.05, 0.55]).mean())
    assert graph.sum_ratio(PROBABILITY, ADJACENT) == pytest.approx(2.65 / 3)
    table = graph.reliability(PROBABILITY, ADJACENT)
    assert table.count.tolist() == [1, 1, 1, 2]
    assert table.frequency.tolist() == [0, 1, 1, 0.5]
    error = (0.05 + 0.85 + 0.45 + 2 * 0.45) / 5
    assert graph.expected_calibration_error(PROBABILITY, ADJACENT) == pytest.approx(error)


def test_certainty_counts_in_the_last_bin_and_costs_everything_when_wrong():
    assert graph.reliability([1.0, 0.0], [1, 0]).mean_probability.tolist() == [0.0, 1.0]
    assert graph.log_loss([1.0, 0.0], [1, 0]) == 0
    assert graph.log_loss([1.0, 0.0], [0, 0]) == np.inf


def test_pairs_are_the_upper_triangle_of_each_matrix():
    matrix = np.arange(18).reshape(2, 3, 3)
    assert graph.pairs(matrix).tolist() == [[1, 2, 5], [10, 11, 14]]


def test_likelihood_and_bic_are_those_of_scipy():
    rng = np.random.default_rng(1)
    data = rng.normal(size=(50, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.2], [0, 0, 1]])
    covariance = np.cov(data.T) + 0.1 * np.eye(3)
    expected = stats.multivariate_normal(np.zeros(3), covariance).logpdf(data)
    assert graph.gaussian_log_likelihood(covariance, data) == pytest.approx(expected.mean())
    bic = graph.bic(covariance, data.T @ data / 50, 50, 4)
    assert bic == pytest.approx(-2 * expected.sum() + np.log(50) * 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graph.distance(np.zeros((2, 2), np.int8), np.zeros((3, 3), np.int8)), "two of one shape"),
        (lambda: graph.log_loss([0.5, 1.5], [0, 1]), r"in \[0, 1\]"),
        (lambda: graph.log_loss([0.5], [0, 1]), "one per pair"),
        (lambda: graph.log_loss([np.nan], [0]), r"in \[0, 1\]"),
        (lambda: graph.auroc([0.5, 0.6], [1, 1]), "of both kinds"),
        (lambda: graph.sum_ratio([0.5], [0]), "at least one edge"),
        (lambda: graph.bic(-np.eye(3), np.eye(3), 10, 1), "positive definite"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
