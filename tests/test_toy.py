"""The analytic world is itself checked: against its own log-density, Bayes' rule by sampling, and known limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stats
import toy

ALPHA_BAR = toy.alpha_bars()
EPS_FN = jax.jit(toy.eps_fn_of(ALPHA_BAR))
LOG_DENSITY = jax.jit(toy.log_density)
SAMPLE = jax.jit(toy.sample, static_argnums=2)
SHAPE = (2, 2, 1)
POINTS = np.array([[1.0, -1, 0.5, 0], [-1, 1, 0, 0.5], [0, 0.2, -0.9, 1]]).reshape(3, *SHAPE)
PROMPTS = np.eye(3, toy.WIDTH) * 3


@jax.jit
def noised(key, z_0, t):
    noise = jax.random.normal(key, z_0.shape)
    a = ALPHA_BAR[t][:, None, None, None]
    return jnp.sqrt(a) * z_0 + jnp.sqrt(1 - a) * noise, noise


def test_schedule_is_stable_diffusions():
    assert ALPHA_BAR.shape == (1000,)
    assert ALPHA_BAR.dtype == jnp.float32
    assert bool((jnp.diff(ALPHA_BAR) < 0).all())
    np.testing.assert_allclose(ALPHA_BAR[0], 1 - 0.00085, rtol=1e-6)
    np.testing.assert_allclose(ALPHA_BAR[-1], 0.00466, rtol=1e-3)


@pytest.mark.parametrize("contextual", [False, True])
def test_eps_is_minus_the_scaled_score(strict, contextual):
    params = toy.mixture(POINTS, [0.1, 0.5, 1.0], weights=[1, 2, 3], prompts=PROMPTS)
    t = jnp.array([0, 10, 300, 999])
    z_t = jax.random.normal(jax.random.key(0), (4, *SHAPE))
    context = jax.random.normal(jax.random.key(1), (4, 3, toy.WIDTH)) * float(contextual)
    density = lambda z: toy.log_density(params, z, ALPHA_BAR[t], context).sum()
    expected = -jnp.sqrt(1 - ALPHA_BAR[t])[:, None, None, None] * jax.jit(jax.grad(density))(z_t)
    eps = jax.jit(toy.eps_fn_of(ALPHA_BAR))(params, z_t, t, context)
    np.testing.assert_allclose(eps, expected, rtol=1e-4, atol=1e-5)


def test_log_density_integrates_to_one():
    params = toy.mixture(np.array([-1.0, 0.5]).reshape(2, 1, 1, 1), [0.2, 0.4], weights=[1, 3], prompts=PROMPTS[:2])
    grid = jnp.linspace(-8, 8, 4001)
    context = jnp.broadcast_to(jnp.array([0.0, 1, 0, 0]), (len(grid), 1, toy.WIDTH))
    for a in (0.99, 0.3):
        log_p = LOG_DENSITY(params, grid[:, None, None, None], jnp.full(len(grid), a), context)
        np.testing.assert_allclose(np.trapezoid(np.exp(log_p), grid), 1, rtol=1e-4)


@pytest.mark.parametrize("t", [50, 400, 900])
def test_gaussian_residual_is_unbiased_and_its_loss_the_closed_form(t):
    params = toy.gaussian(POINTS[0], 0.7)
    keys = jax.random.split(jax.random.key(t))
    steps = jnp.full(20_000, t)
    z_t, noise = noised(keys[0], SAMPLE(keys[1], params, 20_000), steps)
    residual = np.asarray(noise - EPS_FN(params, z_t, steps, toy.empty_context(20_000)))
    stats.assert_mean(residual, 0, resolution=0.05)
    stats.assert_mean(residual * np.asarray(z_t), 0, resolution=0.1)  # orthogonality: no better estimate exists
    stats.assert_mean(residual**2, toy.gaussian_loss(float(ALPHA_BAR[t]), 0.7), resolution=0.05)


def test_mixture_beats_every_other_denoiser_on_its_own_data():
    params = toy.mixture(POINTS, 0.3, weights=[1, 1, 2])
    others = [toy.gaussian(POINTS.mean(0), 1.0), toy.mixture(POINTS, 0.3), toy.mixture(POINTS, 0.5, weights=[1, 1, 2])]
    keys = jax.random.split(jax.random.key(3))
    steps = jnp.full(20_000, 300)
    z_t, noise = noised(keys[0], SAMPLE(keys[1], params, 20_000), steps)
    loss = lambda p: np.mean((noise - EPS_FN(p, z_t, steps, toy.empty_context(20_000))) ** 2)
    assert all(loss(params) < loss(other) for other in others)


def test_memoriser_denoises_to_its_nearest_point():
    t = jnp.array([100, 100, 100])
    z_t, _ = noised(jax.random.key(5), jnp.asarray(POINTS, jnp.float32), t)
    a = ALPHA_BAR[t][:, None, None, None]
    eps = EPS_FN(toy.memoriser(POINTS), z_t, t, toy.empty_context(3))
    np.testing.assert_allclose((z_t - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a), POINTS, atol=1e-2)


def test_context_selects_a_point_and_zero_context_selects_none():
    params = toy.mixture(POINTS, 0.01, prompts=PROMPTS * 10)
    t = jnp.full(3, 999)
    z_t = jax.random.normal(jax.random.key(6), (3, *SHAPE))
    context = jnp.asarray(np.eye(3, toy.WIDTH), jnp.float32)[:, None]
    alone = [EPS_FN(toy.memoriser(p[None]), z_t[i : i + 1], t[:1], toy.empty_context(1)) for i, p in enumerate(POINTS)]
    np.testing.assert_allclose(EPS_FN(params, z_t, t, context), np.concatenate(alone), atol=1e-4)
    unconditional = EPS_FN(params, z_t, t, toy.empty_context(3))
    np.testing.assert_allclose(unconditional, EPS_FN(toy.memoriser(POINTS), z_t, t, context), atol=1e-6)


def test_blend_moves_from_base_to_tuned():
    base, tuned = toy.gaussian(np.zeros(SHAPE), 1.0), toy.memoriser(POINTS)
    z, a, context = jnp.asarray(POINTS, jnp.float32), jnp.full(3, 0.9), toy.empty_context(3)
    density = lambda params: np.exp(LOG_DENSITY(params, z, a, context))
    expected = 0.75 * density(base) + 0.25 * density(tuned)
    np.testing.assert_allclose(density(toy.blend(base, tuned, 0.25)), expected, rtol=1e-4)


def test_sample_has_the_weights_means_and_widths():
    params = toy.mixture(POINTS[:2] * 10, [0.5, 0.1], weights=[1, 3])
    draws = np.asarray(SAMPLE(jax.random.key(8), params, 20_000))
    first = draws[:, 0, 0, 0] > 0
    stats.assert_mean(first, 0.25, resolution=0.02)
    stats.assert_mean(draws[first] - POINTS[0] * 10, 0, resolution=0.05)
    stats.assert_mean((draws[~first] - POINTS[1] * 10) ** 2, 0.01, resolution=0.001)


def test_parameters_can_be_trained():
    params, t = toy.memoriser(POINTS), jnp.array([500])
    z_t = jax.random.normal(jax.random.key(9), (1, *SHAPE))
    loss = lambda p: (EPS_FN(p, z_t, t, toy.empty_context(1)) ** 2).sum()
    gradient = jax.jit(jax.grad(loss))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient["mean"]).max()) > 0
