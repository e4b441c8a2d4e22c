"""What people do to protected pictures: compress, resize, blur, denoise, or pass them through a model. A protection is worth what is left after.

Host operations take and give pictures [B, H, W, 3] float32 in [-1, 1]; those with a model take it as callables, on pictures of its size, except
`grid_pure`, which takes any. Sizes of noise and colours are in 8-bit levels.
"""

import io
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from PIL import Image
from scipy import ndimage

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import Key, Latent, ModelFn
from dmsec_jax.data import tiles
from dmsec_jax.data.images import from_uint8, to_uint8
from dmsec_jax.diffusion import draws, samplers
from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars

Pictures = Float32[np.ndarray, "B H W 3"]
PurifyFn = Callable[[Key, Pictures], Pictures]
EncodeFn = Callable[[Pictures], Latent]
"""Pictures -> scaled latents (posterior means)."""
DecodeFn = Callable[[Latent], Pictures]


def jpeg(images: Pictures, quality: int = 75) -> Pictures:
    """JPEG there and back, colours subsampled as usual (4:2:0)."""

    def one(image):
        stream = io.BytesIO()
        Image.fromarray(to_uint8(image)).save(stream, format="JPEG", quality=quality, subsampling="4:2:0")
        return from_uint8(np.asarray(Image.open(stream).convert("RGB")))

    return np.stack([one(image) for image in images])


def resize(images: Pictures, factor: float = 0.5) -> Pictures:
    """Made smaller with antialiasing (Lanczos) and enlarged again (bicubic)."""
    require(0 < factor <= 1, "factor", "in (0, 1]", factor, "take for example 0.5")

    def one(image):
        full = Image.fromarray(to_uint8(image))
        small = tuple(max(1, round(side * factor)) for side in full.size)
        shrunk = full.resize(small, Image.Resampling.LANCZOS)
        return from_uint8(np.asarray(shrunk.resize(full.size, Image.Resampling.BICUBIC)))

    return np.stack([one(image) for image in images])


def blur(images: Pictures, sigma: float = 1.0) -> Pictures:
    """Gaussian blur of that width in pixels, borders repeated."""
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")


def gaussian_noise(key: Key, images: Pictures, sigma: float = 8.0) -> Pictures:
    """White noise of that many levels."""
    noise = draws.example_noise(key, jnp.arange(len(images)), images.shape[1:])
    return np.clip(images + np.float32(sigma * 2 / 255) * np.asarray(noise), -1, 1)


def bit_depth(images: Pictures, bits: int = 4) -> Pictures:
    """Rounded to 2^bits levels   (Xu et al., NDSS 2018, Sec. III)."""
    require(1 <= bits <= 8, "bits", "from 1 to 8", bits, "take for example 4")
    steps = np.float32(2**bits - 1)
    return np.rint((images + 1) / 2 * steps) / steps * 2 - 1


def total_variation(images: Pictures, weight: float = 0.1, iterations: int = 60) -> Pictures:
    """argmin_u |u - x|^2 / 2 + weight TV(u), channels apart, by projection   (Chambolle 2004, Eq. 9); `weight` for values in [0, 1]."""
    x = (images.astype(np.float64) + 1) / 2
    dual = np.zeros((2, *x.shape))
    for _ in range(iterations):
        slope = _slopes(_divergence(dual) - x / weight)
        size = np.sqrt(np.square(slope).sum(axis=0))
        dual = (dual + 0.25 * slope) / (1 + 0.25 * size)
    return np.clip(2 * (x - weight * _divergence(dual)) - 1, -1, 1).astype(np.float32)


def adverse_cleaner(images: Pictures, rounds: int = 64, guided_rounds: int = 4) -> Pictures:
    """AdverseCleaner (lllyasviel 2023): many bilateral filters, then guided filters that take the picture as guide.

    Bilateral: 5 pixels across, width 8 levels in colour (sum over channels) and 8 pixels in space. Guided: radius 4, regularisation 16 levels^2.
    """
    x = (images.astype(np.float64) + 1) * 127.5
    cleaned = x
    for _ in range(rounds):
        cleaned = _bilateral(cleaned)
    for _ in range(guided_rounds):
        cleaned = np.stack([_guided(guide, one) for guide, one in zip(x, cleaned, strict=True)])
    return np.clip(cleaned / 127.5 - 1, -1, 1).astype(np.float32)


def round_trip(images: Pictures, *, encode_fn: EncodeFn, decode_fn: DecodeFn) -> Pictures:
    """Through the autoencoder and back."""
    return np.asarray(decode_fn(encode_fn(images)), np.float32)


def diffuse(
    key: Key, z0: Latent, t: int, *, model_fn: ModelFn, schedule: ScheduleConfig, num_steps: int = 10
) -> Latent:
    """Noise up to timestep t is added to latents and taken away by DDIM   (Nie et al., ICML 2022, "DiffPure", in latent space). Pure: jit it, with
    `t`, `model_fn` and `schedule` static.

    Raises:
        ValueError: on a timestep that is not inside the schedule.
    """
    require(0 < t < schedule.num_train_timesteps, "t", f"in 1..{schedule.num_train_timesteps - 1}", t, "take 100")
    noise = draws.example_noise(key, jnp.arange(len(z0)), z0.shape[1:])
    z_t = add_noise(alpha_bars(schedule), z0, noise, jnp.full(len(z0), t))
    visited = np.unique(np.linspace(0, t, num_steps + 1).round().astype(np.int32))[:0:-1]
    return samplers.sample(key, z_t, samplers.ddim(schedule, visited), model_fn=model_fn)


def noisy_upscaling(key: Key, images: Pictures, sigma: float = 25.0, *, diffuse_fn: PurifyFn) -> Pictures:
    """Drowns the perturbation in noise and lets a model restore the picture   (Hoenig et al., ICLR 2025, arXiv 2406.12027, Sec. 4).

    There a Stable Diffusion upscaler restores; here whatever `diffuse_fn` does, for example `diffuse` with the model at hand.
    """
    key_noise, key_model = jax.random.split(key)
    return diffuse_fn(key_model, gaussian_noise(key_noise, images, sigma))


def grid_pure(
    key: Key, images: Pictures, side: int, *, purify_fn: PurifyFn, rounds: int = 10, kept: float = 0.1
) -> Pictures:
    """GrIDPure (Zhao et al., CVPR 2024, arXiv 2312.00084): weak purification of overlapping tiles, blended, again and again.

    x <- (1 - kept) blend(purify(tiles of x)) + kept x; tiles of `side` pixels overlap by half.
    """
    where = tiles.layout(*images.shape[1:3], side, side // 2)
    count = len(where.corners)
    for i in range(rounds):
        cut = np.concatenate([tiles.cut(image, where) for image in images])
        purified = purify_fn(jax.random.fold_in(key, i), cut).reshape(len(images), count, side, side, 3)
        blended = np.stack([tiles.blend(part, where) for part in purified])
        images = (1 - kept) * blended + np.float32(kept) * images
    return images.astype(np.float32)


def _slopes(x: np.ndarray) -> np.ndarray:
    """Forward differences along height and width, zero at the end: [2, B, H, W, C]."""
    slopes = np.zeros((2, *x.shape))
    slopes[0, :, :-1] = x[:, 1:] - x[:, :-1]
    slopes[1, :, :, :-1] = x[:, :, 1:] - x[:, :, :-1]
    return slopes


def _divergence(p: np.ndarray) -> np.ndarray:
    """Minus the adjoint of `_slopes`."""
    down, right = p[0].copy(), p[1].copy()
    down[:, 1:] -= p[0, :, :-1]
    down[:, -1] = -p[0, :, -2] if p.shape[2] > 1 else 0
    right[:, :, 1:] -= p[1, :, :, :-1]
    right[:, :, -1] = -p[1, :, :, -2] if p.shape[3] > 1 else 0
    return down + right


def _bilateral(x: np.ndarray, radius: int = 2, colour: float = 8.0, space: float = 8.0) -> np.ndarray:
    """[B, H, W, C] in levels; a disc of neighbours, borders reflected without the edge pixel."""
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="reflect")
    total, weights = np.zeros_like(x), np.zeros((*x.shape[:3], 1))
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dy * dy + dx * dx > radius * radius:
                continue
            other = padded[:, radius + dy : radius + dy + height, radius + dx : radius + dx + width]
            apart = np.abs(other - x).sum(axis=-1, keepdims=True)
            weight = np.exp(-0.5 * ((apart / colour) ** 2 + (dy * dy + dx * dx) / space**2))
            total += weight * other
            weights += weight
    return total / weights


def _guided(guide: np.ndarray, x: np.ndarray, radius: int = 4, strength: float = 16.0) -> np.ndarray:
    """Guided filter with a colour guide, [H, W, C] in levels   (He, Sun, Tang, TPAMI 2013, Eqs. 14-15)."""
    mean = lambda values: ndimage.uniform_filter(values, (2 * radius + 1, 2 * radius + 1, *[0] * (values.ndim - 2)))
    mean_guide, mean_x = mean(guide), mean(x)
    spread = mean(guide[..., :, None] * guide[..., None, :]) - mean_guide[..., :, None] * mean_guide[..., None, :]
    joint = mean(guide[..., :, None] * x[..., None, :]) - mean_guide[..., :, None] * mean_x[..., None, :]
    slope = np.linalg.solve(spread + strength * np.eye(guide.shape[-1]), joint)  # [H, W, guide channel, channel]
    offset = mean_x - np.einsum("hwg,hwgc->hwc", mean_guide, slope)
    return np.einsum("hwg,hwgc->hwc", guide, mean(slope)) + mean(offset)
