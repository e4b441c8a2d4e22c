"""Ways in which an extracted picture differs from its original, in two strengths; for `benchmarks.similarity`.

Each is a function (rng, picture [H, W, 3] in [-1, 1], another picture) -> picture. `patch` and `blend` take the rest from the other picture.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from dmsec_jax.data.images import from_uint8, to_uint8

Degradation = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]
LUMA_CHROMA = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
TAKES_OTHER = ("patch", "blend")


def jpeg(low: int, high: int) -> Degradation:
    """Compression at a quality in [low, high)."""

    def apply(rng, picture, _):
        file = io.BytesIO()
        Image.fromarray(to_uint8(picture)).save(file, "JPEG", quality=int(rng.integers(low, high)))
        return from_uint8(np.asarray(Image.open(file)))

    return apply


def blur(low: float, high: float) -> Degradation:
    """Gaussian of that many pixels."""

    def apply(rng, picture, _):
        sigma = rng.uniform(low, high)
        return ndimage.gaussian_filter(picture, (sigma, sigma, 0), mode="nearest")

    return apply


def low_resolution(low: int, high: int) -> Degradation:
    """Down to a side in [low, high) by averages, and up again by cubic interpolation."""

    def apply(rng, picture, _):
        side = int(rng.integers(low, high))
        small = Image.fromarray(to_uint8(picture)).resize((side, side), Image.BOX)
        return from_uint8(np.asarray(small.resize(picture.shape[1::-1], Image.BICUBIC)))

    return apply


def codec(luma: int, chroma: int, noise: float, sigma: float) -> Degradation:
    """A crude latent code: the first coefficients of 8 x 8 blocks, with noise on them, smoothed."""

    def apply(rng, picture, _):
        h, w, _channels = picture.shape
        blocks = (picture @ LUMA_CHROMA.T).reshape(h // 8, 8, w // 8, 8, 3).transpose(0, 2, 4, 1, 3)
        code = fft.dctn(blocks, axes=(3, 4), norm="ortho")
        order = np.add.outer(np.arange(8), np.arange(8))
        keep = np.stack([order <= luma, order <= chroma, order <= chroma])
        blocks = fft.idctn((code + rng.normal(0, noise, code.shape)) * keep, axes=(3, 4), norm="ortho")
        decoded = blocks.transpose(0, 3, 1, 4, 2).reshape(h, w, 3) @ np.linalg.inv(LUMA_CHROMA).T
        return np.clip(ndimage.gaussian_filter(decoded, (sigma, sigma, 0)), -1, 1)

    return apply


def colour(mix: float, gamma: float, offset: float) -> Degradation:
    """Random mixture of channels, gamma up to 1 +- `gamma`, shift."""

    def apply(rng, picture, _):
        matrix = np.eye(3) + rng.normal(0, mix, (3, 3))
        curve = (np.clip(picture, -1, 1) / 2 + 0.5) ** rng.uniform(1 - gamma, 1 + gamma) * 2 - 1
        return np.clip(curve @ matrix.T + rng.normal(0, offset, 3), -1, 1)

    return apply


def warp(scale: float, low: float, high: float, degrees: float) -> Degradation:
    """Scale up to 1 +- `scale` per axis, shift of [low, high] pixels per axis, rotation."""

    def apply(rng, picture, _):
        shift = rng.choice([-1, 1], 2) * rng.uniform(low, high, 2)
        angle = np.deg2rad(rng.uniform(-degrees, degrees))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn / rng.uniform(1 - scale, 1 + scale, 2)
        centre = (np.array(picture.shape[:2]) - 1) / 2
        origin = centre - matrix @ (centre + shift)
        move = lambda channel: ndimage.affine_transform(channel, matrix, origin, order=1, mode="nearest")
        return np.stack([move(picture[..., c]) for c in range(3)], axis=-1)

    return apply


def elastic(low: float, high: float) -> Degradation:
    """Smooth random displacement of each pixel, typically of [low, high] pixels."""

    def apply(rng, picture, _):
        h, w, _channels = picture.shape
        field = ndimage.gaussian_filter(rng.normal(size=(2, h, w)), (0, 6, 6))
        field *= rng.uniform(low, high) / field.std()
        places = np.mgrid[:h, :w] + field
        move = lambda channel: ndimage.map_coordinates(channel, places, order=1, mode="nearest")
        return np.stack([move(picture[..., c]) for c in range(3)], axis=-1)

    return apply


def noise(sigma: float) -> Degradation:
    """Independent Gaussian noise per value."""
    return lambda rng, picture, _: np.clip(picture + rng.normal(0, sigma, picture.shape), -1, 1)


def patch(low: float, high: float) -> Degradation:
    """A rectangle of that share of the area comes from the other picture."""

    def apply(rng, picture, other):
        h, w, _channels = picture.shape
        share = rng.uniform(low, high)
        height = min(h, int(h * np.sqrt(share) * rng.uniform(0.8, 1.25)))
        width = min(w, int(share * h * w / height))
        top, left = rng.integers(0, h - height + 1), rng.integers(0, w - width + 1)
        result = picture.copy()
        result[top : top + height, left : left + width] = other[top : top + height, left : left + width]
        return result

    return apply


def blend(low: float, high: float) -> Degradation:
    """That much of the picture, the rest of the other."""

    def apply(rng, picture, other):
        share = rng.uniform(low, high)
        return share * picture + (1 - share) * other

    return apply


def chain(*steps: Degradation) -> Degradation:
    """One after the other."""

    def apply(rng, picture, other):
        for step in steps:
            picture = step(rng, picture, other)
        return picture

    return apply


MILD = {
    "jpeg": jpeg(8, 20),
    "blur": blur(1, 2),
    "low resolution": low_resolution(16, 29),
    "codec": codec(4, 1, 0.15, 0.6),
    "colour": colour(0.08, 0.2, 0.1),
    "warp": warp(0.1, 0, 4, 4),
    "elastic": elastic(0.4, 0.8),
    "noise": noise(0.25),
    "patch": patch(0.25, 0.4),
    "blend": blend(0.6, 0.75),
}
STRONG = {
    "jpeg": jpeg(3, 7),
    "blur": blur(2.2, 3),
    "low resolution": low_resolution(9, 14),
    "codec": codec(2, 0, 0.4, 0.8),
    "colour": colour(0.2, 0.5, 0.2),
    "warp": warp(0.18, 3, 6, 8),
    "elastic": elastic(1, 2),
    "noise": noise(0.6),
    "patch": patch(0.35, 0.45),
    "blend": blend(0.5, 0.6),
}
MILD["mixed"] = chain(MILD["codec"], MILD["colour"], warp(0, 0, 2, 0), noise(0.05))
STRONG["mixed"] = chain(STRONG["elastic"], MILD["codec"], STRONG["colour"], warp(0, 0, 4, 0), noise(0.1))
