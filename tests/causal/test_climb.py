"""Local search over graphs: its score against the exact fit, its moves against definitions, and what it finds in data without noise."""

import jax
import mixed_graphs
import numpy as np
import pytest

from dmsec_jax.causal import climb, graphs, mag, pag, penalties

SIZE, ROWS = 6, 20_000.0
OFF = ~np.eye(SIZE, dtype=bool)
NONE = np.zeros((SIZE, SIZE), bool)
COSTS = climb.edge_costs(np.ones((SIZE, SIZE)), ROWS, 0.5)
REFIT = jax.jit(mag.refit)


def ancestral(seed):
    """A random ancestral graph with one edge on a pair at most."""
    directed, bidirected = (part[0] for part in mixed_graphs.random_admgs(seed, 1, SIZE, 0.4, 0.4))
    bidirected = bidirected & ~(directed | directed.T)
    return directed, bidirected & ~np.asarray(penalties.not_ancestral(directed, bidirected))


def covariance_of(seed, directed, bidirected):
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1, 1], (2, SIZE, SIZE))
    weights = rng.uniform(0.5, 1.2, (SIZE, SIZE)) * signs[0] * directed
    shared = np.triu(rng.uniform(0.4, 0.7, (SIZE, SIZE)) * signs[1] * bidirected, 1)
    shared = shared + shared.T
    omega = shared + np.diag(rng.uniform(0.5, 1, SIZE) + np.abs(shared).sum(axis=1))
    total = np.linalg.inv(np.eye(SIZE) - weights)
    return total.T @ omega @ total


def search(start, covariance, may=(OFF, OFF), legal_fn=climb.stays_ancestral, **options):
    return climb.climb(*start, covariance, ROWS, COSTS, may, legal_fn, climb.Config(**options))


def test_the_score_is_that_of_the_exact_fit():
    for seed in range(5):
        graph = ancestral(seed)
        exact = covariance_of(seed + 1, *ancestral(seed + 1))  # of another graph: nothing fits
        covariance = np.cov(np.random.default_rng(seed).multivariate_normal(np.zeros(SIZE), exact, 100).T)
        found = search(graph, covariance, max_moves=0)
        fit = REFIT(*graph, covariance.astype(np.float32), ROWS)
        constant = ROWS * SIZE * (1 + np.log(2 * np.pi)) + np.log(ROWS) * SIZE
        np.testing.assert_allclose(found.score + constant, fit.bic, rtol=1e-5)


def test_what_a_move_is_said_to_gain_is_gained_at_least():
    for seed in range(5):
        graph, covariance = ancestral(seed), covariance_of(seed + 1, *ancestral(seed + 1))
        before = search(graph, covariance, max_moves=0).score
        state = climb._State(*graph, covariance, ROWS, COSTS)
        gains = {}
        for i, j in np.argwhere(np.triu(OFF)):
            climb._regain(gains, state, (OFF, OFF), int(i), int(j))
        for (i, j, kind), gain in gains.items():
            other = climb._State(*graph, covariance, ROWS, COSTS)
            other.put(i, j, kind)
            if bool(graphs.is_ancestral(*other.edges())):
                after = search(other.edges(), covariance, max_moves=0).score
                assert after - before <= gain + 0.1


@pytest.mark.parametrize("seed", range(6))
def test_the_class_of_an_exact_covariance_is_found_from_a_neighbour_and_kept(seed):
    graph = ancestral(seed)
    covariance = covariance_of(seed, *graph)
    true = pag.of_mag(np.asarray(graphs.to_marks(*graph)))
    at = np.argwhere(np.triu(graph[0] | graph[0].T | graph[1]))[0]
    less = [part.copy() for part in graph]
    for part in less:
        part[tuple(at)] = part[tuple(at[::-1])] = False
    truth, found = search(graph, covariance, max_moves=0), search(less, covariance)
    assert found.score <= truth.score + 0.1
    assert (pag.of_mag(np.asarray(graphs.to_marks(found.directed, found.bidirected))) == true).all()


@pytest.mark.parametrize("legal_fn", [climb.stays_acyclic, climb.stays_ancestral, climb.stays_arid])
def test_legal_is_what_the_class_says(legal_fn):
    whole = {
        climb.stays_acyclic: lambda d, b: graphs.is_acyclic(d),
        climb.stays_ancestral: graphs.is_ancestral,
        climb.stays_arid: graphs.is_arid,
    }
    judge, verdicts = jax.jit(whole[legal_fn]), []
    for seed in range(8):
        directed, bidirected = ancestral(seed)  # in every class
        for i, j in np.argwhere(np.triu(OFF))[::2].tolist():
            for forth, back, both in np.eye(3, dtype=bool):
                new = directed.copy(), bidirected.copy()
                new[0][i, j], new[0][j, i], new[1][i, j], new[1][j, i] = forth, back, both, both
                verdicts.append(legal_fn(*new, i, j))
                assert verdicts[-1] == bool(judge(*new))
    assert any(verdicts)
    assert not all(verdicts)


def test_units_do_not_matter():
    graph, covariance = ancestral(3), covariance_of(4, *ancestral(4))
    scale = np.exp(np.random.default_rng(0).normal(size=SIZE))
    one, other = search(graph, covariance), search(graph, covariance * scale[:, None] * scale)
    np.testing.assert_allclose(other.score - one.score, 2 * ROWS * np.log(scale).sum(), rtol=1e-4)


def test_only_what_may_be_is_tried():
    covariance = covariance_of(1, *ancestral(1))
    may = NONE.copy()
    may[0, 1:] = True
    found = search((NONE, NONE), covariance, (may, NONE))
    assert not (found.directed & ~may).any()
    assert not found.bidirected.any()


def test_the_search_leaves_a_local_optimum_and_returns_the_best_graph_met():
    better = 0
    for seed in range(8):
        covariance = covariance_of(seed, *ancestral(seed))
        steepest, patient = (search((NONE, NONE), covariance, patience=p).score for p in (0, 30))
        assert patient <= steepest + 0.1
        better += patient < steepest - 1
    assert better > 0


def test_the_price_of_an_edge_by_hand():
    probability = np.zeros((100, 100))
    probability[0, 1], probability[0, 2] = 1.0, 0.25
    prices = climb.edge_costs(probability, 1000, 0.5)
    extended, bic = np.log(1000) + 2 * np.log(100), np.log(1000)
    np.testing.assert_allclose(prices[0, [1, 2, 3]], [bic, 0.25 * bic + 0.75 * extended, extended])
    np.testing.assert_allclose(climb.edge_costs(probability, 1000, 0.0), bic)
