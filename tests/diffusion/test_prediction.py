"""The losses tell noise from velocity where every picture is the same known one, so that both can be predicted exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion import prediction
from dmsec_jax.diffusion.schedule import ScheduleConfig, alpha_bars, levels

CFG = ScheduleConfig()


def exact(kind, z0, z_t, t):
    alpha, sigma = levels(alpha_bars(CFG), t, z_t)
    noise = (z_t - alpha * z0) / sigma
    return noise if kind == "epsilon" else alpha * noise - sigma * z0


@functools.partial(jax.jit, static_argnums=1)
def losses(z0, kind):
    return prediction.losses(jax.random.key(1), functools.partial(exact, kind, z0), z0, CFG)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_right_one_has_no_loss(kind):
    z0 = np.random.default_rng(0).normal(size=(4, 8, 8, 4)).astype(np.float32)
    found = losses(z0, kind)._asdict()
    assert found[kind].shape == (4,)
    np.testing.assert_allclose(found[kind], 0, atol=1e-6)
    assert prediction.decide(losses(z0, kind)) == kind


def test_a_network_that_predicts_neither_is_refused():
    found = prediction.Losses(jnp.ones(3), jnp.full(3, 1.1))
    with pytest.raises(ValueError, match="1 as noise and 1.1 as velocity"):
        prediction.decide(found)
