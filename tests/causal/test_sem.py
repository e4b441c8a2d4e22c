"""The one model in its four uses: simulating, conditioning, knowing, inferring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from stats import assert_mean

from dmsec_jax.causal import families, graphs, projection, rows, sem
from dmsec_jax.core.marks import ARROW, NONE, TAIL

SIZE, COUNT = 8, 200
KEYS = jax.random.split(jax.random.key(0), COUNT)


@functools.cache
def structures(prior, knowledge=None):
    """COUNT draws of the structure."""
    known = (
        sem.Knowledge(*(np.array(part, kind) for part, kind in zip(knowledge, (bool, bool, np.float32), strict=True)))
        if knowledge
        else None
    )
    draw = lambda key: handlers.seed(sem.structure, key)(SIZE, prior, known)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(KEYS))


def fixed_by(sites, size, prior):
    """The model whose coefficients these sites fix; the others do not matter."""
    model = handlers.seed(handlers.condition(lambda: sem.structure(size, prior), data=sites), jax.random.key(0))
    return jax.jit(lambda: model())()


SLOW = pytest.mark.slow  # each prior is a compilation


@pytest.mark.parametrize(
    "prior",
    [sem.SPOT, pytest.param(sem.BROAD, marks=SLOW), pytest.param(sem.HIDDEN, marks=SLOW)],
    ids=["spot", "broad", "hidden"],
)
def test_draws_are_models_of_their_marks(prior):
    draws = structures(prior)
    total = SIZE + sem.num_hidden(SIZE, prior)
    assert draws.weights.shape == (COUNT, total, total)
    directed = draws.weights != 0
    off = ~np.eye(total, dtype=bool)
    bidirected = (draws.omega != 0) & off
    assert np.asarray(jax.jit(jax.vmap(graphs.is_bow_free))(directed, bidirected)).all()
    assert (np.linalg.eigvalsh(draws.omega) > 0).all()

    def project(d, b):
        shown, shared = graphs.latent_projection(d, SIZE)
        return projection.maximal_ancestral(shown, shared | b[:SIZE, :SIZE])

    assert (np.asarray(jax.jit(jax.vmap(project))(directed, bidirected)) == draws.marks).all()
    low, high = prior.weight
    sizes = np.abs(draws.weights[directed])
    assert low <= sizes.min() * 1.0001
    assert sizes.max() <= high * 1.0001
    assert 0.4 < (draws.weights[directed] > 0).mean() < 0.6
    assert bidirected.any() == (prior.confounding == "converted")
    assert ((draws.marks == ARROW) & (draws.marks.transpose(0, 2, 1) == ARROW)).any()


def test_spot_draws_the_papers_numbers():
    draws = structures(sem.SPOT)
    bidirected = np.triu(draws.omega != 0, 1).sum(axis=(1, 2))
    edges = (draws.weights != 0).sum(axis=(1, 2)) + bidirected
    assert_mean(edges / SIZE, 1.35, resolution=0.15)
    assert_mean(bidirected - 0.125 * edges, 0.0, resolution=0.6)
    noise = (
        np.diagonal(draws.omega, axis1=1, axis2=2)
        - np.abs(draws.omega).sum(axis=2)
        + np.diagonal(draws.omega, axis1=1, axis2=2)
    )
    assert np.ptp(noise, axis=1).max() < 1e-5  # one draw for all vertices
    assert_mean(noise[:, 0], 0.95, resolution=0.06)


@pytest.mark.parametrize("family", ["er", "scale-free", "sbm", "small-world"])
def test_families_have_the_edges_asked_for_and_their_own_shape(family):
    size, per_vertex = 40, 1.5
    position = jax.random.uniform(jax.random.key(1), (30, size))
    probability = np.asarray(jax.vmap(lambda x: families.pair_probabilities(family, x, per_vertex))(position))
    assert probability.shape == (30, size * (size - 1) // 2)
    assert (probability >= 0).all()
    assert (probability <= 1).all()
    np.testing.assert_allclose(probability.sum(axis=1), per_vertex * size, rtol=0.03)
    shape = probability.std() / probability.mean()
    low, high = {"er": (0, 1e-5), "scale-free": (0.5, 2), "sbm": (0.8, 2), "small-world": (2.5, 5)}[family]
    assert low <= shape <= high


@pytest.mark.slow  # compiles for long
def test_simulated_covariances_are_wishart():
    """Mean and variance of the elements, at two numbers of rows and one compilation."""
    size = 4
    directed, bidirected = np.zeros((2, size, size), bool)
    directed[0, 1] = directed[1, 2] = bidirected[2, 3] = bidirected[3, 2] = True
    units = {"weight_unit": jnp.full(6, 0.4), "omega_unit": jnp.full(6, 0.4), "noise_unit": jnp.full(size, 0.5)}
    sites = {**sem.graph_sites(directed, bidirected), **units}
    fixed = fixed_by(sites, size, sem.BROAD)
    sigma = np.asarray(sem.covariance(fixed), np.float64)
    traces = []

    @jax.jit
    def draw(keys, num_rows):
        traces.append(1)
        return jax.vmap(lambda key: sem.simulate(key, size, num_rows, sem.BROAD, given=sites))(keys)

    for num_rows in (30, 60):
        found = np.asarray(draw(jax.random.split(jax.random.key(2), 2000), num_rows).covariance)
        assert_mean(found, sigma, resolution=0.15 * sigma.max())
        variance = (sigma**2 + np.outer(sigma.diagonal(), sigma.diagonal())) / (num_rows - 1)
        assert_mean((found - sigma) ** 2, variance, resolution=0.35 * variance.max())
    assert len(traces) == 1


@pytest.mark.slow  # compiles for long
def test_a_graph_given_is_the_graph_drawn():
    marks = structures(sem.SPOT).marks[:20]
    directed, bidirected = jax.vmap(graphs.to_edges)(marks)

    def draw(key, d, b):
        return sem.simulate(key, SIZE, 100, sem.SPOT, given=sem.graph_sites(d, b))

    found = jax.jit(jax.vmap(draw))(KEYS[:20], directed, bidirected)
    assert (np.asarray(found.marks) == marks).all()
    assert len(np.unique(np.asarray(found.covariance)[:, 0, 0])) == 20


@pytest.mark.parametrize("prior", [pytest.param(sem.BROAD, marks=SLOW), sem.HIDDEN], ids=["broad", "hidden"])
def test_knowledge_holds_in_every_draw(prior):
    required, forbidden = np.zeros((2, SIZE, SIZE), bool)
    required[5, 0] = required[0, 6] = True
    forbidden[1, 2] = forbidden[2, 1] = forbidden[3, 4] = True
    tier = np.array([0, 0, 0, np.nan, 0, 0, 1, 1.0], np.float32)
    known = (*(tuple(map(tuple, part.tolist())) for part in (required, forbidden)), tuple(tier.tolist()))
    draws = structures(prior, known)
    directed = draws.weights[:, :SIZE, :SIZE] != 0
    assert directed[:, required].all()
    assert not directed[:, forbidden].any()
    assert not directed[:, 6:, [0, 1, 2, 4, 5]].any()
    assert directed[:, 6:, 3].any()  # of no tier: behind all, or before
    assert directed[:, 3, :3].any()
    assert np.asarray(jax.jit(jax.vmap(graphs.is_acyclic))(draws.weights)).all()
    if prior == sem.BROAD:
        assert not (draws.omega[:, 1, 2] != 0).any()
        assert (draws.omega[:, 3, 4] != 0).any()
    assert (draws.marks[:, 5, 0] == ARROW).all()
    assert (draws.marks[:, 0, 5] == TAIL).all()
    assert (draws.marks[:, 7, 1] == NONE).any()


@pytest.mark.parametrize("noise", ["gaussian", "laplace", "uniform", "exponential"])
def test_rows_have_the_covariance_of_the_model_whatever_the_noise(noise):
    size = 3
    sites = {
        **sem.graph_sites(np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]]), np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0]])),
        "weight_unit": jnp.full(3, 0.7),
        "omega_unit": jnp.full(3, 0.5),
        "noise_unit": jnp.full(size, 0.5),
    }
    fixed = fixed_by(sites, size, sem.BROAD)
    draw = jax.jit(lambda key: rows.simulate(key, size, 20_000, sem.BROAD, noise, given=sites))
    found = draw(jax.random.key(4))
    products = np.einsum("ni,nj->nij", found.data, found.data)
    assert_mean(found.data, 0.0, resolution=0.1)
    assert_mean(products, np.asarray(sem.covariance(fixed)), resolution=0.3)


def test_mlp_rows_solve_their_equations_and_are_not_linear():
    size, count = 5, 64
    model = handlers.trace(handlers.seed(rows.model, jax.random.key(3)))
    sites = jax.jit(
        lambda: {k: v["value"] for k, v in model.get_trace(size, count, sem.SPOT, "gaussian", "mlp").items()}
    )()
    drawn = fixed_by(sites, size, sem.SPOT)
    assert (np.asarray(drawn.weights) != 0).any()
    errors = np.asarray(sites["exogenous"]) @ np.linalg.cholesky(np.asarray(drawn.omega, np.float64)).T
    data = np.asarray(sites["data"])
    for j in range(size):
        inner = np.tanh(
            np.einsum("ni,ih->nh", data, np.asarray(sites["in"])[:, j] * np.asarray(drawn.weights)[:, j, None])
        )
        np.testing.assert_allclose(data[:, j], inner @ np.asarray(sites["out"])[j] + errors[:, j], atol=1e-4)


@pytest.mark.slow
def test_nuts_finds_the_coefficients_of_a_fixed_graph():
    size, num_rows = 4, 2000
    directed, bidirected = np.zeros((2, size, size), bool)
    directed[0, 1] = directed[1, 2] = bidirected[2, 3] = bidirected[3, 2] = True
    truth = {"weight_unit": jnp.full(6, -0.8), "omega_unit": jnp.full(6, 0.6), "noise_unit": jnp.full(size, 0.5)}
    sites = {**sem.graph_sites(directed, bidirected), **truth}
    fixed = fixed_by(sites, size, sem.BROAD)
    sigma = np.asarray(sem.covariance(fixed))
    draws = sem.coefficients(jax.random.key(1), sigma, num_rows, directed, bidirected, sem.BROAD)
    weights = np.asarray(draws.weights)
    assert (weights[:, ~directed] == 0).all()
    for i, j in np.argwhere(directed):
        # the likelihood is at its top at the truth, and its width there is that of least squares
        width = np.sqrt(np.asarray(fixed.omega)[j, j] / (num_rows * sigma[i, i]))
        assert abs(weights[:, i, j].mean() - np.asarray(fixed.weights)[i, j]) < 2 * width
        assert 0.6 * width < weights[:, i, j].std() < 1.4 * width
    assert abs(np.asarray(draws.omega)[:, 2, 3].mean() - np.asarray(fixed.omega)[2, 3]) < 0.05
