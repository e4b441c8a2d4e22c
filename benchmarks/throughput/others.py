"""The row of similarities with their groups."""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.throughput.cases import PLAIN, PUBLIC, Case
from benchmarks.torch_baselines import groups
from dmsec_jax.metrics import cliques, clusters


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
        shape="512-features",
        batch=count,
        host=ours,
        named=named,
        flops=2.0 * count**2 * width,
        peers={PUBLIC: lambda: groups.public(features, threshold), PLAIN: lambda: groups.best(features, threshold)},
    )


def every(batches: tuple[int, ...]) -> Iterator[tuple[str, str, int, Callable[[], Case]]]:
    """(op, shape, batch, builder) of these rows; the batch is the number of pictures."""
    yield "similarities-and-groups", "512-features", 128, functools.partial(similarities, 128)
