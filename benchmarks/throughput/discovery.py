"""Rows of SPOT: the posterior, an evaluation of the search's objective, and its steps."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.throughput.cases import COMPILED, PLAIN, PUBLIC, Case
from benchmarks.torch_baselines import causal
from benchmarks.torch_baselines import posterior as torch_posterior
from dmsec_jax import discovery
from dmsec_jax.causal import features, guide, mag, penalties, skeleton
from dmsec_jax.checkpoints import skeleton as folders
from dmsec_jax.methods import spot

ROWS = 1000
"""Of the data."""
RHO, ALPHA, PENALTY = 1.0, 0.5, 0.05
STEPS = 50
"""Of Adam in one call, with new pseudo-variables after each half."""


def _data(size: int, seed: int = 0) -> np.ndarray:
    """[ROWS, size] of a linear model in which every variable before another may cause it."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((ROWS, size)) @ (np.eye(size) + np.triu(0.3 * rng.standard_normal((size, size)), 1))


@functools.cache
def _shipped() -> folders.Posterior:
    return folders.read(discovery.SHIPPED, features.COUNT)


def posterior(size: int, data_sets: int) -> Case:
    """Edge probabilities of several data sets in one call."""
    params, net, _ = _shipped()
    corr = np.stack([features.correlation(_data(size, seed)) for seed in range(data_sets)])

    def run(params, corr):
        return jax.vmap(lambda one: skeleton.edge_probabilities(params, net, one, float(ROWS)))(corr)

    build = lambda how: torch_posterior.probabilities(corr, float(ROWS), params, how=how)
    return Case(
        op="spot-posterior",
        shape=f"{size}-variables",
        batch=data_sets,
        fn=run,
        args=(params, jnp.asarray(corr)),
        rows=(1,),
        named=lambda out: {"probability": np.asarray(out)},
        peers={PLAIN: lambda: build("plain"), COMPILED: lambda: build("compiled")},
    )


def lagrangian(size: int, starts: int) -> Case:
    """Value and gradient of SPOT's augmented Lagrangian at several starts and held pseudo-variables: what an optimiser does in every step."""
    rng, data = np.random.default_rng(1), _data(size)
    covariance = (data.T @ data / ROWS).astype(np.float32)
    off = 1 - np.eye(size)
    directed = (0.03 * rng.uniform(-1, 1, (starts, size, size)) * off).astype(np.float32)
    lower = np.tril(0.01 * rng.uniform(-1, 1, (starts, size, size)), -1).astype(np.float32)
    bidirected = lower + lower.swapaxes(1, 2)

    def total(theta, at, covariance):
        directed, bidirected = theta[0], theta[1] + theta[1].T
        h = penalties.squarings(directed) + penalties.ancestral(directed, bidirected)
        count = sum(mag.l0(part, ROWS).sum() for part in theta)
        return mag.least_squares(directed, bidirected, covariance, at) + PENALTY * count + RHO / 2 * h**2 + ALPHA * h

    def one(directed, lower, at, covariance):
        return jax.value_and_grad(total)((directed, lower), at, covariance)

    def run(directed, lower, at, covariance):
        return jax.vmap(one, in_axes=(0, 0, 0, None))(directed, lower, at, covariance)

    held = jax.jit(jax.vmap(mag.pseudo, in_axes=(0, 0, None)))(directed, bidirected, covariance)

    size_of = {"rho": RHO, "alpha": ALPHA, "penalty": PENALTY}
    modern = lambda how: causal.covariance_form(covariance, ROWS, directed, bidirected, how=how, **size_of)
    return Case(
        op="spot-objective",
        shape=f"{size}-variables",
        batch=starts,
        fn=run,
        args=(jnp.asarray(directed), jnp.asarray(lower), held, jnp.asarray(covariance)),
        rows=(0, 1, 2),
        named=lambda out: {
            "value": np.asarray(out[0]),
            "directed": np.asarray(out[1][0]) * off,  # |w| has no slope at 0, where the diagonal stays
            "bidirected": np.tril(np.asarray(out[1][1]), -1),
        },
        peers={
            PUBLIC: lambda: causal.published(data, directed, bidirected, **size_of),
            PLAIN: lambda: modern("plain"),
            COMPILED: lambda: modern("compiled"),
        },
    )


def steps(size: int, starts: int) -> Case:
    """Adam on that objective, guided by the posterior: a part of one step of the search, from several starts at once; times are per step of Adam."""
    data = _data(size)
    covariance = np.corrcoef(data, rowvar=False).astype(np.float32)
    cfg = spot.Config(inner_steps=STEPS, refresh=STEPS // 2, penalty=PENALTY, rho=RHO)
    guidance = spot.guide_mag(discovery.linked(*_shipped()[:2], covariance, float(ROWS)))
    keys = jax.random.split(jax.random.key(0), starts)
    state = jax.vmap(lambda key: spot.init(key, covariance, guidance, cfg))(keys)
    state = state._replace(alpha=jnp.full(starts, ALPHA))

    def run(keys, state, covariance, guidance, cfg):
        one = lambda key, state: spot.step(key, state, covariance, float(ROWS), guidance, cfg)[0]
        found = jax.vmap(one)(keys, state)
        return found.directed, jnp.tril(found.bidirected)

    allowed = np.asarray(guidance.directed & (guidance.probability > cfg.exclude), np.float32)
    search = causal.Search(
        (data - data.mean(axis=0)) / data.std(axis=0),
        covariance,
        *map(np.asarray, (state.directed, state.bidirected)),
        masks=(allowed, np.tril(allowed)),
        penalty=np.asarray(PENALTY * guide.log_odds_weights(guidance.probability)),
        rho=RHO,
        alpha=ALPHA,
        rate=float(cfg.learning_rate),
        steps=STEPS,
        refresh=cfg.refresh,
    )
    return Case(
        op="spot-step",
        shape=f"{size}-variables",
        batch=starts,
        steps=STEPS,
        fn=run,
        args=(keys, state, jnp.asarray(covariance), guidance, cfg),
        rows=(0, 1),
        named=lambda out: {"directed": np.asarray(out[0]), "bidirected": np.asarray(out[1])},
        loose={"directed": 2e-2, "bidirected": 5e-2},  # Adam's steps near a minimum turn on signs
        peers={
            PUBLIC: lambda: causal.published_descent(search),
            PLAIN: lambda: causal.descent(search, how="plain"),
            COMPILED: lambda: causal.descent(search, how="compiled"),
        },
    )


def every(batches: tuple[int, ...]) -> Iterator[tuple[str, str, int, Callable[[], Case]]]:
    """(op, shape, batch, builder) of these rows; the batch is the number of data sets, or of starts."""
    for size, data_sets in ((30, 16), (100, 1)):
        yield "spot-posterior", f"{size}-variables", data_sets, functools.partial(posterior, size, data_sets)
    for op, make, starts in (("spot-objective", lagrangian, 16), ("spot-step", steps, 4)):
        for size in (20, 50):
            yield op, f"{size}-variables", starts, functools.partial(make, size, starts)
