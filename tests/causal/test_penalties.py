"""Penalties are zero exactly on their class, and offending edges are those that keep a graph out."""

from functools import partial

import jax
import jax.numpy as jnp
import mixed_graphs
import numpy as np
import pytest

from dmsec_jax.causal import graphs, penalties

CLASSES = {
    "ancestral": (penalties.ancestral, graphs.is_ancestral, penalties.not_ancestral),
    "acyclic and ancestral": (penalties.acyclic_ancestral, graphs.is_ancestral, penalties.not_ancestral),
    "bow-free": (penalties.bow_free, graphs.is_bow_free, penalties.not_bow_free),
    "arid": (penalties.arid, graphs.is_arid, penalties.not_arid),
}


def weighted(seed, edges):
    """Random coefficients of absolute value 0.1 to 1 on the edges."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.1, 1, edges.shape) * rng.choice([-1, 1], edges.shape)
    return (values * edges).astype(np.float32)


@pytest.mark.parametrize("name", CLASSES)
def test_zero_exactly_on_the_class(name):
    penalty, member, offending = CLASSES[name]
    directed, bidirected = mixed_graphs.random_admgs(1, 300, 5, 0.5, 0.5)
    bidirected[::2] &= ~(directed | directed.transpose(0, 2, 1))[::2]
    w, c = weighted(0, directed), weighted(1, bidirected)
    c = np.triu(c, 1) + np.triu(c, 1).transpose(0, 2, 1)
    judged = jax.jit(jax.vmap(lambda d, b: (penalty(d, b), member(d, b), offending(d, b))))
    value, inside, out = map(np.asarray, judged(w, c))
    assert 0 < inside.sum() < 300
    assert (value[inside] == 0).all()
    assert (value[~inside] > 0).all()
    assert (out.any(axis=(1, 2)) == ~inside).all()
    assert (out <= bidirected).all()


def test_arid_tells_bow_free_graphs_apart():
    directed, bidirected = np.zeros((2, 4, 4), np.float32)
    directed[0, 1] = directed[1, 2] = directed[2, 3] = 0.5
    for i, j in ((0, 2), (0, 3), (1, 3)):
        bidirected[i, j] = bidirected[j, i] = 0.5
    arid = jax.jit(jax.value_and_grad(penalties.arid, argnums=(0, 1)))
    value, gradient = arid(directed, bidirected)
    assert value > 0
    assert all(np.isfinite(g).all() and np.abs(g).sum() > 0 for g in gradient)
    bidirected[0, 2] = bidirected[2, 0] = 0
    assert arid(directed, bidirected)[0] == 0
    assert jax.jit(penalties.bow_free)(directed, bidirected) == 0


def both(directed):
    """Of a graph without hidden causes."""
    return penalties.acyclic_ancestral(directed, jnp.zeros_like(directed))


@pytest.mark.parametrize("penalty", [penalties.squarings, penalties.log_det, both])
def test_acyclicity_is_zero_exactly_without_cycles(penalty):
    rng = np.random.default_rng(0)
    acyclic = weighted(2, mixed_graphs.random_dags(0, 200, 6, 0.5))
    cyclic = weighted(3, rng.random((200, 6, 6)) < 0.3) * (1 - np.eye(6, dtype=np.float32)) * 0.5
    judged = jax.jit(jax.vmap(lambda w: (penalty(w), graphs.is_acyclic(w), penalties.on_cycles(w, w))))
    value, inside, out = map(np.asarray, judged(acyclic))
    assert inside.all()
    np.testing.assert_allclose(value, 0, atol=1e-5)
    assert not out.any()
    value, inside, out = map(np.asarray, judged(cyclic))
    assert 20 < inside.sum() < 180
    assert (np.abs(value[inside]) < 1e-5).all()
    assert (value[~inside] > 0).all()
    assert (out.any(axis=(1, 2)) == ~inside).all()


def test_acyclicity_by_hand():
    ring = np.zeros((3, 3), np.float32)
    ring[0, 1] = ring[1, 2] = ring[2, 0] = 0.8
    a = 0.8**2
    # (1 + a P / 3)^4 has the third power of the permutation P four times
    np.testing.assert_allclose(penalties.squarings(ring), 3 * 4 * (a / 3) ** 3, rtol=1e-5)
    np.testing.assert_allclose(penalties.log_det(ring), -np.log(1 - a**3), rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 9])
def test_the_slope_of_acyclicity_is_that_of_its_power(size):
    w = np.random.default_rng(size).uniform(-0.8, 0.8, (size, size)).astype(np.float32)
    power = lambda w: jnp.trace(penalties._power(jnp.square(w) / size, penalties._doublings(size)))
    found, expected = (jax.value_and_grad(fn)(w) for fn in (penalties.squarings, power))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    found, expected = (jax.hessian(fn)(w) for fn in (penalties.squarings, power))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_log_det_is_infinite_out_of_its_region_with_finite_gradients_inside():
    ring = np.zeros((3, 3), np.float32)
    ring[0, 1] = ring[1, 2] = ring[2, 0] = 1.1
    assert penalties.log_det(ring) == jnp.inf
    assert np.isfinite(jax.grad(penalties.log_det)(0.8 * ring)).all()
