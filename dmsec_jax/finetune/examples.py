"""The few pictures as arrays: encoded, with their prompts, and the order in which training sees them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import Key, Latent


class Examples(NamedTuple):
    """Encoded pictures with their prompts; `examples` builds and checks them."""

    mean: Latent  # of the autoencoder's posterior of scaled latents
    prompt: Float[Array, "B L D"] | Int[Array, "B L"]  # cached context, or token ids where the text encoder is trained
    logvar: Latent | None = None


class Data(NamedTuple):
    """The pictures to learn, and those of their class that must not be forgotten (None: no prior preservation); `dreambooth.gradients` takes
    the latter alone, too."""

    instance: Examples | None
    prior: Examples | None = None


def examples(
    mean: Float[Array, "..."],
    prompt: Float[Array, "M L D"] | Int[Array, "M L"],
    logvar: Float[Array, "..."] | None = None,
    scaling_factor: float = 1.0,
) -> Examples:
    """Builds `Examples` from the autoencoder's moments; one prompt (M = 1) serves all N pictures.

    Args:
        mean, logvar: [N, h, w, c]; unscaled with the autoencoder's `scaling_factor`, or scaled with 1.

    Raises:
        ValueError: on no pictures, shapes that differ, or a number of prompts that is neither 1 nor N.
    """
    require(mean.ndim == 4 and mean.shape[0] > 0, "mean", "[N, h, w, c] with N > 0", mean.shape, "encode some pictures")
    if logvar is not None:
        same = logvar.shape == mean.shape
        require(same, "logvar", f"{mean.shape} like mean", logvar.shape, "pass both moments of one encoding")
        logvar = logvar + 2 * math.log(scaling_factor)
    count = mean.shape[0]
    cure = "give one prompt, or one per picture"
    require(prompt.shape[0] in (1, count), "prompt", f"[1 or {count}, ...]", prompt.shape, cure)
    return Examples(mean * scaling_factor, jnp.broadcast_to(prompt, (count, *prompt.shape[1:])), logvar)


def take(key: Key, start: Int[Array, ""] | int, size: int, chosen: Examples) -> Examples:
    """Rows `start` to `start + size` of an endless sequence of epochs, each of which holds every example once, in an
    order of its own: epoch e is shuffled by `fold_in(key, e)`.

    Unlike a data loader's, batches cut from it may span two epochs, so all are equally large.
    """
    count = chosen.mean.shape[0]
    first = start // count
    epochs = first + jnp.arange((size - 2) // count + 2)  # as many as `size` rows can touch
    order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), count))(epochs).reshape(-1)
    index = jax.lax.dynamic_slice_in_dim(order, start - first * count, size)
    return jax.tree.map(lambda leaf: leaf[index], chosen)
