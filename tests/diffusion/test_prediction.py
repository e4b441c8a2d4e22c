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


@pytest.mark.parametrize(("noise", "speed", "message"), [
    ([1.0, 1.1, 1.2], [1.1, 1.2, 1.3], "1.1 of the noise and 1.2 of the velocity left unexplained"),  # explains nothing
    ([0.5, 0.7, 0.6], [0.7, 0.5, 0.7], "must be clear from its losses"),
    ([0.1], [0.9], "at least 2"),
])  # fmt: skip
def test_what_is_not_clear_is_refused(noise, speed, message):
    with pytest.raises(ValueError, match=message):
        prediction.decide(prediction.Losses(jnp.array(noise), jnp.array(speed)))
