"""The one place where models meet diffusion: a model folder becomes pure functions and their parameters.

Everything above works with `eps_fn`, `encode_fn`, `decode_fn` and `text_fn`, whatever the architecture. The functions of two models of the
same architecture are the same objects, so what is compiled for the base model serves its fine-tuned versions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax.core import spread, trees
from dmsec_jax.core.checks import image_batch
from dmsec_jax.core.types import Context, EpsFn, Image, Latent, Params
from dmsec_jax.diffusion import draws, guidance, samplers
from dmsec_jax.functions import Functions as Functions
from dmsec_jax.functions import Pipeline as Pipeline
from dmsec_jax.functions import contexts as contexts
from dmsec_jax.functions import functions as functions
from dmsec_jax.loading import EMBEDDED as EMBEDDED
from dmsec_jax.loading import Reading as Reading
from dmsec_jax.loading import load as load
from dmsec_jax.loading import load_tuned as load_tuned
from dmsec_jax.loading import misfits as misfits
from dmsec_jax.loading import peek as peek
from dmsec_jax.loading import require_same_architecture as require_same_architecture
from dmsec_jax.loading import save as save
from dmsec_jax.loading import with_words as with_words


class Subject(NamedTuple):
    """What is audited: two models of one architecture, and the prompt of the second."""

    base: Pipeline
    tuned: dict[str, Params]
    """Parameters of the fine-tuned model: "unet", "vae", "text_encoder"."""
    prompt: str


STACKED_LIMIT = 50_000_000
"""Pairs of networks up to this many parameters are stacked and mapped over: one compiled body instead of two, at the price of a copy."""


def pair(pipeline: Pipeline, first: tuple[Params, Context], second: tuple[Params, Context]) -> tuple[Callable, dict]:
    """Two networks of one architecture, each with its context, as what contrasting methods take.

    Args:
        first, second: (params["unet"], context [1, L, D]); the first is the base model in two-model guidance.

    Returns:
        pair_fn: (params, z_t, t) -> (first prediction, second prediction); `z_t` may be a pair of latents, one for each network. The same
            object for the same architecture.
        params: its parameters.
    """
    networks, texts = zip(first, second, strict=True)
    if trees.count(networks[0]) > STACKED_LIMIT:
        return in_turn(pipeline.functions.predict_fn), {"unet": networks, "context": texts}
    stack = lambda *leaves: jnp.stack(leaves)
    return _mapped(pipeline.functions.predict_fn), {"unet": jax.tree.map(stack, *networks), "context": jnp.stack(texts)}


def single(pipeline: Pipeline, network: Params, context: Context) -> tuple[Callable, dict]:
    """(eps_fn, params) of one network with its context [1, L, D], `eps_fn` as `methods.finextract.alone` takes it."""
    return _bound(pipeline.functions.predict_fn), {"unet": network, "context": context}


@functools.cache
def in_turn(predict_fn: EpsFn) -> Callable:
    """The `pair_fn` of large networks: one after the other, for `params["unet"]` and `params["context"]` that are pairs."""

    def pair_fn(params, z_t, t):
        parts = zip(params["unet"], params["context"], _two(z_t), strict=True)
        return tuple(predict_fn(network, z, t, _rows(context, z)) for network, context, z in parts)

    return pair_fn


@functools.cache
def _mapped(predict_fn):
    def pair_fn(params, z_t, t):
        one = lambda part, z: predict_fn(part["unet"], z, t, _rows(part["context"], z))
        if isinstance(z_t, tuple):
            first, second = jax.lax.map(lambda both: one(*both), (params, jnp.stack(z_t)))
        else:
            first, second = jax.lax.map(lambda part: one(part, z_t), params)
        return first, second

    return pair_fn


@functools.cache
def _bound(predict_fn):
    return lambda params, z_t, t: predict_fn(params["unet"], z_t, t, _rows(params["context"], z_t))


def _two(z_t):
    return z_t if isinstance(z_t, tuple) else (z_t, z_t)


def _rows(context, z_t):
    """The context repeated for every row of the batch."""
    return jnp.broadcast_to(context, (z_t.shape[0], *context.shape[-2:]))


def sample(
    key,
    pipeline: Pipeline,
    prompt: str,
    count: int,
    *,
    params: dict[str, Params] | None = None,
    num_steps: int = 25,
    guidance_weight: float | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """`count` pictures [N, H, W, 3] of one prompt by deterministic DDIM; picture j starts from noise of its own key.

    Args:
        params: of another model of the same architecture, for example a fine-tuned one.
        guidance_weight: of classifier-free guidance; None samples the conditional model alone (half the work).
    """
    params = pipeline.params if params is None else params
    batch_size = spread.filled(min(batch_size, count))
    empty, context = contexts(pipeline, ["", prompt], params)[:, None]
    model = single(pipeline, params["unet"], context)
    if guidance_weight is not None:
        model = pair(pipeline, (params["unet"], empty), (params["unet"], context))
    draw = functools.partial(
        _sample,
        shape=pipeline.latent_shape,
        schedule=pipeline.schedule,
        num_steps=num_steps,
        guided=guidance_weight is not None,
    )
    pictures = []
    for start in range(0, count, batch_size):
        index = jnp.arange(start, start + batch_size)
        latents = draw(key, index, model[1], guidance_weight or 0.0, model_fn=model[0])
        pictures.append(decode(dataclasses.replace(pipeline, params=params), latents, batch_size))
    return np.concatenate(pictures)[:count]


@functools.partial(jax.jit, static_argnames=("shape", "schedule", "num_steps", "guided", "model_fn"))
def _sample(key, index, params, weight, *, shape, schedule, num_steps, guided, model_fn):
    bound = functools.partial(model_fn, params)
    if guided:
        bound = guidance.mix_outputs(bound, (1 - weight, weight), 2)
    index = spread.even(index)
    noise = draws.example_noise(key, index, shape)
    return spread.whole(samplers.sample(key, noise, samplers.ddim(schedule, num_steps), model_fn=bound, index=index))


_encode = jax.jit(lambda params, image, fn: spread.whole(fn(params, spread.even(image))), static_argnames="fn")
_decode = jax.jit(lambda params, latent, fn: spread.whole(fn(params, spread.even(latent))), static_argnames="fn")


def encode(pipeline: Pipeline, images: Image, batch_size: int = 16) -> tuple[Latent, Latent]:
    """Mean and log-variance of the scaled latents of any number of pictures, in equal batches (one compilation).

    Raises:
        ValueError: if `images` are not [N, H, W, 3] in [-1, 1], or a side is no multiple of the autoencoder's factor.
    """
    image_batch("images", images)
    run = lambda part: _encode(pipeline.params["vae"], part, pipeline.functions.encode_fn)
    return tuple(map(jnp.concatenate, zip(*batched(run, images, batch_size), strict=True)))


def decode(pipeline: Pipeline, latents: Latent, batch_size: int = 16) -> np.ndarray:
    """Pictures [N, H, W, 3] in [-1, 1] of scaled latents, in equal batches; rows that are not finite come back as NaN."""
    run = lambda part: (_decode(pipeline.params["vae"], part, pipeline.functions.decode_fn),)
    return np.concatenate([np.asarray(part) for (part,) in batched(run, latents, batch_size)])


def batched(run: Callable, rows, size: int):
    """`run` over the rows of a tree of arrays [N, ...] in `spread.batches`; yields what it returns, a tuple of arrays, without the filling."""
    for index, kept in spread.batches(jax.tree.leaves(rows)[0].shape[0], size):
        part = jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index]), rows)
        yield tuple(out[:kept] for out in run(part))
