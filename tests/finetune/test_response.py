"""The one-shot theory on worlds where it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dmsec_jax.diffusion.schedule import ScheduleConfig, alpha_bars
from dmsec_jax.finetune import response

SCHEDULE = ScheduleConfig()
EPS_FN = toy.eps_fn_of(alpha_bars(SCHEDULE))
T = jnp.array([100, 500])


def model(params):
    return lambda z_t, t: EPS_FN(params, z_t, t, toy.empty_context(len(z_t)))


widths = jax.jit(lambda params, pictures: response.widths(model(params), pictures, T, SCHEDULE))


def points(count):
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, 4, 4, 2)), jnp.float32)


@pytest.mark.parametrize("width", [0.05, 0.3, 1.0])
def test_the_width_of_a_gaussian_is_found_at_every_t(width):
    found = widths(toy.gaussian(points(1)[0], width), points(1))
    np.testing.assert_allclose(found, np.full((2, 1), width), rtol=1e-2)


def test_a_slope_and_its_width_are_inverse_and_bounded():
    alpha_bar = alpha_bars(SCHEDULE)[jnp.array([50, 300, 999])]
    for width in (0.0, 0.1, 1.0):
        np.testing.assert_allclose(response.width_of(response.slope_of(width, alpha_bar), alpha_bar), width, rtol=1e-3)
    assert (response.width_of(jnp.full(3, -1.0), alpha_bar) == 0).all()
    assert jnp.isfinite(response.width_of(jnp.full(3, 1e3), alpha_bar)).all()


def test_a_model_that_knows_its_pictures_by_heart_is_narrow():
    """It answers inputs near a picture with that picture; amid much noise it hesitates between its pictures, which widens it."""
    pictures = points(3)
    narrow, broad = widths(toy.memoriser(pictures), pictures), widths(toy.gaussian(0 * pictures[0], 1.0), pictures)
    np.testing.assert_allclose(narrow[0], 0.01, rtol=1e-2)
    assert (narrow < 0.3).all()
    np.testing.assert_allclose(broad, 1.0, rtol=1e-2)


def test_drift_is_zero_for_the_same_model_and_the_squared_difference_for_others():
    z = points(2)
    base, other = (lambda z_t, t: 0.5 * z_t), (lambda z_t, t: 0.5 * z_t + 0.3)
    noise = jnp.flip(z, 0)
    assert response.drift(base, base, z, noise, T, SCHEDULE) == 0
    np.testing.assert_allclose(response.drift(other, base, z, noise, T, SCHEDULE), 0.09, rtol=1e-4)
