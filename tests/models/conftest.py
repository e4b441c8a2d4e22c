"""Parameters for tests of networks: no leaf at a special value, and nothing compiled to get them."""

import math

import jax
import numpy as np
import pytest

from dmsec_jax.core import trees


@pytest.fixture(scope="session")
def weights():
    """`weights(init, cfg, seed=0)`: a tree with the shapes of `init(key, cfg)`."""

    def draw(init, cfg, seed=0):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(lambda key: init(key, cfg), jax.random.key(0))
        return trees.map_paths(lambda path, leaf: random_leaf(rng, path, leaf.shape), shapes)

    return draw


def random_leaf(rng, path, shape):
    values = rng.standard_normal(shape)
    if path.endswith("kernel"):
        values *= math.prod(shape[:-1]) ** -0.5
    elif path.endswith("scale"):
        values = 1 + 0.2 * values
    elif path.endswith("bias"):
        values *= 0.2
    return np.asarray(values, np.float32)
