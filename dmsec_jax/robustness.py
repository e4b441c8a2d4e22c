"""Floor 6, what a protection is worth: how much it shows, how much the denoising loss rises beyond random noise, and what purifiers leave of it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageOps

from dmsec_jax import pipeline
from dmsec_jax.core import spread
from dmsec_jax.data.images import from_uint8
from dmsec_jax.diffusion import draws
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.methods import detection, membership, purify
from dmsec_jax.metrics import image
from dmsec_jax.metrics.protection import Change
from dmsec_jax.models import features
from dmsec_jax.pipeline import Pipeline

Views = Float32[np.ndarray, "N H W 3"]
CROP = 256
"""Pixels a side of the central part that SSIM and LPIPS are taken on."""


class Purifier(NamedTuple):
    """What somebody may do to a protected picture."""

    label: str
    apply: Callable[[jax.Array, Views, Pipeline, str], Views]
    """(key, views, pipeline, prompt) -> views."""


PURIFIERS = {
    "jpeg": Purifier("JPEG of quality 75", lambda key, x, base, prompt: purify.jpeg(x, 75)),
    "resize": Purifier("half the size and back", lambda key, x, base, prompt: purify.resize(x, 0.5)),
    "blur": Purifier("blur of one pixel", lambda key, x, base, prompt: purify.blur(x, 1.0)),
    "noise": Purifier("noise of 8 levels", lambda key, x, base, prompt: purify.gaussian_noise(key, x, 8.0)),
    "bits": Purifier("4 bits per sample", lambda key, x, base, prompt: purify.bit_depth(x, 4)),
    "total-variation": Purifier("total variation", lambda key, x, base, prompt: purify.total_variation(x, 0.05)),
    "adverse-cleaner": Purifier("AdverseCleaner", lambda key, x, base, prompt: purify.adverse_cleaner(x)),
    "autoencoder": Purifier("the model's autoencoder", lambda key, x, base, prompt: _round_trip(base, x)),
    "noisy-upscaling": Purifier(
        "noise of 25 levels, denoised by the model",
        lambda key, x, base, prompt: purify.noisy_upscaling(
            key, x, diffuse_fn=lambda key, x: _diffuse(key, x, 150, base, prompt)
        ),
    ),
    "grid-pure": Purifier(
        "GrIDPure with the model",
        lambda key, x, base, prompt: purify.grid_pure(
            key, x, base.pixels, purify_fn=lambda key, x: _diffuse(key, x, 50, base, prompt), rounds=3
        ),
    ),
}


def change(before: UInt8[np.ndarray, "H W C"], after: UInt8[np.ndarray, "H W C"]) -> Change:
    """Compares pixels: largest change and PSNR over the whole picture, SSIM and LPIPS over its central part of at most `CROP` pixels a side."""
    difference = after.astype(np.int16) - before
    error = float(np.square(difference, dtype=np.float32).mean(dtype=np.float64))
    psnr = float(10 * np.log10(255**2 / error)) if error else np.inf
    a, b = (_central(pixels) for pixels in (before, after))
    side = min(a.shape[1:3])
    ssim = float(_ssim(a, b)[0]) if side >= image.WINDOW else np.nan
    lpips = float(_lpips(a, b)[0]) if side >= features.MIN_SIDE else np.nan
    return Change(int(np.abs(difference).max()), psnr, ssim, lpips)


def view(pixels: UInt8[np.ndarray, "H W C"], side: int) -> Float32[np.ndarray, "side side 3"]:
    """A picture as a trainer takes it: the central square, reduced to the model's size, in [-1, 1]."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    return from_uint8(np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)))


def held_out_loss(
    key, base: Pipeline, prompt: str, views: Views, *, num_draws: int = 32, batch_size: int = 16
) -> Float[np.ndarray, "N"]:
    """L_DM of each picture's mean latent at draws of (timestep, noise) that are the same for every call with this key.

    Give a key that no attack used.
    """
    latents, _ = pipeline.encode(base, views, batch_size)
    eps_fn, params = pipeline.single(base, base.params["unet"], pipeline.contexts(base, [prompt]))
    options = {"eps_fn": eps_fn, "schedule": base.schedule, "num_draws": num_draws}
    run = lambda rows: (_loss(key, rows[0], rows[1], params, **options),)
    found = pipeline.batched(run, (latents, jnp.arange(len(views))), batch_size)
    return np.concatenate([np.asarray(part) for (part,) in found])


def suspicion(key, base: Pipeline, prompt: str, views: Views, **options) -> dict[str, Float[np.ndarray, "N"]]:
    """How much each picture looks protected against this model, by statistic of `methods.detection`.

    Smoothing is a JPEG of quality 75, chosen over a blur on ten OpenMoji pictures: a blur takes away too much that is the picture's own.

    Args:
        options: as `held_out_loss`.
    """
    smoothed = purify.jpeg(views, 75)
    before, after = (held_out_loss(key, base, prompt, part, **options) for part in (views, smoothed))
    encode = lambda x: pipeline.encode(base, x)[0]
    return {
        "encoder-response": detection.encoder_response(views, smoothed, encode_fn=encode),
        "loss-response": detection.loss_response(before, after),
    }


def _round_trip(base: Pipeline, views: Views) -> Views:
    encode = lambda x: pipeline.encode(base, x)[0]
    return purify.round_trip(views, encode_fn=encode, decode_fn=lambda z: pipeline.decode(base, z))


def _diffuse(key, views: Views, t: int, base: Pipeline, prompt: str) -> Views:
    eps_fn, params = pipeline.single(base, base.params["unet"], pipeline.contexts(base, [prompt]))
    z0 = pipeline.encode(base, views)[0]
    return pipeline.decode(base, _diffused(key, z0, params, t=t, eps_fn=eps_fn, schedule=base.schedule))


def _central(pixels: np.ndarray) -> np.ndarray:
    """[1, h, w, 3] in [-1, 1], at most `CROP` pixels a side."""
    height, width = pixels.shape[:2]
    top, left = max(height - CROP, 0) // 2, max(width - CROP, 0) // 2
    part = pixels[top : top + CROP, left : left + CROP]
    return from_uint8(np.broadcast_to(part, (*part.shape[:2], 3)))[None]


_ssim = jax.jit(image.ssim)


def _lpips(a, b):
    return _distance(features.load()[1], a, b)


@jax.jit
def _distance(params, a, b):
    return features.distance(features.FeaturesConfig(), params, a, b)


@functools.partial(jax.jit, static_argnames=("eps_fn", "schedule", "num_draws"))
def _loss(key, latents, index, params, *, eps_fn, schedule: ScheduleConfig, num_draws: int):
    latents, index = spread.even((latents, index))
    options = {"num_draws": num_draws, "draw": draws.stratified_draw, "index": index}
    return spread.whole(membership.loss(key, lambda z_t, t: eps_fn(params, z_t, t), latents, schedule, **options))


@functools.partial(jax.jit, static_argnames=("t", "eps_fn", "schedule"))
def _diffused(key, z0, params, *, t: int, eps_fn, schedule: ScheduleConfig):
    predict = lambda z, t: eps_fn(params, *spread.even((z, t)))
    return spread.whole(purify.diffuse(key, spread.even(z0), t, model_fn=predict, schedule=schedule))
