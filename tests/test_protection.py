"""Protection at source resolution: budgets in saved pixels, seams, masks, batches, and that it beats noise on the embedded model."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from dmsec_jax import pipeline, protection, robustness
from dmsec_jax.commands.demo import PICTURES
from dmsec_jax.core.pgd import Budget
from dmsec_jax.data import images
from dmsec_jax.protection import Settings

pytestmark = pytest.mark.slow  # compiles the gradient through both networks

KEY = jax.random.key(0)
SIDE = 16  # of the tiny model
SHORT = {"num_steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return protection.model_of(tiny_pipeline, "a red dog")


def picture(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def job(pixels, settings, mask=None):
    return protection.job(pixels, pixels, mask, SIDE, settings)


def levels(norm, difference, mask, channels):
    """The size of a change as its budget counts it."""
    if norm == "linf":
        return np.abs(difference).max(initial=0)
    return np.sqrt(np.square(difference, dtype=np.int64).sum() / max(mask.sum() * channels, 1))


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    norm=st.sampled_from(["linf", "l2"]),
    scale=st.sampled_from(["model", "source"]),
    budget=st.floats(0.6, 40),
    share=st.floats(0.1, 1),
    seed=st.integers(0, 100),
)
def test_saved_pixels_keep_the_budget_whatever_size_norm_scale_and_mask(
    height, width, channels, norm, scale, budget, share, seed
):
    """With random noise at the attack's place, which fills the budget: the way to the file is the same."""
    settings = Settings(method="noise", budget=Budget(budget, "8bit"), norm=norm, scale=scale, batch_size=3)
    pixels = picture(height, width, channels, seed)
    mask = np.random.default_rng(seed).random((height, width, 1)) < share
    (saved,) = protection.protect(KEY, WITHOUT, [job(pixels, settings, mask)], settings)
    difference = saved.astype(int) - pixels
    assert saved.shape == pixels.shape
    assert (difference[~mask[..., 0]] == 0).all()
    assert levels(norm, difference, mask, channels) <= budget + 1e-6


WITHOUT = protection.Model(None, None, {}, protection.ScheduleConfig(), SIDE, np.zeros((1, 2, 2, 4), np.float32))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_keep_and_use_the_budget(model, norm):
    settings = Settings(budget=Budget(8, "8bit"), norm=norm, scale="source", num_steps=5, batch_size=4)
    pixels = picture(20, 20)
    (saved,) = protection.protect(KEY, model, [job(pixels, settings)], settings)
    used = levels(norm, saved.astype(int) - pixels, np.ones((20, 20, 1)), 3)
    assert 1 <= used <= 8


def test_pictures_together_are_pictures_alone(model):
    settings = Settings(**SHORT, scale="source")
    shapes = [(16, 16), (20, 33), (16, 16), (5, 40)]
    jobs = [job(picture(*shape, seed=i), settings) for i, shape in enumerate(shapes)]
    together = protection.protect(KEY, model, jobs, settings)
    for one, found in zip(jobs, together, strict=True):
        (alone,) = protection.protect(KEY, model, [one], settings, batch_size=4)
        # a sign may flip where a gradient is nearly zero
        assert (alone != found).mean() < 0.01


def test_grey_pictures_stay_grey_and_masks_hold(model):
    settings = Settings(**SHORT)
    pixels = picture(24, 18, 1)
    mask = np.zeros((24, 18, 1), bool)
    mask[:10] = True
    (saved,) = protection.protect(KEY, model, [job(pixels, settings, mask)], settings, batch_size=4)
    assert saved.shape == (24, 18, 1)
    assert (saved[10:] == pixels[10:]).all()
    assert (saved[:10] != pixels[:10]).any()


def test_borders_of_tiles_do_not_show(model):
    """No line along a tile's border: the mean step across it is no larger than across other columns."""
    settings = Settings(num_steps=4, batch_size=4, scale="source")
    pixels = np.full((16, 128, 3), 128, np.uint8)
    one = job(pixels, settings)
    (saved,) = protection.protect(KEY, model, [one], settings)
    steps = np.abs(np.diff(saved.astype(int), axis=1).mean(axis=(0, 2)))
    borders = {edge - 1 for left in one.where.lefts for edge in (left, left + SIDE) if 0 < edge < 128}
    at = np.isin(np.arange(127), list(borders))
    assert at.sum() > 10
    spread = np.sqrt(steps[at].var(ddof=1) / at.sum() + steps[~at].var(ddof=1) / (~at).sum())
    assert steps[at].mean() - steps[~at].mean() < 3 * spread


@pytest.mark.slow
def test_every_method_runs_and_changes_something_else(model):
    found = {}
    for name in protection.METHODS:
        settings = Settings(method=name, **SHORT)
        (saved,) = protection.protect(KEY, model, [job(picture(16, 16), settings)], settings)
        found[name] = saved.tobytes()
    assert len(set(found.values())) == len(protection.METHODS)


@pytest.mark.slow
def test_advdm_raises_the_held_out_loss_of_the_embedded_model_and_noise_does_not():
    """On twenty pictures and draws that the attack did not see, by more than five standard errors of the paired difference."""
    base = pipeline.load()
    prompt, pictures = (
        "an openmoji icon of an animal",
        images.read_folder(PICTURES / "holdout", base.pixels).images[:20],
    )
    attacked, loss = protection.model_of(base, prompt), {}
    for name in ("advdm", "noise"):
        settings = Settings(method=name, num_steps=10, batch_size=10)
        jobs = [protection.job(one, one, None, base.pixels, settings) for one in images.to_uint8(pictures)]
        saved = np.stack(protection.protect(KEY, attacked, jobs, settings))
        views = images.from_uint8(saved)
        loss[name] = robustness.held_out_loss(jax.random.key(1), base, prompt, views, num_draws=16, batch_size=10)
    gain = loss["advdm"] - loss["noise"]
    assert len(gain) == 20
    assert gain.mean() > 5 * gain.std(ddof=1) / np.sqrt(len(gain))


def test_bad_settings_are_refused():
    for bad, match in (
        ({"method": "glaze"}, "method must be one of advdm"),
        ({"budget": Budget(0, "8bit")}, "budget"),
        ({"num_steps": 0}, "num_steps"),
        ({"overlap": 1.0}, "overlap"),
    ):
        with pytest.raises(ValueError, match=match):
            Settings(**bad)
