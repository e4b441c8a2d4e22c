"""FineXtract on distributions whose denoisers are known in closed form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion import guidance, multistep, schedule
from dmsec_jax.methods import finextract
from dmsec_jax.metrics import clusters, extraction

SD = schedule.ScheduleConfig()
ALPHA_BAR = schedule.alpha_bars(SD)
LAMBDA = 0.4  # how far fine-tuning has come from the base distribution towards the pictures
SHAPE = (2, 2, 1)


def mixture_eps(z_t, t, means, std):
    """The exact noise prediction for data from an equal mixture of N(mean, std^2 I); means [K, h, w, c]."""
    a = ALPHA_BAR[t][:, None, None, None]
    variance = a * std**2 + 1 - a
    shifted = z_t[:, None] - jnp.sqrt(a)[:, None] * means  # [B, K, h, w, c]
    weight = jax.nn.softmax(-0.5 * jnp.sum(shifted**2, axis=(2, 3, 4)) / variance[:, 0, 0], axis=1)
    return jnp.sqrt(1 - a) / variance * jnp.einsum("bk,bkhwc->bhwc", weight, shifted)


def base_eps(z_t, t):
    return mixture_eps(z_t, t, jnp.zeros((1, *z_t.shape[1:])), 1.0)


def target_eps(params, z_t, t):
    return mixture_eps(z_t, t, params["means"], params["std"])


def tuned_eps(params, z_t, t):
    return (1 - LAMBDA) * base_eps(z_t, t) + LAMBDA * target_eps(params, z_t, t)


def pair(params, z_t, t):
    return base_eps(z_t, t), tuned_eps(params, z_t, t)


def pair_of_velocities(params, z_t, t):
    a = ALPHA_BAR[t][:, None, None, None]
    return tuple((eps - jnp.sqrt(1 - a) * z_t) / jnp.sqrt(a) for eps in pair(params, z_t, t))


PLAIN = finextract.alone(tuned_eps)
TARGET = finextract.alone(target_eps)
GAUSSIAN = {"means": jnp.full((1, *SHAPE), 2.0), "std": jnp.float32(0.5)}
EXACT = finextract.Config(w=1 / LAMBDA, k=0.0, num_steps=10)


def extract(cfg, *, params=GAUSSIAN, count=5, batch_size=5, pair_fn=pair, **options):
    options = {"shape": SHAPE, "schedule": SD} | options
    return finextract.extract(
        jax.random.key(1), params, cfg, count=count, batch_size=batch_size, pair_fn=pair_fn, **options
    )


def protocol_case():
    batch = (finextract.start_noise(jax.random.key(5), jnp.arange(3), SHAPE), jnp.arange(3))
    return {
        "cfg": finextract.Config(w=2.0, k=-0.02, num_steps=4),
        "params": GAUSSIAN,
        "init": batch,
        "step": (),
        "run": batch,
        "options": {"pair_fn": pair, "schedule": SD, "x0_fn": guidance.std_threshold},
    }


def test_guidance_identities():
    eps_base, eps_tuned = jax.random.normal(jax.random.key(0), (2, 3, *SHAPE))
    at = lambda w, k: finextract.Config(w=w, k=k)
    np.testing.assert_allclose(finextract.guided(eps_base, eps_tuned, at(1.0, 0.0)), eps_tuned, rtol=1e-5, atol=1e-6)
    assert (finextract.guided(eps_base, eps_base, at(7.0, 0.0)) == eps_base).all()
    assert (finextract.guided(eps_base, eps_tuned, at(0.0, 0.0)) == eps_base).all()
    expected = (1 - 3.0 - 0.02) * eps_base + 3.0 * eps_tuned
    np.testing.assert_allclose(finextract.guided(eps_base, eps_tuned, at(3.0, -0.02)), expected, rtol=1e-4, atol=1e-5)
    by_caption = finextract.guided_by_caption(eps_base, eps_tuned, at(3.0, -0.02))
    np.testing.assert_allclose(by_caption, expected + 0.02 * eps_base, rtol=1e-4, atol=1e-5)


def test_guidance_of_one_over_lambda_samples_the_training_distribution():
    found = extract(EXACT)
    wanted = extract(EXACT, pair_fn=TARGET, guide_fn=finextract.plain)
    np.testing.assert_allclose(found.images, wanted.images, rtol=1e-3, atol=1e-4)
    tuned = extract(EXACT, pair_fn=PLAIN, guide_fn=finextract.plain)
    assert np.abs(tuned.images - wanted.images).max() > 0.1


def test_extracted_moments_are_those_of_the_training_distribution():
    images = extract(dataclasses.replace(EXACT, num_steps=50), count=2000, batch_size=2000).images
    start = 2.0 * float(jnp.sqrt(ALPHA_BAR[981]))  # sampling starts around 0, not around the mean at the first timestep
    assert abs(images.mean() - (2.0 - 0.5 * start)) < 0.02
    assert abs(images.std() - 0.5) < 0.03  # 50 DDIM steps lose a little variance


def test_four_memorised_pictures_come_out():
    pictures = jax.random.normal(jax.random.key(3), (4, 4, 4, 1))
    params = {"means": pictures, "std": jnp.float32(0.3)}

    def unit(rows):
        flat = np.asarray(rows).reshape(len(rows), -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    def scores(**options):
        features = unit(extract(EXACT, params=params, count=40, batch_size=40, shape=(4, 4, 1), **options).images)
        found = finextract.extracted_set(features, 4, partition_fn=clusters.agglomerate)
        return extraction.best_matches(unit(pictures), features[[c.medoid for c in found]]).score

    guided, plain = scores(), scores(pair_fn=PLAIN, guide_fn=finextract.plain)
    assert extraction.success_rate(guided, 0.9) >= 0.75
    assert extraction.average_similarity(guided) > extraction.average_similarity(plain) + 0.05


def test_public_sampler_visits_the_documented_timesteps():
    sampler = finextract.public_ddim(SD, 50)
    assert len(multistep.pndm(SD, 50).timesteps) == 51
    assert sampler.num_steps == 50
    assert sampler.timesteps.tolist() == [981, 961, 961, *range(941, 20, -20)]
    assert finextract.clean_ddim(SD, 50).timesteps.tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize("num_steps", [50, 7])
def test_public_sampler_is_the_public_arithmetic(num_steps):
    cfg = finextract.Config(num_steps=num_steps)
    z = np.asarray(finextract.start_noise(jax.random.split(jax.random.key(1))[0], jnp.arange(5), SHAPE), np.float64)
    found = extract(cfg, sampler_fn=finextract.public_ddim).images
    alpha_bar = schedule.alpha_bars64(SD)
    stride = 1000 // num_steps
    grid = np.arange(num_steps)[::-1] * stride + 1
    predict = jax.jit(lambda z, t: pair(GAUSSIAN, z, jnp.full(5, t)))
    for t in [grid[0], grid[1], *grid[1:-1]]:
        eps_base, eps_tuned = (np.asarray(eps, np.float64) for eps in predict(jnp.float32(z), int(t)))
        eps = (1 - 3.0 - 0.02) * eps_base + 3.0 * eps_tuned
        x0 = (z - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t])
        there = alpha_bar[max(1, t - stride)]
        z = np.sqrt(there) * x0 + np.sqrt(1 - there) * eps
    np.testing.assert_allclose(found, z, rtol=1e-3, atol=1e-3)


def test_batches_do_not_change_results():
    whole = extract(EXACT, count=5, batch_size=5)
    for size in (2, 3):
        parts = extract(EXACT, count=5, batch_size=size)
        np.testing.assert_allclose(parts.images, whole.images, rtol=1e-5, atol=1e-6)
    fewer = extract(EXACT, count=3, batch_size=5)
    np.testing.assert_allclose(fewer.images, whole.images[:3], rtol=1e-5, atol=1e-6)


def test_sweep_is_separate_runs():
    grid = finextract.Config(w=jnp.array([1.0, 2.0, 3.0]), k=jnp.array([0.0, -0.02, 0.02]), num_steps=10)
    seen = []
    swept = finextract.sweep(
        jax.random.key(1),
        GAUSSIAN,
        grid,
        count=3,
        shape=SHAPE,
        batch_size=5,
        pair_fn=pair,
        schedule=SD,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert swept.images.shape == (3, 3, *SHAPE)
    assert swept.finite.all()
    assert seen == [(5, 9), (9, 9)]
    for g in range(3):
        alone = extract(finextract.Config(w=float(grid.w[g]), k=float(grid.k[g]), num_steps=10), count=3)
        np.testing.assert_allclose(swept.images[g], alone.images, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(swept.rms[g], np.sqrt((alone.images**2).mean((1, 2, 3))), rtol=1e-5)


def test_fifty_steps_are_one_program_for_all_batches_and_guidances():
    traces, programs = [], finextract._sample_chunk._cache_size()

    def counted(params, z_t, t):
        traces.append(1)
        return pair(params, z_t, t)

    for w, count in ((2.0, 5), (3.0, 7)):
        extract(finextract.Config(w=w, k=0.0, num_steps=50), count=count, batch_size=2, pair_fn=counted)
    assert finextract._sample_chunk._cache_size() == programs + 1
    assert len(traces) == 1, "a loop, not fifty copies"


def test_velocity_models_are_mixed_as_noise():
    cfg = dataclasses.replace(EXACT, k=-0.05)
    velocity = dataclasses.replace(SD, prediction_type="v_prediction")
    as_noise, as_velocity = extract(cfg), extract(cfg, pair_fn=pair_of_velocities, schedule=velocity)
    np.testing.assert_allclose(as_velocity.images, as_noise.images, rtol=1e-3, atol=1e-3)


def test_multistep_baseline_runs_under_the_same_protocol():
    plms = functools.partial(extract, EXACT, pair_fn=TARGET, guide_fn=finextract.plain)
    np.testing.assert_allclose(plms(sampler_fn=multistep.pndm).images, plms().images, atol=0.3)


def test_lone_model_is_evaluated_once():
    calls = []

    def counted(params, z_t, t):
        calls.append(1)
        return z_t

    first, second = finextract.alone(counted)({}, jnp.ones((1, *SHAPE)), jnp.zeros(1, jnp.int32))
    assert first is second
    assert len(calls) == 1


def test_batch_threshold_couples_images():
    x0 = 3.0 * jax.random.normal(jax.random.key(2), (2, *SHAPE))
    one, both = finextract.std_threshold_batch(x0[:1]), finextract.std_threshold_batch(x0)
    np.testing.assert_allclose(one, guidance.std_threshold(x0)[:1], rtol=1e-6)
    np.testing.assert_allclose(both, x0 / np.std(np.asarray(x0), ddof=1), rtol=1e-5)
    assert np.abs(both[0] - one[0]).max() > 0.01
    assert (finextract.std_threshold_batch(0.1 * x0) == 0.1 * x0).all()


def test_hook_acts_inside_the_sampler():
    key_start, _ = jax.random.split(jax.random.key(1))
    z_T = finextract.start_noise(key_start, jnp.arange(5), SHAPE)
    found = extract(EXACT, x0_fn=jnp.zeros_like).images  # without a clean part, only the noise level changes
    first = finextract.clean_ddim(SD, EXACT.num_steps).timesteps[0]
    np.testing.assert_allclose(found, z_T * np.sqrt((1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[first])), rtol=1e-3)


def test_exploded_images_are_flagged_and_kept_apart():
    grid = finextract.Config(w=jnp.array([1.0, 1e38]), k=jnp.zeros(2), num_steps=10)
    options = {"count": 5, "shape": SHAPE, "batch_size": 5, "pair_fn": pair, "schedule": SD}
    found = finextract.sweep(jax.random.key(1), GAUSSIAN, grid, **options)
    assert found.finite.tolist() == [[True] * 5, [False] * 5]
    assert np.isfinite(found.images[found.finite]).all()
    hopeless = dataclasses.replace(grid, w=jnp.array([2e38, 1e38]))
    with pytest.raises(
        finextract.NoneFinite, match=r"none finite of 5 at \(w=2e\+38, k=0\), \(w=1e\+38, k=0\); use a weaker one"
    ):
        finextract.sweep(jax.random.key(1), GAUSSIAN, hopeless, **options)


def test_pictures_that_decode_to_nan_are_flagged():
    def finish(latent):
        assert latent.shape[0] == 2  # the last batch is filled up, so that finish_fn compiles once
        return np.where(np.asarray(latent[:, :1, 0, 0]) > 2.0, np.nan, 1.0)

    latents = extract(EXACT, count=5).images
    found = extract(EXACT, count=5, batch_size=2, finish_fn=finish)
    assert found.finite.tolist() == (latents[:, 0, 0, 0] <= 2.0).tolist()
    assert 0 < found.finite.sum() < 5


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="count must be at least 1"):
        extract(EXACT, count=0)
    with pytest.raises(ValueError, match=r"grid must be w and k of one shape \[G\]"):
        finextract.sweep(
            jax.random.key(0), GAUSSIAN, EXACT, count=1, shape=SHAPE, batch_size=1, pair_fn=pair, schedule=SD
        )


def memorised(sizes):
    """Copies of pictures in one style: similarity 1 to copies, 0.5 to other pictures."""
    rows = np.concatenate([np.eye(len(sizes)), np.ones((len(sizes), 1))], axis=1) / np.sqrt(2)
    return np.repeat(rows, sizes, axis=0)


def test_extracted_set_is_ranked_and_capped():
    features = memorised([5, 4, 3, 1, 1])
    found = finextract.extracted_set(features, 3)
    assert [cluster.members for cluster in found] == [tuple(range(5)), tuple(range(5, 9)), tuple(range(9, 12))]


def test_public_set_is_not_capped():
    features = memorised([5, 4, 3, 1, 1])
    found = finextract.extracted_set_public(0, features, 3)
    assert sorted(cluster.size for cluster in found) == [1, 1, 3, 4, 5]
    assert finextract.extracted_set_public(0, np.tile([[1.0, 0.0]], (4, 1)), 2) == ()


def test_unknown_number_of_pictures():
    found = finextract.extracted_set_unknown(memorised([5, 4, 3, 1, 1]))
    assert [cluster.size for cluster in found] == [5, 4, 3]
    assert all(0 < cluster.confidence <= 1 for cluster in found)
