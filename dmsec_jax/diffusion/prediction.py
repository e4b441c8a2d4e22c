"""What does a network predict, noise or velocity? Weights do not say; its losses on pictures do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import Key, Latent, ModelFn
from dmsec_jax.diffusion.draws import example_noise
from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars, velocity

TIMES = (0.3, 0.5, 0.7)
"""Shares of the schedule at which both are compared: noise and velocity are far apart there."""
EXPLAINED = 0.1
"""Share of its target that a network that predicts it explains at least; one that predicts neither explains nothing."""
DEVIATIONS = 3.0
"""The difference must be this many of its standard errors over the pictures."""


class Losses(NamedTuple):
    """Mean squared error of the network's output as a share of the target's mean square, per picture, taken as noise and as velocity."""

    epsilon: Float[Array, "B"]
    v_prediction: Float[Array, "B"]


def losses(key: Key, model_fn: ModelFn, z0: Latent, cfg: ScheduleConfig) -> Losses:
    """Both losses of scaled latents [B, h, w, c], averaged over `TIMES`; picture j has noise of its own key."""
    alpha_bar = alpha_bars(cfg)
    noise = example_noise(key, jnp.arange(z0.shape[0]), z0.shape[1:])

    def at(share):
        t = jnp.full(z0.shape[0], int(share * cfg.num_train_timesteps), jnp.int32)
        found = model_fn(add_noise(alpha_bar, z0, noise, t), t)
        size = lambda x: jnp.square(x).mean((1, 2, 3))
        error = lambda target: size(found - target) / size(target)
        return Losses(error(noise), error(velocity(alpha_bar, z0, noise, t)))

    return jax.tree.map(lambda *parts: jnp.stack(parts).mean(0), *map(at, TIMES))


def decide(found: Losses) -> str:
    """ "epsilon" or "v_prediction", whichever has clearly the smaller loss.

    Raises:
        ValueError: if neither has, or there are fewer than two pictures.
    """
    noise, speed = (np.asarray(part, np.float64) for part in found)
    require(
        len(noise) >= 2, "pictures", "at least 2 to judge the prediction type by", len(noise), "give more, or say it"
    )
    difference = noise - speed
    error = difference.std(ddof=1) / len(difference) ** 0.5
    clear = abs(difference.mean()) > DEVIATIONS * error and min(noise.mean(), speed.mean()) < 1 - EXPLAINED
    got = f"{noise.mean():.3g} of the noise and {speed.mean():.3g} of the velocity left unexplained"
    cure = "pass the prediction type, as its author says"
    require(bool(clear), "what the network predicts", "clear from its losses", got, cure)
    return "epsilon" if difference.mean() < 0 else "v_prediction"
