"""Was this picture protected? Two statistics that compare a picture with itself after a little smoothing, for whoever holds the attacked model.

    encoder_response   log |E(x) - E(s(x))| / |x - s(x)|       how far the latent moves for what smoothing takes away
    loss_response      log L_DM(x) / L_DM(s(x))                how much of the denoising loss smoothing takes away

A protection works by small changes that move the latent, or raise the loss, far more than natural detail or random noise of the same size do,
and most of which a smoothing s takes away (compare feature squeezing: Xu, Evans, Qi, NDSS 2018, Sec. IV). Higher means protected. No threshold is
chosen here: take one from pictures of the same kind that are known to be untouched (`metrics.evidence.transferred_threshold`).

Each statistic sees what its half of the attacks does: attacks that lower the loss (AdvDM(-), PhotoGuard) have a low loss response.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmsec_jax.core.checks import require
from dmsec_jax.core.pgd import norm
from dmsec_jax.core.types import AnyArray, Image, Latent

EncodeFn = Callable[[Image], Latent]
"""Pictures -> scaled latents (posterior means)."""


def encoder_response(images: Image, smoothed: Image, *, encode_fn: EncodeFn) -> Float[np.ndarray, "B"]:
    """log |E(x) - E(s(x))| / |x - s(x)|, Euclidean norms per picture; a picture that smoothing leaves as it is has minus infinity."""
    moved = norm(jnp.asarray(encode_fn(images)) - jnp.asarray(encode_fn(smoothed)))
    taken = norm(jnp.asarray(images) - jnp.asarray(smoothed))
    return np.asarray(jnp.where(taken > 0, jnp.log(moved) - jnp.log(taken), -jnp.inf))


def loss_response(loss: Float[AnyArray, "B"], smoothed_loss: Float[AnyArray, "B"]) -> Float[np.ndarray, "B"]:
    """log L(x) / L(s(x)) of losses at the same draws of timestep and noise.

    Raises:
        ValueError: unless all losses are positive.
    """
    loss, smoothed_loss = np.asarray(loss, np.float64), np.asarray(smoothed_loss, np.float64)
    positive = bool((loss > 0).all() and (smoothed_loss > 0).all())
    require(positive, "losses", "positive", "zero, negative or NaN", "measure them on pictures that are finite")
    return np.log(loss / smoothed_loss)
