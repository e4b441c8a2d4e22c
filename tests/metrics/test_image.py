"""Picture distances against closed forms and an independent SSIM on scipy's Gaussian filter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dmsec_jax.metrics.image import ms_ssim, psnr, ssim

WEIGHTS = (0.3, 0.7)
METRICS = {"psnr": jax.jit(psnr), "ssim": jax.jit(ssim), "ms_ssim": jax.jit(lambda a, b: ms_ssim(a, b, WEIGHTS))}


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(3, 48, 40, 3)), (0, 3, 3, 0))
    a = np.clip(smooth / np.abs(smooth).max(), -1, 1).astype(np.float32)
    b = np.clip(a + 0.1 * rng.normal(size=a.shape), -1, 1).astype(np.float32)
    return a, b


def reference_terms(a, b):
    """Luminance and contrast-structure maps of one channel in float64, only windows inside the picture."""

    def mean(x):
        return ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    a, b = a.astype(np.float64), b.astype(np.float64)
    va, vb = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2
    cov = mean(a * b) - mean(a) * mean(b)
    c1, c2 = 0.02**2, 0.06**2
    luminance = (2 * mean(a) * mean(b) + c1) / (mean(a) ** 2 + mean(b) ** 2 + c1)
    return luminance, (2 * cov + c2) / (va + vb + c2)


def test_psnr_of_a_constant_offset_is_closed_form():
    a = jnp.zeros((2, 8, 8, 3))
    b = a + jnp.array([0.1, 0.2])[:, None, None, None]
    np.testing.assert_allclose(psnr(a, b), 20 * np.log10([2 / 0.1, 2 / 0.2]), rtol=1e-5)
    assert np.isposinf(psnr(a, a)).all()


def test_ssim_equals_an_independent_implementation(pictures):
    a, b = pictures
    expected = [
        np.mean([np.prod(reference_terms(x[..., c], y[..., c]), axis=0).mean() for c in range(3)])
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(METRICS["ssim"](a, b), expected, atol=2e-5)


def test_ssim_of_equal_and_of_negated_pictures(pictures):
    a, _ = pictures
    np.testing.assert_allclose(METRICS["ssim"](a, a), 1.0, atol=1e-6)
    flat = np.full_like(a, 0.5)
    np.testing.assert_allclose(
        METRICS["ssim"](flat, -flat), (-0.5 + 4e-4) / (0.5 + 4e-4), rtol=1e-4
    )  # no structure: the luminance term alone


def test_ms_ssim_is_the_product_of_its_scales(pictures):
    a, b = pictures
    expected = []
    for x, y in zip(a, b, strict=True):
        per_channel = []
        for c in range(3):
            fine = reference_terms(x[..., c], y[..., c])[1].mean()
            half = [p[..., c].reshape(24, 2, 20, 2).mean((1, 3)) for p in (x, y)]
            coarse = np.prod(reference_terms(*half), axis=0).mean()
            per_channel.append(fine**0.3 * coarse**0.7)
        expected.append(np.mean(per_channel))
    np.testing.assert_allclose(METRICS["ms_ssim"](a, b), expected, atol=5e-5)


@pytest.mark.parametrize("name", METRICS)
def test_each_example_is_judged_alone_and_symmetrically(pictures, name):
    a, b = pictures
    metric = METRICS[name]
    batch = metric(a, b)
    for i in range(3):  # the others changed: this one's value stays
        others = [i if j == i else (j + 1) % 3 for j in range(3)]
        np.testing.assert_allclose(metric(a[others], b[others])[i], batch[i], rtol=1e-5)
    np.testing.assert_allclose(batch, metric(b, a), rtol=1e-5)
    assert len(np.unique(np.round(batch, 4))) == 3


def test_ssim_falls_as_noise_grows(pictures):
    a, _ = pictures
    noise = np.random.default_rng(1).normal(size=a.shape).astype(np.float32)
    values = [float(METRICS["ssim"](a, a + level * noise).mean()) for level in (0.05, 0.1, 0.2, 0.4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 2 * values[-1]


def test_bad_shapes_are_named():
    small, other = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 9, 3))
    with pytest.raises(ValueError, match=r"b must be of the shape of a, \(1, 8, 8, 3\), got \(1, 8, 9, 3\)"):
        psnr(small, other)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(small, small)
    with pytest.raises(ValueError, match="at least 176 pixels"):
        ms_ssim(jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 64, 64, 3)))
