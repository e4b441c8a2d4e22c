"""How a model answers at its training pictures: the one-shot theory's width, and how far it moved from the model it came from.

One-shot theory (Wu et al., "Exploring Diffusion Models' Corruption Stage in Few-Shot Fine-tuning and Mitigating with Bayesian Neural Networks",
2024, section 3): a model tuned on the picture x' behaves like the denoiser of N(x', s1^2 I). With a = alpha_bar_t

    x0_hat(x_t) = x' + g (x_t - sqrt(a) x'),     g = sqrt(a) s1^2 / (a s1^2 + 1 - a)

so a model asked at x_t = k x' shows g as the slope over k. While s1 is still large, what x_t has in noise comes through (corruption); as s1
falls to zero every x_t is answered with x' (a copy).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmsec_jax.core.types import Latent, ModelFn, PerExample
from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars, to_eps, to_x0

SPREAD = 0.5
"""The model is asked at k = (1 - SPREAD) sqrt(a) and (1 + SPREAD) sqrt(a)."""
CEILING = 0.999
"""Largest share of its limit 1 / sqrt(a), where s1 is infinite, that a slope counts with."""


def slope_of(width: Float[Array, "..."] | float, alpha_bar: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """g of a width s1."""
    square = jnp.square(width)
    return jnp.sqrt(alpha_bar) * square / (alpha_bar * square + 1 - alpha_bar)


def width_of(slope: Float[Array, "..."], alpha_bar: Float[Array, "..."]) -> Float[Array, "..."]:
    """s1 of a slope g, its inverse; slopes below 0 count as 0, those near or beyond 1 / sqrt(a) as `CEILING` of it."""
    bounded = jnp.clip(slope * jnp.sqrt(alpha_bar), 0.0, CEILING)  # g sqrt(a), in [0, 1)
    return jnp.sqrt((1 - alpha_bar) / alpha_bar * bounded / (1 - bounded))


def widths(model_fn: ModelFn, pictures: Latent, t: Int[Array, "M"], schedule: ScheduleConfig) -> Float[Array, "M B"]:
    """s1(t) of a model at each of its training pictures: two evaluations for each.

    Args:
        model_fn: the model with the pictures' context bound, which takes batches of 2 B.
        pictures: scaled latents x'.
        t: indices into the schedule.
    """
    alpha_bar, size = alpha_bars(schedule), pictures.shape[0]
    energy = jnp.square(pictures).sum((1, 2, 3))

    def at(t: Int[Array, ""]) -> PerExample:
        a = alpha_bar[t]
        asked = jnp.sqrt(a) * jnp.concatenate([(1 + SPREAD) * pictures, (1 - SPREAD) * pictures])
        steps = jnp.broadcast_to(t, (2 * size,))
        clean = to_x0(alpha_bar, model_fn(asked, steps), asked, steps, schedule.prediction_type)
        rise = ((clean[:size] - clean[size:]) * pictures).sum((1, 2, 3))
        return width_of(rise / (2 * SPREAD * jnp.sqrt(a) * energy), a)

    return jax.lax.map(at, t)


def drift(
    model_fn: ModelFn, base_fn: ModelFn, latents: Latent, noise: Latent, t: Int[Array, "M"], schedule: ScheduleConfig
) -> Float[Array, ""]:
    """Mean squared difference between the noise that two models see in the same noisy latents, averaged over t: 0 for one model, about 2 for
    models that have nothing in common.

    Args:
        latents: [B, h, w, c], for example pictures of the base model: what should not be forgotten.
        noise: standard normal, like `latents`.
    """
    alpha_bar = alpha_bars(schedule)

    def at(t: Int[Array, ""]) -> Float[Array, ""]:
        steps = jnp.broadcast_to(t, latents.shape[:1])
        z_t = add_noise(alpha_bar, latents, noise, steps)
        seen: Callable = lambda fn: to_eps(alpha_bar, fn(z_t, steps), z_t, steps, schedule.prediction_type)
        return jnp.square(seen(model_fn) - seen(base_fn)).mean()

    return jax.lax.map(at, t).mean()
