"""Purifiers: each against what it is known to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dmsec_jax.diffusion import schedule
from dmsec_jax.methods import purify

SD = schedule.ScheduleConfig()


def smooth(count=2, size=64):
    """Pictures without detail."""
    x, y = np.meshgrid(np.linspace(0, 3, size), np.linspace(0, 2, size))
    waves = [np.stack([np.sin(x + i), np.cos(y - i), np.sin(x * y + i)], axis=-1) for i in range(count)]
    return (0.8 * np.stack(waves)).astype(np.float32)


CLEAN = smooth()
SIGNS = np.random.default_rng(0).choice([-1, 1], CLEAN.shape).astype(np.float32)
NOISY = (CLEAN + 16 / 255 * SIGNS).astype(np.float32)
KEY = jax.random.key(0)


def error(images):
    return float(np.square(images - CLEAN).mean())


@pytest.mark.parametrize(
    "purified",
    [purify.jpeg, purify.resize, purify.blur, purify.total_variation, purify.adverse_cleaner],
    ids=lambda function: function.__name__,
)
def test_noise_on_smooth_pictures_shrinks_and_clean_ones_stay(purified):
    result = purified(NOISY)
    assert result.dtype == np.float32
    assert result.shape == NOISY.shape
    assert np.abs(result).max() <= 1 + 1e-6
    assert error(result) < 0.75 * error(NOISY)
    assert error(purified(CLEAN)) < error(NOISY)


def test_jpeg_of_low_quality_loses_more():
    assert error(purify.jpeg(CLEAN, 20)) > error(purify.jpeg(CLEAN, 95))


def test_bit_depth_has_its_levels():
    found = purify.bit_depth(NOISY, 3)
    assert len(np.unique(found)) <= 8
    assert np.abs(found - NOISY).max() <= 1 / 7 + 1e-6
    np.testing.assert_allclose(purify.bit_depth(found, 3), found, atol=1e-6)


def test_gaussian_noise_has_its_size():
    flat = np.zeros((2, 32, 32, 3), np.float32)
    added = purify.gaussian_noise(KEY, flat, 10.0)
    error = 1 / np.sqrt(2 * added.size)  # relative, of a standard deviation
    assert abs(added.std() / (20 / 255) - 1) < 5 * error
    np.testing.assert_array_equal(purify.gaussian_noise(KEY, flat[:1], 10.0)[0], added[0])


def test_total_variation_is_the_minimum():
    def energy(u):
        slopes = purify._slopes(u)
        return np.square(u - x).sum() / 2 + weight * np.sqrt(np.square(slopes).sum(axis=0)).sum()

    weight, x = 0.05, ((NOISY + 1) / 2).astype(np.float64)
    found = (purify.total_variation(NOISY, weight, 300).astype(np.float64) + 1) / 2
    assert energy(found) < energy(x)
    assert energy(found) < energy((CLEAN.astype(np.float64) + 1) / 2)
    for direction in (SIGNS, x - found, found):
        for size in (0.01, -0.01):
            assert energy(found + size * direction) > energy(found) * (1 - 1e-3)


def test_bilateral_filter_keeps_edges_and_removes_small_noise():
    edge = np.full((1, 16, 16, 3), 20.0)
    edge[:, :, 8:] = 220.0
    np.testing.assert_allclose(purify._bilateral(edge), edge, atol=1e-6)
    noisy = edge + np.random.default_rng(2).choice([-1.0, 1.0], edge.shape)
    found = noisy
    for _ in range(5):
        found = purify._bilateral(found)
    assert np.square(found - edge).mean() < 0.2


def test_divergence_is_the_adjoint_of_slopes():
    rng = np.random.default_rng(1)
    x, p = rng.normal(size=(2, 5, 6, 3)), rng.normal(size=(2, 2, 5, 6, 3))
    np.testing.assert_allclose((purify._slopes(x) * p).sum(), -(x * purify._divergence(p)).sum())


def test_guided_filter_of_a_linear_function_of_the_guide_is_itself():
    guide = (CLEAN[0].astype(np.float64) + 1) * 127.5
    x = guide @ np.array([[0.2, 0.5, 0.1], [0.3, -0.2, 0.4], [0.1, 0.6, 0.2]]) + 7
    np.testing.assert_allclose(purify._guided(guide, x, 4, 1e-6), x, atol=1e-2)


def latent_world():
    """An autoencoder that drops the last bit of detail, and data whose best denoiser is known."""
    encode = lambda x: 2.0 * jnp.asarray(x)
    decode = lambda z: jnp.clip(z / 2.0, -1, 1)
    params = toy.memoriser(2.0 * CLEAN[:, ::4, ::4], 0.02)
    eps_fn = toy.eps_fn_of(schedule.alpha_bars(SD))
    return encode, decode, jax.jit(lambda z, t: eps_fn(params, z, t, toy.empty_context(len(z))))


def test_diffusion_returns_to_what_the_model_knows():
    encode, decode, model = latent_world()
    small, noisy = CLEAN[:, ::4, ::4], NOISY[:, ::4, ::4]
    options = {"encode_fn": encode, "decode_fn": decode}
    np.testing.assert_allclose(purify.round_trip(noisy, **options), noisy, atol=1e-6)
    restored = lambda key, x: purify.diffuse(key, encode(x), 200, model_fn=model, schedule=SD)
    diffuse = lambda key, x: np.asarray(decode(restored(key, x)))
    squared = lambda x: np.square(x - small).mean()
    assert squared(diffuse(KEY, noisy)) < 0.1 * squared(noisy)
    assert squared(purify.noisy_upscaling(KEY, noisy, diffuse_fn=diffuse)) < 0.1 * squared(noisy)


def test_grid_pure_blends_tiles_of_any_picture_and_keeps_a_share():
    seen = []

    def halve(key, tiles):
        seen.append(tiles.shape)
        return tiles / 2

    found = purify.grid_pure(KEY, NOISY[:, :, :20], 16, purify_fn=halve, rounds=2, kept=0.1)
    np.testing.assert_allclose(found, (0.9 / 2 + 0.1) ** 2 * NOISY[:, :, :20], atol=1e-6)
    assert seen == [(2 * 7 * 2, 16, 16, 3)] * 2
