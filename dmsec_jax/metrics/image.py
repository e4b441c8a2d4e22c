"""Distance between pictures: PSNR, SSIM, MS-SSIM, one value per example.

Images are [B, H, W, C] in [-1, 1], so the peak-to-peak range L of the formulas is 2. Everything is jittable and differentiable.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dmsec_jax.core.checks import require

RANGE = 2.0
WINDOW = 11
SIGMA = 1.5
C1 = (0.01 * RANGE) ** 2
C2 = (0.03 * RANGE) ** 2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales of MS-SSIM, finest first (Wang, Simoncelli and Bovik 2003, section 3.2)."""

Images = Float[Array, "_ _ _ _"] | Float[np.ndarray, "_ _ _ _"]
PerExample = Float32[Array, "_"]


def psnr(a: Images, b: Images) -> PerExample:
    """Peak signal-to-noise ratio 10 log10(4 / MSE) in dB; infinite where the two are equal.

    Raises:
        ValueError: if the shapes differ.
    """
    _same_shape(a, b)
    error = jnp.mean(jnp.square(jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)), axis=(1, 2, 3))
    return 10 * jnp.log10(RANGE**2 / error)


def ssim(a: Images, b: Images) -> PerExample:
    """Structural similarity, the mean over windows and channels, in [-1, 1].

    Wang, Bovik, Sheikh and Simoncelli 2004, Eq. 13 with their constants: Gaussian window of 11 pixels and width 1.5, K1 = 0.01,
    K2 = 0.03; only windows that lie inside the picture count.

    Raises:
        ValueError: if the shapes differ or a side is shorter than 11 pixels.
    """
    _same_shape(a, b)
    _large_enough(a.shape, WINDOW)
    luminance, structure = _ssim_maps(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def ms_ssim(a: Images, b: Images, weights: tuple[float, ...] = SCALE_WEIGHTS) -> PerExample:
    """Multi-scale structural similarity: contrast-structure at every scale, luminance at the coarsest, each to its weight (Eq. 7).

    Each scale halves the picture by 2 x 2 means. Negative terms count as zero. A picture of less than 176 pixels does not have five
    scales of 11 pixels: pass fewer `weights`, for example the first two or three divided by their sum.

    Raises:
        ValueError: if the shapes differ or the coarsest scale is shorter than 11 pixels.
    """
    _same_shape(a, b)
    _large_enough(a.shape, WINDOW * 2 ** (len(weights) - 1))
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    product = 1.0
    for scale, weight in enumerate(weights):
        luminance, structure = _ssim_maps(a, b)
        last = scale == len(weights) - 1
        term = jnp.mean(luminance * structure if last else structure, axis=(1, 2))  # [B, C]
        positive = jnp.where(term > 0, term, 1.0)  # the slope of 0 ** weight is infinite
        product = product * jnp.where(term > 0, positive**weight, 0.0)
        a, b = _halve(a), _halve(b)
    return jnp.mean(product, axis=-1)


def _ssim_maps(a, b):
    """Luminance and contrast-structure terms of Eq. 13 at every window, [B, H - 10, W - 10, C] each."""
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    variances = _window_mean(a * a) + _window_mean(b * b) - mean_a**2 - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return luminance, (2 * covariance + C2) / (variances + C2)


def _window_mean(x):
    """Gaussian mean at every window inside the picture; one banded matrix per axis, which is fast on every device."""
    rows = jnp.einsum("ih,bhwc->biwc", _band(x.shape[1]), x, precision="highest")  # variances are differences of means
    return jnp.einsum("jw,biwc->bijc", _band(x.shape[2]), rows, precision="highest")


def _band(length: int) -> np.ndarray:
    """[length - 10, length], row i holds the window that starts at pixel i."""
    taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    band = np.zeros((length - WINDOW + 1, length), np.float32)
    for i in range(len(band)):
        band[i, i : i + WINDOW] = taps / taps.sum()
    return band


def _halve(x):
    h, w = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * h, : 2 * w].reshape(x.shape[0], h, 2, w, 2, x.shape[3]).mean((2, 4))


def _same_shape(a, b) -> None:
    require(a.shape == b.shape, "b", f"of the shape of a, {a.shape}", b.shape, "resize one of the two")


def _large_enough(shape, least: int) -> None:
    require(
        min(shape[1:3]) >= least,
        "a",
        f"at least {least} pixels high and wide",
        f"shape {shape}",
        "enlarge both or use fewer scales",
    )
