"""What does a network predict, noise or velocity? Weights do not say; its losses on pictures do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmsec_jax.core.checks import fail
from dmsec_jax.core.types import Key, Latent, ModelFn
from dmsec_jax.diffusion.draws import example_noise
from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars, velocity

TIMES = (0.3, 0.5, 0.7)
"""Shares of the schedule at which both are compared: noise and velocity are far apart there."""
CLEAR = 0.7
"""The smaller loss must be below this share of the other. A network that predicts neither has equal losses."""


class Losses(NamedTuple):
    """Mean squared errors of the network's output, per picture, taken as noise and as velocity."""

    epsilon: Float[Array, "B"]
    v_prediction: Float[Array, "B"]


def losses(key: Key, model_fn: ModelFn, z0: Latent, cfg: ScheduleConfig) -> Losses:
    """Both losses of scaled latents [B, h, w, c], averaged over `TIMES`; picture j has noise of its own key."""
    alpha_bar = alpha_bars(cfg)
    noise = example_noise(key, jnp.arange(z0.shape[0]), z0.shape[1:])

    def at(share):
        t = jnp.full(z0.shape[0], int(share * cfg.num_train_timesteps), jnp.int32)
        found = model_fn(add_noise(alpha_bar, z0, noise, t), t)
        error = lambda target: jnp.square(found - target).mean((1, 2, 3))
        return Losses(error(noise), error(velocity(alpha_bar, z0, noise, t)))

    return jax.tree.map(lambda *parts: jnp.stack(parts).mean(0), *map(at, TIMES))


def decide(found: Losses) -> str:
    """ "epsilon" or "v_prediction", whichever has clearly the smaller mean loss.

    Raises:
        ValueError: if neither has.
    """
    noise, velocity = float(jnp.mean(found.epsilon)), float(jnp.mean(found.v_prediction))
    if min(noise, velocity) < CLEAR * max(noise, velocity):
        return "epsilon" if noise < velocity else "v_prediction"
    got = f"mean squared errors {noise:.3g} as noise and {velocity:.3g} as velocity"
    raise fail(
        "what the network predicts", "clear from its losses", got, "pass the prediction type, as its author says"
    )
