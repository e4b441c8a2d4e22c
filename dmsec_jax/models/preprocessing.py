"""Pictures as feature networks expect them: resized, cropped to a square, scaled."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dmsec_jax.core.types import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize` pixels (antialiased), central square of `crop` (0: none), then (x - mean) / std with x in [0, 1].

    `method`: "linear" or "cubic", Pillow's bilinear and bicubic.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    method: str = "linear"


def preprocess(image: Image, how: Preprocessing) -> Float[jax.Array, "B h w 3"]:
    """Pictures [B, H, W, 3] in [-1, 1] as the network expects them."""
    b, height, width, _ = image.shape
    short = min(height, width)
    size = (how.resize * height // short, how.resize * width // short)
    x = jax.image.resize((jnp.asarray(image) + 1) / 2, (b, *size, 3), how.method, antialias=True)
    if how.method == "cubic":
        x = jnp.clip(x, 0.0, 1.0)  # its overshoots, as they end in the eight bits of a picture
    if how.crop:
        top, left = (round((side - how.crop) / 2) for side in size)
        x = x[:, top : top + how.crop, left : left + how.crop]
    return (x - jnp.asarray(how.mean)) / jnp.asarray(how.std)
