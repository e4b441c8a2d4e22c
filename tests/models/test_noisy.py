"""Noise of weights in the outputs of Dense layers: its moments are those of weights that are drawn."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.models import noisy

DRAWS = 4000


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="last")(nn.LayerNorm(name="norm")(Inner(name="inner")(x)))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="first")(x)


RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)
LAST = nn.Dense(2)
PARAMS = Network().init(jax.random.key(0), X)["params"]
SIGMA = {"last": {"kernel": jnp.asarray(RNG.uniform(0.1, 1, (4, 2)), jnp.float32), "bias": jnp.array([0.5, 0.0])}}
KEY = jax.random.key(1)


def output(sigma, key, params=PARAMS):
    return noisy.with_noise(lambda: Network().apply({"params": params}, X), sigma, key)


def test_moments_are_those_of_drawn_weights():
    keys = jax.random.split(KEY, DRAWS)
    found = jax.jit(jax.vmap(lambda key: output(SIGMA, key)))(keys)
    hidden = Network().apply({"params": PARAMS}, X, capture_intermediates=True)[1]["intermediates"]["norm"]["__call__"][
        0
    ]
    deviation = np.sqrt(np.square(hidden) @ np.square(SIGMA["last"]["kernel"]) + np.square(SIGMA["last"]["bias"]))
    mean = Network().apply({"params": PARAMS}, X)
    assert (np.abs(found.mean(0) - mean) < 5 * deviation / np.sqrt(DRAWS)).all()
    np.testing.assert_allclose(found.std(0), deviation, rtol=5 / np.sqrt(2 * DRAWS))
    rows = np.corrcoef(found[:, :, 0].T)
    assert np.abs(rows[~np.eye(3, dtype=bool)]).max() < 5 / np.sqrt(DRAWS), "rows must draw noise of their own"


def test_no_deviation_is_the_same_bit_for_bit_and_has_a_gradient():
    zero = jax.tree.map(jnp.zeros_like, SIGMA)
    np.testing.assert_array_equal(output(zero, KEY), Network().apply({"params": PARAMS}, X))
    gradient = jax.grad(lambda sigma: output(sigma, KEY).sum())(zero)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    some = jax.grad(lambda sigma: output(sigma, KEY).sum())(SIGMA)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(some))


@pytest.mark.parametrize(
    "sigma", [{"norm": {"scale": jnp.ones(4)}}, {"inner": {"second": {"kernel": jnp.ones((5, 4))}}}]
)
def test_what_is_no_dense_layer_is_refused(sigma):
    with pytest.raises(
        ValueError, match="selection must be made of Dense layers for noise of activations, got (norm|inner)/"
    ):
        output(sigma, KEY)
