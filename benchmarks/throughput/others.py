"""Rows of similarities with their groups, and of SPOT."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.throughput.cases import COMPILED, PLAIN, PUBLIC, Case
from benchmarks.torch_baselines import causal, groups
from dmsec_jax.causal import mag, penalties
from dmsec_jax.metrics import cliques, clusters

ROWS = 1000
"""Of the data of SPOT's rows."""
RHO, ALPHA, PENALTY = 1.0, 0.5, 0.05


def similarities(count: int, width: int = 512) -> Case:
    """Features of near-duplicates around `count / 8` pictures: all similarities, and a partition into cliques."""
    rng, threshold = np.random.default_rng(0), 0.5
    centres = rng.standard_normal((count // 8, width))
    features = np.repeat(centres, 8, axis=0) + 0.6 * rng.standard_normal((count, width))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)

    def ours():
        similarity = clusters.similarity_matrix(features)
        return similarity, cliques.partition(similarity, threshold)

    def named(out):
        similarity, found = out
        return {"similarity": similarity, "sizes": np.array([len(group) for group in found.groups], np.float32)}

    return Case(
        op="similarities-and-groups",
        shape=f"{count} pictures",
        batch=count,
        host=ours,
        named=named,
        flops=2.0 * count**2 * width,
        peers={PUBLIC: lambda: groups.public(features, threshold), PLAIN: lambda: groups.best(features, threshold)},
    )


def lagrangian(size: int, starts: int) -> Case:
    """Value and gradient of SPOT's augmented Lagrangian at several starts and held pseudo-variables: what an optimiser does in every step."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((ROWS, size)) @ (np.eye(size) + np.triu(0.3 * rng.standard_normal((size, size)), 1))
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
        shape=f"{size} variables",
        batch=starts,
        fn=run,
        args=(jnp.asarray(directed), jnp.asarray(lower), held, jnp.asarray(covariance)),
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


def every(batches: tuple[int, ...]) -> Iterator[tuple[str, str, int, Callable[[], Case]]]:
    """(op, shape, batch, builder) of these rows."""
    yield "similarities-and-groups", "128 pictures", 128, functools.partial(similarities, 128)
    for size in (20, 50):
        yield "spot-objective", f"{size} variables", 16, functools.partial(lagrangian, size, 16)
