"""The score against the published loop over variables, and fits against what maximises the likelihood."""

import jax
import jax.numpy as jnp
import mixed_graphs
import numpy as np
import pytest

from dmsec_jax.causal import graphs, mag
from dmsec_jax.metrics import graph as metrics

REFIT = jax.jit(mag.refit)


def model(seed, size, edges=0.5):
    """(directed, bidirected, noise) of float64 coefficients, omega positive definite."""
    rng = np.random.default_rng(seed)
    directed, bidirected = (part[0] for part in mixed_graphs.random_admgs(seed, 1, size, edges, 0.4))
    bidirected &= ~(directed | directed.T)
    shared = np.triu(rng.uniform(0.2, 0.5, (size, size)) * bidirected, 1)
    shared += shared.T
    return rng.uniform(0.4, 1.2, (size, size)) * directed, shared, rng.uniform(0.5, 1, size) + shared.sum(axis=1)


def sigma_of(directed, bidirected, noise):
    total = np.linalg.inv(np.eye(len(noise)) - directed)
    return total.T @ (bidirected + np.diag(noise)) @ total


def by_loop(data, new, old):
    """1 / (2 n) sum_i |X_i - X W_i - Z^(i) C_i|^2 as it is published: pseudo-variables of one variable after the other."""
    (directed, bidirected), (old_directed, old_bidirected, old_noise) = new, old
    errors = data - data @ old_directed
    omega = old_bidirected + np.diag(old_noise)
    total = 0.0
    for i in range(data.shape[1]):
        others = [j for j in range(data.shape[1]) if j != i]
        pseudo = errors[:, others] @ np.linalg.inv(omega[np.ix_(others, others)])
        left = data[:, i] - data @ directed[:, i] - pseudo @ bidirected[others, i]
        total += (left**2).sum()
    return total / (2 * len(data))


def test_covariance_form_is_the_loop_form():
    rng = np.random.default_rng(0)
    old = model(1, 9)
    noise = np.zeros(9)
    data = rng.normal(size=(200, 9)) @ np.linalg.cholesky(sigma_of(*old)).T
    directed = rng.normal(size=(9, 9)) * (1 - np.eye(9))
    bidirected = rng.normal(size=(9, 9))
    bidirected = np.triu(bidirected, 1) + np.triu(bidirected, 1).T
    with jax.enable_x64(True):
        covariance = jnp.asarray(data.T @ data / 200)
        at = mag.pseudo(jnp.asarray(old[0]), jnp.asarray(old[1]), covariance)
        found = float(mag.least_squares(jnp.asarray(directed), jnp.asarray(bidirected), covariance, at))
        noise = np.diagonal(np.linalg.inv(np.asarray(at.precision)))
    expected = by_loop(data, (directed, bidirected), (old[0], old[1], noise))
    assert found == pytest.approx(expected, rel=1e-6)
    residuals = ((data - data @ old[0]) ** 2).mean(axis=0)
    assert noise == pytest.approx(np.maximum(residuals, 1.01 * np.abs(old[1]).sum(axis=1)))


def test_gradients_are_those_of_finite_differences():
    directed, bidirected, noise = model(2, 5)
    covariance = sigma_of(directed, bidirected, noise)
    with jax.enable_x64(True):
        at = mag.pseudo(*map(jnp.asarray, (directed * 0.9, bidirected, covariance)))
        score = jax.jit(lambda w: mag.least_squares(w, jnp.asarray(bidirected), jnp.asarray(covariance), at))
        gradient = np.asarray(jax.grad(score)(jnp.asarray(directed)))
        for i, j in ((0, 1), (3, 2), (4, 0)):
            nudge = np.zeros((5, 5))
            nudge[i, j] = 1e-5
            slope = (score(jnp.asarray(directed + nudge)) - score(jnp.asarray(directed - nudge))) / 2e-5
            assert gradient[i, j] == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def test_score_without_pseudo_variables_raised_is_half_the_residual_variance_at_the_truth():
    directed, bidirected, noise = model(3, 6)
    covariance = sigma_of(directed, bidirected, noise)
    one = lambda x: jnp.asarray(x, jnp.float32)
    at = mag.pseudo(one(directed), one(bidirected), one(covariance))
    omega = bidirected + np.diag(noise)
    # a variable's error given all other errors has variance 1 / K_ii
    expected = (1 / np.diagonal(np.linalg.inv(omega))).sum() / 2
    found = mag.least_squares(one(directed), one(bidirected), one(covariance), at)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_an_exact_covariance_is_fitted_exactly():
    for seed in range(4):
        directed, bidirected, noise = model(seed, 6)
        covariance = sigma_of(directed, bidirected, noise)
        if not jax.jit(graphs.is_ancestral)(directed, bidirected):
            bidirected = np.zeros_like(bidirected)
            covariance = sigma_of(directed, bidirected, noise)
        fit = REFIT(directed, bidirected, covariance.astype(np.float32), 1000)
        np.testing.assert_allclose(fit.directed, directed, atol=5e-3)
        np.testing.assert_allclose(fit.omega, bidirected + np.diag(noise), atol=2e-2)


def test_the_fit_is_a_maximum_of_the_likelihood_with_its_bic():
    rng = np.random.default_rng(5)
    directed, bidirected, noise = model(5, 6)
    data = rng.normal(size=(80, 6)) @ np.linalg.cholesky(sigma_of(directed, bidirected, noise)).T
    covariance = data.T @ data / 80
    fit = jax.tree.map(np.asarray, REFIT(directed, bidirected, covariance.astype(np.float32), 80))
    assert ((fit.directed != 0) == (directed != 0)).all()
    off = fit.omega * (1 - np.eye(6))
    assert ((off != 0) == (bidirected != 0)).all()
    noise = np.diagonal(fit.omega)
    edges = int((directed != 0).sum() + (bidirected != 0).sum() // 2)
    best = metrics.bic(sigma_of(fit.directed, off, noise), covariance, 80, edges)
    np.testing.assert_allclose(fit.bic, best, rtol=1e-4)
    for _ in range(40):  # no direction leads up
        w = fit.directed + 0.02 * rng.normal(size=(6, 6)) * (directed != 0)
        c = np.triu(off + 0.02 * rng.normal(size=(6, 6)) * (bidirected != 0), 1)
        other = sigma_of(w, c + c.T, noise * np.exp(0.02 * rng.normal(size=6)))
        assert metrics.bic(other, covariance, 80, edges) > best


def test_smooth_count_by_hand():
    np.testing.assert_allclose(
        mag.l0(jnp.array([0.0, 0.5, -0.5]), 100), [0, *[np.tanh(np.log(100) / 4)] * 2], rtol=1e-6
    )
