"""Pre-training steps on tiny networks, and the algebra of standardised latents."""

import subprocess
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion.schedule import ScheduleConfig, alpha_bars
from dmsec_jax.models import vae
from dmsec_jax.pretrain import autoencoder, corpus, denoiser
from dmsec_jax.pretrain.optimiser import moving_average, warmup_cosine

MODEL = vae.VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16)


@pytest.mark.slow  # compiles for long
def test_standardised_latents_give_the_same_pictures():
    params = vae.init(jax.random.key(0), MODEL)
    images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3), minval=-1, maxval=1)
    mean, logvar = vae.encode(MODEL, params, images)
    centre, spread = mean.mean((0, 1, 2)), mean.std((0, 1, 2))
    changed = autoencoder.standardise(params, centre, spread)
    new_mean, new_logvar = vae.encode(MODEL, changed, images)
    np.testing.assert_allclose(new_mean.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(new_mean.std((0, 1, 2)), 1, atol=1e-3)
    np.testing.assert_allclose(new_logvar, logvar - 2 * jnp.log(spread), atol=1e-3)
    np.testing.assert_allclose(vae.decode(MODEL, changed, new_mean), vae.decode(MODEL, params, mean), atol=1e-3)


@pytest.mark.slow  # compiles for long
def test_autoencoder_learns_and_continues_where_it_stopped():
    cfg = autoencoder.Config(num_steps=8, batch_size=4, warmup_steps=2)
    pictures = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    advance = jax.jit(partial(autoencoder.run, model=MODEL, num_steps=4))
    start = autoencoder.init(jax.random.key(0), MODEL, cfg)
    half, first = advance(jax.random.key(1), start, pictures, cfg)
    whole, second = advance(jax.random.key(1), half, pictures, cfg)
    assert int(whole.step) == 8
    assert second.l1[-1] < first.l1[0]
    again, _ = advance(jax.random.key(1), half, pictures, cfg)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


@pytest.mark.slow  # compiles for long
def test_denoiser_steps_drop_captions_and_reduce_the_loss():
    cfg = denoiser.Config(num_steps=200, batch_size=16, warmup_steps=5, learning_rate=0.05, drop_caption=0.3)
    mean = jnp.broadcast_to(jnp.array([1.0, -1.0]).reshape(2, 1, 1, 1, 1), (2, 2, 2, 2, 1))
    captions = jnp.arange(1, 3).reshape(2, 1, 1)
    data = denoiser.Data(mean, jnp.zeros_like(mean), captions, jnp.zeros(1, jnp.int32))
    predict = lambda params, z_t, t, context: params["a"] * z_t + context[:, :, :1, None]
    text = lambda params, ids: params["table"][ids][..., None]
    start = {"unet": {"a": jnp.zeros(())}, "text_encoder": {"table": jnp.zeros(3)}}
    _, ids = denoiser.draw(jax.random.key(0), data, cfg)
    assert {0, 1, 2} == set(np.unique(ids).tolist()), "16 draws at 30 % hold every caption and the empty one"
    options = {"predict_fn": predict, "text_fn": text, "num_steps": 100}
    state, info = jax.jit(partial(denoiser.run, **options))(
        jax.random.key(1), denoiser.init(start, cfg), data, alpha_bars(ScheduleConfig()), cfg
    )
    assert info.weighted[-20:].mean() < 0.8 * info.weighted[:5].mean()
    table = state.params["text_encoder"]["table"]
    assert table[1] * table[2] < 0, "the two captions mean opposite latents"


def test_learning_rate_warms_up_peaks_and_decays():
    rate = lambda step: float(warmup_cosine(step, 1.0, 10, 100, 0.1))
    assert rate(0) == pytest.approx(0.1)
    assert rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)


def test_moving_average_follows_early_and_settles_late():
    assert float(moving_average(0.0, 1.0, 0.99, 0)) == pytest.approx(0.9)
    assert float(moving_average(0.0, 1.0, 0.99, 10**6)) == pytest.approx(0.01)


def icon(held_out=False, style="noto", name="red apple"):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 16:48] = (200, 0, 0, 255)
    return corpus.Icon(style, name, "food-fruit", "1f34e", rgba, held_out)


def test_captions_and_composition():
    assert icon().captions[0] == "a noto icon of a red apple"
    assert icon(name="orange").captions[1] == "an icon of an orange"
    flat = corpus.composite(icon().rgba, (0, 0, 255))
    assert flat[0, 0].tolist() == [0, 0, 255]
    assert flat[32, 32].tolist() == [200, 0, 0]


def test_outline_is_drawn_around_the_silhouette():
    drawn = corpus.composite(corpus.outlined(icon().rgba, 1, (0, 0, 0)))
    assert drawn[16, 30].sum() < 60
    assert drawn[32, 32].tolist() == [200, 0, 0]
    assert drawn[5, 5].tolist() == [255, 255, 255]


def test_held_out_icons_stay_out_of_the_autoencoder_corpus():
    assert len(corpus.autoencoder_corpus([icon(), icon(held_out=True)], [], [], 64, 0)) <= 2
    with pytest.raises(ValueError, match="need at least one array"):
        corpus.autoencoder_corpus([icon(held_out=True)], [], [], 64, 0)


def test_reading_icons_without_the_packages_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="install\\(folder\\) first"):
        corpus.read_icons(tmp_path)


def test_packages_are_installed_without_their_scripts_and_failures_are_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: asked.append(command))
    corpus.install(tmp_path)
    assert "--ignore-scripts" in asked[0]
    assert set(corpus.PACKAGES) < set(asked[0])

    def failing(command, **options):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(ValueError, match="npm install must be able to install the icons"):
        corpus.install(tmp_path)
