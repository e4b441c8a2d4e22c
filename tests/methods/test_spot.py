"""SPOT on covariances of known graphs, guided by probabilities that know the skeleton more or less."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.causal import graphs, mag, penalties, sem
from dmsec_jax.methods import spot
from dmsec_jax.metrics import graph as metrics

SIZE, ROWS = 8, 1000
CFG = spot.Config(num_steps=8, inner_steps=150)
CLASS = {"acyclic_fn": penalties.squarings, "class_fn": penalties.ancestral}
RUN = jax.jit(spot.run, static_argnames=tuple(CLASS))
FINISH = jax.jit(spot.finish, static_argnames=("offending_fn",))
SEARCH = jax.jit(spot.search, static_argnames=(*CLASS, "offending_fn"))


@functools.cache
def worlds(count=6):
    draw = lambda key: sem.simulate(key, SIZE, ROWS, sem.SPOT)
    return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(7), count))


def knowing(marks, sure=0.95):
    """Probabilities that say of every pair, with that confidence, whether it is adjacent."""
    return jnp.where(marks != 0, sure, 1 - sure) * (1 - jnp.eye(len(marks)))


def protocol_case():
    covariance, marks = jax.tree.map(lambda leaf: leaf[0], worlds())
    params = spot.guide_mag(knowing(marks))
    return {
        "cfg": spot.Config(num_steps=3, inner_steps=20, refresh=10),
        "params": params,
        "init": (jax.random.key(0), covariance, params),
        "step": (covariance, ROWS),
        "run": (covariance, ROWS),
        "options": CLASS,
    }


def test_finds_a_confounded_pair_and_its_cause():
    # 0 -> 1 <-> 2 <- 3: every arrowhead is told by the data
    directed, bidirected = np.zeros((2, 4, 4))
    directed[0, 1] = directed[3, 2] = 1.0
    bidirected[1, 2] = bidirected[2, 1] = 0.6
    total = np.linalg.inv(np.eye(4) - directed)
    covariance = (total.T @ (bidirected + np.diag([1, 1.5, 1.5, 1])) @ total).astype(np.float32)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), spot.guide_mag(jnp.full((4, 4), 0.5)))
    best, found = SEARCH(jax.random.key(0), covariance, ROWS, params, CFG)
    assert np.asarray(best.marks).tolist() == np.asarray(graphs.to_marks(directed, bidirected)).tolist()
    np.testing.assert_allclose(best.directed, directed, atol=0.02)
    np.testing.assert_allclose(best.omega, bidirected + np.diag([1, 1.5, 1.5, 1]), atol=0.05)
    assert best.bic == found.bic.min()


@pytest.mark.parametrize(
    "acyclic_fn",
    [pytest.param(penalties.squarings, marks=pytest.mark.slow), penalties.log_det],
    ids=["squarings", "log-det"],
)
def test_constraint_falls_and_all_is_finite(acyclic_fn):
    covariance, marks = jax.tree.map(lambda leaf: leaf[1], worlds())
    params = spot.guide_mag(knowing(marks))
    state, info = RUN(jax.random.key(1), covariance, ROWS, params, CFG, acyclic_fn=acyclic_fn)
    assert np.asarray(info.finite).all()
    assert info.h[-1] < 1e-2
    assert info.h[-1] < info.h[0]
    assert (np.diff(info.rho) >= 0).all()
    assert (np.asarray(state.bidirected) == np.asarray(state.bidirected).T).all()
    assert (np.diagonal(state.directed) == 0).all()


CLASSES = {
    "ancestral": (penalties.ancestral, penalties.not_ancestral, graphs.is_ancestral),
    "bow-free": (penalties.bow_free, penalties.not_bow_free, graphs.is_bow_free),
    "arid": (penalties.arid, penalties.not_arid, graphs.is_arid),
}


@pytest.mark.parametrize(
    "name", ["ancestral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bow-free", "arid"))]
)
def test_what_is_finished_is_in_its_class(name):
    """From coefficients far outside, as an optimiser that has not converged would leave them."""
    _, offending_fn, member = CLASSES[name]
    keys = jax.random.split(jax.random.key(2), 20)

    def one(key):
        key_directed, key_bidirected = jax.random.split(key)
        lower = jnp.tril(jax.random.normal(key_bidirected, (6, 6)), -1) * 0.3
        state = spot.State(
            jax.random.normal(key_directed, (6, 6)), lower + lower.T, *[jnp.float32(0)] * 3, jnp.int32(0)
        )
        graph = spot.finish(state, jnp.eye(6) + 0.3, ROWS, CFG, offending_fn=offending_fn)
        inside = jnp.triu(graph.omega, 1) != 0
        return graph, member(graph.directed, inside | inside.T)

    found, inside = jax.jit(jax.vmap(one))(keys)
    assert np.asarray(inside).all()
    assert np.isfinite(found.bic).all()
    assert (np.asarray(found.directed) != 0).any(axis=(1, 2)).all()


def test_finish_drops_the_weakest_offender():
    # a ring 0 -> 1 -> 2 -> 0 whose weakest edge is 1 -> 2, a <-> between a cause and its effect, and one below the threshold
    directed, bidirected = np.zeros((2, 4, 4), np.float32)
    directed[0, 1], directed[1, 2], directed[2, 0] = 0.9, 0.4, 0.8
    directed[0, 3] = 0.01
    bidirected[0, 1] = bidirected[1, 0] = 0.5
    bidirected[1, 3] = bidirected[3, 1] = 0.3
    state = spot.State(*map(jnp.asarray, (directed, bidirected)), *[jnp.float32(0)] * 3, jnp.int32(0))
    graph = FINISH(state, jnp.eye(4) + 0.2, ROWS, CFG)
    assert np.argwhere(graph.directed).tolist() == [[0, 1], [2, 0]]
    assert np.argwhere(np.triu(graph.omega, 1)).tolist() == [[1, 3]]


def test_hidden_causes_can_be_ruled_out_and_edges_forbidden():
    covariance, marks = jax.tree.map(lambda leaf: leaf[2], worlds())
    params = spot.guide_dag(knowing(marks))
    allowed = np.triu(np.ones((SIZE, SIZE), bool), 1)
    params = params._replace(directed=jnp.asarray(allowed))
    graph = FINISH(RUN(jax.random.key(0), covariance, ROWS, params, CFG)[0], covariance, ROWS, CFG)
    assert not np.asarray(graph.directed)[~allowed].any()
    assert not np.triu(graph.omega, 1).any()
    assert (np.asarray(graph.marks) != 0).any()


def test_what_the_guide_excludes_stays_zero():
    covariance, marks = jax.tree.map(lambda leaf: leaf[3], worlds())
    params = spot.guide_mag(knowing(marks))
    for mode in ("log-odds", "spot", "prob"):
        cfg = dataclasses.replace(CFG, guide=mode, num_steps=2)
        state, _ = RUN(jax.random.key(0), covariance, ROWS, params, cfg)
        apart = np.asarray(marks) == 0
        assert not np.asarray(state.directed)[apart].any(), mode
        assert not np.asarray(state.bidirected)[apart].any(), mode
    free, _ = RUN(jax.random.key(0), covariance, ROWS, params, dataclasses.replace(cfg, guide="off"))
    assert np.asarray(free.directed)[apart].any()


def test_drawn_skeletons_are_symmetric_and_as_likely_as_the_guide_says():
    probability = np.full((5, 5), 0.3, np.float32)
    draws = spot.guide_draws(jax.random.key(0), spot.guide_mag(jnp.asarray(probability)), 500)
    skeletons = np.asarray(draws.probability)
    assert set(np.unique(skeletons)) == {0.0, 1.0}
    assert (skeletons == skeletons.transpose(0, 2, 1)).all()
    assert not np.diagonal(skeletons, axis1=1, axis2=2).any()
    assert abs(metrics.pairs(skeletons).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 5000)
    assert draws.directed.shape == (500, 5, 5)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["raw", "standardised"])
def test_a_guide_that_knows_the_skeleton_helps(scale):
    """Skeleton F1 of the final graph, guided minus unguided, by its own standard error over graphs."""
    size, count = 15, 12
    draw = lambda key: sem.simulate(key, size, ROWS, sem.SPOT)
    world = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), count))
    covariance = world.covariance
    if scale == "standardised":
        deviation = jnp.sqrt(jnp.diagonal(covariance, axis1=1, axis2=2))
        covariance = covariance / deviation[:, :, None] / deviation[:, None]
    keys = jax.random.split(jax.random.key(4), count)

    def f1(mode):
        cfg = spot.Config(guide=mode)

        def one(key, cov, marks):
            state, _ = spot.run(key, cov, ROWS, spot.guide_mag(knowing(marks, 0.9)), cfg)
            return spot.finish(state, cov, ROWS, cfg).marks

        found = np.asarray(jax.jit(jax.vmap(one))(keys, covariance, world.marks))
        return np.array([metrics.skeleton_scores(a, b).f1 for a, b in zip(found, np.asarray(world.marks), strict=True)])

    gain = f1("log-odds") - f1("off")
    assert gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(count)


def test_the_fit_scores_no_worse_than_that_of_the_truth_by_much():
    covariance, marks = jax.tree.map(lambda leaf: leaf[4], worlds())
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), spot.guide_mag(knowing(marks)))
    best, _ = SEARCH(jax.random.key(0), covariance, ROWS, params, CFG)
    truth = jax.jit(mag.refit)(*graphs.to_edges(marks), covariance, ROWS)
    edges = int((np.asarray(marks) != 0).sum() // 2)
    assert best.bic < truth.bic + np.log(ROWS) * edges  # an empty or a random graph is far beyond
    nothing = jax.jit(mag.refit)(marks < 0, marks < 0, covariance, ROWS)
    assert nothing.bic > truth.bic + np.log(ROWS) * edges
