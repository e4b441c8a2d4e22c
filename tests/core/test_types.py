import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError, jaxtyped
from typecheck import checked

from dmsec_jax.core import trees, types
from dmsec_jax.core.config import config


@jaxtyped(typechecker=checked)
def scale(latent: types.Latent, t: types.Timestep, factor: float = 1.0) -> types.Latent:
    return latent * factor * t[:, None, None, None]


LATENT, T = np.ones((2, 4, 4, 1), np.float32), np.ones(2, np.int32)


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_arrays_of_numpy_and_jax_pass(place):
    assert scale(place(LATENT), place(T), 2).shape == (2, 4, 4, 1)


@pytest.mark.parametrize(
    ("latent", "t"), [(LATENT[0], T), (LATENT.astype(int), T), (LATENT, T[:1]), (LATENT, T.astype(float))]
)
def test_wrong_ranks_dtypes_and_batch_sizes_are_caught(latent, t):
    with pytest.raises(TypeCheckError):
        scale(latent, t)
    with pytest.raises(TypeCheckError):
        jax.jit(scale)(latent, t)


def test_a_float_may_be_traced():
    np.testing.assert_array_equal(jax.jit(scale)(LATENT, T, 3.0), 3 * LATENT)
    with pytest.raises(TypeCheckError):
        scale(LATENT, T, "3")


def test_the_package_is_checked_while_tests_run():
    with pytest.raises(TypeCheckError, match="count"):
        trees.count("no tree")


def test_configs_may_hold_what_jax_puts_into_them():
    @jaxtyped(typechecker=checked)
    @config
    class Config:
        radius: float = 0.5

    assert jax.tree.map(lambda _: None, Config()).radius is None
    assert jax.jit(lambda cfg: Config(radius=cfg.radius * 2))(Config()).radius == 1.0
