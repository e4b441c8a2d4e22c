"""What a protection is worth: changes in closed form, held-out losses of common draws, every purifier with a model."""

import jax
import numpy as np
import pytest

from dmsec_jax import pipeline, robustness

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def pixels(height, width, channels=3):
    return RNG.integers(20, 230, (height, width, channels), np.uint8)


def test_one_level_everywhere_is_48_decibels():
    before = pixels(24, 20)
    found = robustness.change(before, before + 1)
    assert found.largest == 1
    assert found.psnr == pytest.approx(20 * np.log10(255))
    assert 0.9 < found.ssim < 1
    assert np.isnan(found.lpips)  # too small for it


def test_no_change_is_perfect_and_grey_is_welcome():
    grey = pixels(24, 24, 1)
    found = robustness.change(grey, grey)
    assert (found.largest, found.psnr) == (0, np.inf)
    assert found.ssim == pytest.approx(1)
    assert np.isnan(robustness.change(grey[:4], grey[:4]).ssim)


def test_largest_change_and_psnr_see_the_border_and_the_central_part_does_not():
    before = pixels(robustness.CROP + 40, 20)
    after = before.copy()
    after[0, 0, 0] += 9
    found = robustness.change(before, after)
    assert found.largest == 9
    assert found.psnr == pytest.approx(10 * np.log10(255**2 * before.size / 81), rel=1e-5)
    assert found.ssim == pytest.approx(1)


def test_a_view_is_the_central_square_in_colour():
    wide = np.zeros((16, 48, 1), np.uint8)
    wide[:, 16:32] = 255
    view = robustness.view(wide, 16)
    assert view.shape == (16, 16, 3)
    np.testing.assert_array_equal(view, 1)


@pytest.fixture(scope="module")
def views(tiny_pipeline):
    side = tiny_pipeline.pixels
    return RNG.uniform(-1, 1, (4, side, side, 3)).astype(np.float32)


def test_held_out_losses_do_not_depend_on_the_batch_and_share_their_draws(tiny_pipeline, views):
    measure = lambda key, part: robustness.held_out_loss(
        key, tiny_pipeline, "a red dog", part, num_draws=4, batch_size=2
    )
    whole = measure(KEY, views)
    assert whole.shape == (4,)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(measure(KEY, views[:2]), whole[:2], rtol=1e-5)
    np.testing.assert_array_equal(measure(KEY, views), whole)
    assert (measure(jax.random.key(1), views) != whole).all()


@pytest.mark.slow  # compiles for long
@pytest.mark.parametrize("name", robustness.PURIFIERS)
def test_every_purifier_gives_pictures_back(tiny_pipeline, views, name):
    found = robustness.PURIFIERS[name].apply(KEY, views, tiny_pipeline, "a red dog")
    assert found.shape == views.shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1 + 1e-5
    assert (found != views).any()


@pytest.mark.slow  # compiles for long
def test_purifying_with_the_autoencoder_is_its_round_trip(tiny_pipeline, views):
    found = robustness.PURIFIERS["autoencoder"].apply(KEY, views, tiny_pipeline, "a red dog")
    latents, _ = pipeline.encode(tiny_pipeline, views)
    np.testing.assert_allclose(found, pipeline.decode(tiny_pipeline, latents), atol=1e-5)


def test_suspicion_is_both_statistics_of_a_picture_and_its_jpeg(tiny_pipeline, views):
    options = {"num_draws": 4, "batch_size": 2}
    found = robustness.suspicion(KEY, tiny_pipeline, "a red dog", views, **options)
    assert {name: values.shape for name, values in found.items()} == {"encoder-response": (4,), "loss-response": (4,)}
    smoothed = robustness.PURIFIERS["jpeg"].apply(KEY, views, tiny_pipeline, "")
    losses = [robustness.held_out_loss(KEY, tiny_pipeline, "a red dog", part, **options) for part in (views, smoothed)]
    np.testing.assert_allclose(found["loss-response"], np.log(losses[0] / losses[1]), rtol=1e-4, atol=1e-6)
