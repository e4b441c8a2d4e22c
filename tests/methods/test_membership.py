"""Membership statistics against closed forms and hand computations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dmsec_jax.diffusion import draws, schedule
from dmsec_jax.diffusion.loss import monte_carlo_loss
from dmsec_jax.methods import membership
from dmsec_jax.metrics import evidence

SD = schedule.ScheduleConfig()
ALPHA_BAR = schedule.alpha_bars(SD)
EPS_FN = toy.eps_fn_of(ALPHA_BAR)
SHAPE = (4, 4, 1)
POINTS = jax.random.normal(jax.random.key(3), (8, *SHAPE))
BASE = toy.gaussian(jnp.zeros(SHAPE), 1.0)
TUNED = toy.blend(BASE, toy.memoriser(POINTS[:4], 0.1), 0.5)


def model(world):
    return lambda z_t, t: EPS_FN(world, z_t, t, toy.empty_context(len(z_t)))


def linear(scale):
    """The exact noise prediction for N(0, scale^2 I)."""
    return model(toy.gaussian(jnp.zeros(SHAPE), scale))


def test_every_test_tells_a_planted_memoriser():
    key = jax.random.key(0)
    neighbours = POINTS + 0.3 * jax.random.normal(key, (3, *POINTS.shape))
    tuned, base, grid = model(TUNED), model(BASE), (100, 200, 300)
    statistics = {
        "loss": membership.loss(key, tuned, POINTS, SD, num_draws=64, window=(50, 500)),
        "loss-difference": membership.loss_difference(
            key, base, tuned, POINTS, SD, num_draws=64, window=(50, 500)
        ).mean,
        "pia": membership.pia(tuned, POINTS, SD, timesteps=grid),
        "pian": membership.pia(tuned, POINTS, SD, timesteps=grid, normalised=True),
        "pfami": membership.pfami(key, tuned, POINTS, neighbours, SD, timesteps=grid),
        "clid": membership.clid(key, tuned, base, POINTS, SD, num_draws=64, window=(50, 500)),
    }
    for name, statistic in statistics.items():
        score = membership.SIGN[name] * np.asarray(statistic)
        assert evidence.auc(score[:4], score[4:]).value == 1.0, name


def test_losses_are_unbiased_and_in_closed_form():
    found = membership.loss(jax.random.key(1), linear(0.5), 0 * POINTS[:2], SD, num_draws=4000, window=(300, 301))
    a = float(ALPHA_BAR[300])
    # z0 = 0: prediction is (1 - a) / v eps with v = a s^2 + 1 - a, so the error is a s^2 / v eps
    expected = (a * 0.25 / (a * 0.25 + 1 - a)) ** 2
    np.testing.assert_allclose(found, expected, rtol=0.05)


def test_common_draws_make_equal_models_equal():
    same = membership.loss_difference(jax.random.key(0), model(BASE), model(BASE), POINTS, SD, num_draws=8)
    assert (same.mean == 0).all()
    apart = membership.loss_difference(
        jax.random.key(0), model(BASE), model(BASE), POINTS, SD, num_draws=8, common=False
    )
    assert (jnp.abs(apart.mean) > 0).all()


@pytest.mark.slow  # compiles for long
def test_difference_is_a_paired_t_statistic():
    key = jax.random.key(5)
    found = membership.loss_difference(key, model(BASE), model(TUNED), POINTS, SD, num_draws=16)
    gaps = [np.asarray(monte_carlo_loss(key, model(w), ALPHA_BAR, POINTS, num_draws=16)) for w in (BASE, TUNED)]
    gap = gaps[0] - gaps[1]
    np.testing.assert_allclose(found.mean, gap.mean(1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.t_statistic, gap.mean(1) / (gap.std(1, ddof=1) / 4), rtol=1e-3)


def test_secmi_on_a_gaussian_is_analytic():
    """eps = sqrt(1-a) x / v(a) is linear, so DDIM multiplies x by known factors."""
    scale, t, interval = 0.5, 100, 10
    a = np.append(np.asarray(schedule.alpha_bars64(SD)), 1.0)  # index -1 is clean

    def moved(x, here, there, seen):
        noise = np.sqrt(1 - a[seen]) / (a[seen] * scale**2 + 1 - a[seen])  # eps / x at the level the network is told
        clean = (1 - np.sqrt(1 - a[here]) * noise) / np.sqrt(a[here])
        return x * (np.sqrt(a[there]) * clean + np.sqrt(1 - a[there]) * noise)

    x = np.asarray(POINTS, np.float64)
    for here in range(0, t, interval):
        x = moved(x, -1 if here == 0 else here, here + interval, max(here, 0))
    there = moved(x, t, t + interval, t)
    back = moved(there, t + interval, t, t + interval)
    found = membership.secmi(linear(scale), POINTS, SD, t=t, interval=interval)
    np.testing.assert_allclose(found, np.square(back - x).sum(axis=(1, 2, 3)), rtol=2e-2)


def test_pia_of_a_constant_prediction_is_zero():
    constant = lambda z_t, t: jnp.ones_like(z_t)
    assert (membership.pia(constant, POINTS, SD, timesteps=(100, 500)) == 0).all()
    scaled = membership.pia(constant, POINTS, SD, normalised=True)
    np.testing.assert_allclose(scaled, 16 * (1 - np.sqrt(2 / np.pi)) ** 4, rtol=1e-4)  # |sqrt(2 / pi) - 1|^4 per entry


@pytest.mark.parametrize("normalised", [False, True])
def test_pia_by_hand(normalised):
    found = membership.pia(linear(0.5), POINTS, SD, timesteps=(200, 300), power=3.0, normalised=normalised)
    eps = lambda z, t: np.asarray(linear(0.5)(jnp.asarray(z), jnp.full(8, t)))
    z0 = np.asarray(POINTS)
    e0 = eps(z0, 0)
    if normalised:
        e0 = e0 / np.abs(e0).mean(axis=(1, 2, 3), keepdims=True) * np.sqrt(2 / np.pi)
        np.testing.assert_allclose(np.abs(e0).mean(axis=(1, 2, 3)), np.sqrt(2 / np.pi), rtol=1e-5)
    expected = 0
    for t in (200, 300):
        a = float(ALPHA_BAR[t])
        error = e0 - eps(np.sqrt(a) * z0 + np.sqrt(1 - a) * e0, t)
        expected = expected + (np.abs(error) ** 3).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.slow  # compiles for long
def test_a_model_of_velocities_has_the_same_statistics():
    velocity = dataclasses.replace(SD, prediction_type="v_prediction")
    eps_fn = linear(0.5)

    def v_fn(z_t, t):
        a = ALPHA_BAR[t][:, None, None, None]
        return (eps_fn(z_t, t) - jnp.sqrt(1 - a) * z_t) / jnp.sqrt(a)

    key = jax.random.key(0)
    for statistic in (
        lambda f, s: membership.loss(key, f, POINTS, s, num_draws=4),
        lambda f, s: membership.pia(f, POINTS, s),
        lambda f, s: membership.secmi(f, POINTS, s),
    ):
        np.testing.assert_allclose(statistic(v_fn, velocity), statistic(eps_fn, SD), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("variant", [1, 2])
def test_gradient_norms_of_a_scale_are_by_hand(variant):
    predict = lambda params, z_t, t: params["a"] * z_t + params["b"]
    params = {"a": jnp.float32(0.5), "b": jnp.zeros(SHAPE)}
    key, grid = jax.random.key(2), (100, 400)
    found = membership.gradient_norms(key, predict, params, POINTS[:3], SD, timesteps=grid, variant=variant)
    keys = draws.example_keys(key, jnp.arange(3))
    gradients = []
    for m, t in enumerate(grid):
        noise = np.stack([jax.random.normal(jax.random.fold_in(own, m), SHAPE) for own in keys])
        a = float(ALPHA_BAR[t])
        z_t = np.sqrt(a) * np.asarray(POINTS[:3]) + np.sqrt(1 - a) * noise
        error = 2 * (0.5 * z_t - noise) / 16
        gradients.append(((error * z_t).sum(axis=(1, 2, 3)), error))
    norm = lambda a, b: np.stack([np.abs(a), np.sqrt(np.square(b).sum(axis=(1, 2, 3)))], axis=1)
    if variant == 1:
        expected = norm(*(np.mean([g[i] for g in gradients], axis=0) for i in (0, 1)))
    else:
        expected = np.mean([norm(*g) for g in gradients], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow  # compiles for long
def test_batches_do_not_change_results():
    key = jax.random.key(0)
    index = jnp.arange(8)
    for statistic in (
        lambda z, i: membership.loss(key, model(TUNED), z, SD, num_draws=4, index=i),
        lambda z, i: membership.pfami(key, model(TUNED), z, (z + 0.1)[None], SD, timesteps=(100, 200), index=i),
    ):
        whole = statistic(POINTS, index)
        parts = jnp.concatenate([statistic(POINTS[:4], index[:4]), statistic(POINTS[4:], index[4:])])
        np.testing.assert_allclose(whole, parts, rtol=1e-3, atol=1e-5)


def test_bad_options_are_refused():
    for call in (
        lambda: membership.secmi(model(BASE), POINTS, SD, t=105, interval=10),
        lambda: membership.secmi(model(BASE), POINTS, SD, t=990, interval=10),
    ):
        with pytest.raises(ValueError, match="a multiple of interval=10 below 990"):
            call()
    with pytest.raises(ValueError, match="timesteps in 0..999"):
        membership.pia(model(BASE), POINTS, SD, timesteps=(1000,))
    with pytest.raises(ValueError, match="1 or 2"):
        membership.gradient_norms(jax.random.key(0), lambda p, z, t: z, {}, POINTS, SD, timesteps=(1,), variant=3)
