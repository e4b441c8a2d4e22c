"""The denoising loss on models whose loss is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion import draws, loss, schedule
from dmsec_jax.diffusion.schedule import ScheduleConfig

KEY = jax.random.key(3)
ALPHA_BAR = schedule.alpha_bars(ScheduleConfig())
KINDS = ["epsilon", "sample", "v_prediction"]


def zero(z_t, t):
    return jnp.zeros_like(z_t)


def gaussian(mean, var):
    """The perfect noise prediction for z_0 ~ N(mean, var I)."""

    def model_fn(z_t, t):
        alpha, sigma = schedule.levels(ALPHA_BAR, t, z_t)
        return sigma * (z_t - alpha * mean) / (alpha**2 * var + sigma**2)

    return model_fn


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_model_pays_the_target_s_energy(kind, strict):
    z0, noise = jnp.full((2, 3, 3, 1), 2.0), jnp.full((2, 3, 3, 1), 3.0)
    t = jnp.array([0, 600], jnp.int32)
    a = np.asarray(ALPHA_BAR)[[0, 600]]
    expected = {"epsilon": [9, 9], "sample": [4, 4], "v_prediction": (3 * np.sqrt(a) - 2 * np.sqrt(1 - a)) ** 2}[kind]
    got = loss.denoising_loss(zero, ALPHA_BAR, z0, t, noise, kind)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_each_example_has_its_own_loss():
    z0, noise = jax.random.normal(jax.random.key(0), (2, 4, 2, 2, 1))
    t = jnp.array([5, 900, 300, 77])
    whole = loss.denoising_loss(gaussian(0.3, 0.5), ALPHA_BAR, z0, t, noise)
    single = loss.denoising_loss(gaussian(0.3, 0.5), ALPHA_BAR, z0[2:3], t[2:3], noise[2:3])
    np.testing.assert_allclose(single[0], whole[2], rtol=1e-6)


def test_losses_of_the_three_types_agree_up_to_their_weights():
    z0, noise = jax.random.normal(jax.random.key(0), (2, 4, 6))
    t = jnp.array([5, 900, 300, 77])
    eps_fn = gaussian(0.3, 0.5)

    def as_v(z_t, t):
        eps = eps_fn(z_t, t)
        return schedule.velocity(ALPHA_BAR, schedule.to_x0(ALPHA_BAR, eps, z_t, t), eps, t)

    as_x0 = lambda z_t, t: schedule.to_x0(ALPHA_BAR, eps_fn(z_t, t), z_t, t)
    ratio = np.asarray(loss.snr(ALPHA_BAR, t))
    eps_loss = np.asarray(loss.denoising_loss(eps_fn, ALPHA_BAR, z0, t, noise, "epsilon"))
    x0_loss = loss.denoising_loss(as_x0, ALPHA_BAR, z0, t, noise, "sample")
    v_loss = loss.denoising_loss(as_v, ALPHA_BAR, z0, t, noise, "v_prediction")
    np.testing.assert_allclose(x0_loss * ratio, eps_loss, rtol=2e-3)
    np.testing.assert_allclose(v_loss, eps_loss * (1 + ratio) / ratio, rtol=2e-3)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_makes_every_type_weigh_alike(gamma):
    t = jnp.array([0, 50, 300, 999])
    ratio = np.asarray(loss.snr(ALPHA_BAR, t))
    weights = {kind: np.asarray(loss.min_snr_weights(ALPHA_BAR, t, gamma, kind)) for kind in KINDS}
    np.testing.assert_allclose(weights["sample"], np.minimum(ratio, gamma), rtol=1e-5)
    np.testing.assert_allclose(weights["epsilon"] * ratio, weights["sample"], rtol=1e-5)
    np.testing.assert_allclose(weights["v_prediction"] * (1 + ratio), weights["sample"], rtol=1e-5)


def test_min_snr_without_signal_is_finite():
    alpha_bar = schedule.alpha_bars(ScheduleConfig(rescale_betas_zero_snr=True))
    last = jnp.array([999])
    assert [float(loss.min_snr_weights(alpha_bar, last, 5.0, kind)[0]) for kind in KINDS] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="prediction_type"):
        loss.min_snr_weights(alpha_bar, last, 5.0, "flow")


@pytest.mark.parametrize("draw", [draws.uniform_draw, draws.stratified_draw, draws.antithetic_draw])
def test_monte_carlo_mean_is_the_expected_loss(draw):
    mean, var = 0.5, 0.25
    z0 = mean + np.sqrt(var) * jax.random.normal(jax.random.key(9), (64, 16))
    evaluate = lambda key: loss.monte_carlo_loss(
        key, gaussian(mean, var), ALPHA_BAR, z0, num_draws=32, draw=draw, chunk=8
    )
    got = np.asarray(jax.jit(evaluate)(KEY))
    assert got.shape == (64, 32)
    a = np.asarray(ALPHA_BAR)
    expected = np.mean(a * var / (a * var + 1 - a))  # E|eps - eps*|^2 of a Gaussian, averaged over t
    error = got.mean(axis=1).std() / np.sqrt(64)
    assert abs(got.mean() - expected) < 5 * error
    assert error < 0.02


@pytest.mark.slow  # compiles for long
def test_draws_do_not_depend_on_batch_or_chunk():
    z0 = jax.random.normal(jax.random.key(1), (5, 3, 2))
    call = lambda z0, index, chunk: loss.monte_carlo_loss(
        KEY, gaussian(0.1, 0.3), ALPHA_BAR, z0, num_draws=6, index=index, window=(20, 400), chunk=chunk
    )
    whole = call(z0, jnp.arange(5), 1)
    np.testing.assert_allclose(call(z0, jnp.arange(5), 4), whole, rtol=1e-5)
    np.testing.assert_allclose(call(z0[3:4], jnp.array([3]), 1), whole[3:4], rtol=1e-5)
    np.testing.assert_array_equal(loss.monte_carlo_loss(
        KEY, gaussian(0.1, 0.3), ALPHA_BAR, z0, num_draws=6, window=(20, 400)), whole)  # fmt: skip


def test_two_models_see_the_same_draws():
    z0 = jax.random.normal(jax.random.key(1), (3, 4))
    run = lambda fn: loss.monte_carlo_loss(KEY, fn, ALPHA_BAR, z0, num_draws=200)
    first, second = run(gaussian(0.0, 1.0)), run(gaussian(0.02, 1.0))
    difference = np.asarray(first - second)
    assert difference.std() < np.asarray(first).std() / 10


def test_gradients_flow_to_the_latent():
    z0 = jax.random.normal(jax.random.key(1), (2, 4))
    objective = lambda z: loss.monte_carlo_loss(KEY, gaussian(0.0, 0.01), ALPHA_BAR, z, num_draws=4).sum()
    grad = jax.grad(objective)(z0)
    assert (np.sign(grad) == np.sign(z0)).all()  # the loss grows away from the mean, 0


@pytest.mark.parametrize("window", [(0, 1001), (5, 5), (-1, 10)])
def test_windows_outside_the_schedule_are_refused(window):
    with pytest.raises(ValueError, match="window must be"):
        loss.monte_carlo_loss(KEY, zero, ALPHA_BAR, jnp.ones((1, 2)), num_draws=1, window=window)
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        loss.monte_carlo_loss(KEY, zero, ALPHA_BAR, jnp.ones((1, 2)), num_draws=0)


def test_grid_loss_asks_at_each_timestep():
    z0 = jnp.zeros((3, 50))
    grid = np.array([0, 10, 999])
    got = loss.grid_loss(KEY, lambda z_t, t: jnp.ones_like(z_t) * t[:, None], ALPHA_BAR, z0, grid)
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, np.broadcast_to(grid**2 + 1, (3, 3)), rtol=0.8)
    same = loss.grid_loss(
        KEY, lambda z_t, t: jnp.ones_like(z_t) * t[:, None], ALPHA_BAR, z0[1:2], grid, index=jnp.array([1])
    )
    np.testing.assert_allclose(same, got[1:2], rtol=1e-6)
    noise_only = np.asarray(loss.grid_loss(KEY, zero, ALPHA_BAR, z0, grid))
    assert np.unique(noise_only).size == noise_only.size
    with pytest.raises(ValueError, match=r"timesteps must be in 0\.\.999"):
        loss.grid_loss(KEY, zero, ALPHA_BAR, z0, np.array([1000]))
