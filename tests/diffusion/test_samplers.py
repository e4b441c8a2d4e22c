"""Samplers on models known in closed form; equality with diffusers is in tests/parity/test_samplers.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion import multistep, samplers, schedule
from dmsec_jax.diffusion.schedule import ScheduleConfig

SD = ScheduleConfig()
TO_ONE = ScheduleConfig(set_alpha_to_one=True)
ALPHA_BAR = schedule.alpha_bars(SD)
A64 = schedule.alpha_bars64(SD)
KEY = jax.random.key(5)
MEAN, VAR = 0.7, 0.3

DETERMINISTIC = {
    "ddim": samplers.ddim,
    "pndm": multistep.pndm,
    "pndm_prk": lambda cfg, n: multistep.pndm(dataclasses.replace(cfg, skip_prk_steps=False), n),
    "dpmpp_2m": multistep.dpmpp_2m,
    "dpmpp_2m_karras": lambda cfg, n: multistep.dpmpp_2m(cfg, n, spacing="karras"),
    "euler": samplers.euler,
}
STOCHASTIC = {
    "ddpm": samplers.ddpm,
    "ddpm_large": lambda cfg, n: samplers.ddpm(cfg, n, variance="fixed_large"),
    "ddim_eta": lambda cfg, n: samplers.ddim(cfg, n, eta=0.7),
    "euler_ancestral": samplers.euler_ancestral,
}


def gaussian(z_t, t):
    """The perfect noise prediction for z_0 ~ N(MEAN, VAR I)."""
    alpha, sigma = schedule.levels(ALPHA_BAR, t, z_t)
    return sigma * (z_t - alpha * MEAN) / (alpha**2 * VAR + sigma**2)


def oracle(z0):
    """The noise prediction of a model that knows the clean latent."""

    def model_fn(z_t, t):
        alpha, sigma = schedule.levels(ALPHA_BAR, t, z_t)
        return (z_t - alpha * z0) / sigma

    return model_fn


def sample(sampler, z_T, model_fn=gaussian, **more):
    return np.asarray(jax.jit(lambda key, z: samplers.sample(key, z, sampler, model_fn=model_fn, **more))(KEY, z_T))


def affine(sampler, model_fn=gaussian):
    """(slope, intercept) of a deterministic sampler on a Gaussian, where it is an affine map."""
    zero, one, two = sample(sampler, jnp.array([[0.0], [1.0], [2.0]]), model_fn)[:, 0]
    assert two - one == pytest.approx(one - zero, abs=1e-4)
    return one - zero, zero


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_a_model_that_knows_the_answer_gives_it(name):
    z0, z_T = jax.random.normal(KEY, (2, 3, 2, 2, 1))
    sampler = (DETERMINISTIC | STOCHASTIC)[name](TO_ONE, 20)
    np.testing.assert_allclose(sample(sampler, z_T, oracle(z0)), z0, atol=2e-5)


def test_ddim_ends_at_the_level_of_t_0_without_set_alpha_to_one():
    z0, noise = jax.random.normal(KEY, (2, 3, 4))
    z_T = schedule.add_noise(ALPHA_BAR, z0, noise, jnp.full(3, 981))
    z = sample(samplers.ddim(SD, 50), z_T, oracle(z0))
    np.testing.assert_allclose(z, schedule.add_noise(ALPHA_BAR, z0, noise, jnp.zeros(3, jnp.int32)), atol=2e-5)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gaussian_data_come_out_with_their_moments(name):
    cfg = dataclasses.replace(TO_ONE, steps_offset=0)
    sampler = DETERMINISTIC[name](cfg, 200)
    slope, intercept = affine(sampler)
    a = A64[int(sampler.timesteps[0])]
    exact = np.sqrt(VAR / (a * VAR + 1 - a))  # the probability-flow ODE maps standard deviations onto each other
    assert slope == pytest.approx(exact, rel=0.02)
    assert intercept == pytest.approx(MEAN - exact * np.sqrt(a) * MEAN, rel=0.02)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_have_the_moments_too(name):
    z_T = jax.random.normal(jax.random.key(1), (2, 10_000))
    z = sample(STOCHASTIC[name](dataclasses.replace(TO_ONE, steps_offset=0), 200), z_T)
    assert z.mean() == pytest.approx(MEAN, abs=0.03)
    assert z.var() == pytest.approx(VAR, rel=0.08)  # 7 % of it is discretisation


def error(name, num_steps):
    """Distance from the exact slope of the probability-flow ODE."""
    sampler = DETERMINISTIC[name](TO_ONE, num_steps)
    first = int(sampler.timesteps[0])
    return abs(affine(sampler)[0] - np.sqrt(VAR / (A64[first] * VAR + 1 - A64[first])))


def test_higher_order_pays():
    assert error("pndm", 20) < error("ddim", 20) / 4
    assert error("dpmpp_2m_karras", 20) < error("ddim", 20) / 4


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_karras", "pndm"])
def test_error_falls_with_steps(name):
    assert error(name, 100) < error(name, 10) / 5


@pytest.mark.parametrize("where", ["current", "target"])
def test_inversion_round_trip_improves_with_steps(where):
    z0 = MEAN + np.sqrt(VAR) * jax.random.normal(KEY, (4, 5))

    def round_trip(n):
        noisy = sample(samplers.ddim_inversion(SD, n, evaluate_at=where), z0)
        return np.abs(sample(samplers.ddim(SD, n), jnp.asarray(noisy)) - z0).max()

    errors = [round_trip(n) for n in (10, 40, 160)]
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < 0.05


def test_inversion_takes_its_own_steps():
    z0, noise = jax.random.normal(KEY, (2, 3, 4))
    z_100 = schedule.add_noise(ALPHA_BAR, z0, noise, jnp.full(3, 100))
    sampler = samplers.ddim_inversion(SD, [110, 120, 130], start=100)
    assert sampler.timesteps.tolist() == [100, 110, 120]
    z_130 = sample(sampler, z_100, oracle(z0))
    np.testing.assert_allclose(z_130, schedule.add_noise(ALPHA_BAR, z0, noise, jnp.full(3, 130)), atol=1e-5)
    assert samplers.ddim_inversion(SD, 4).timesteps.tolist() == [0, 1, 251, 501]
    assert samplers.ddim_inversion(SD, 4, evaluate_at="target").timesteps.tolist() == [1, 251, 501, 751]


def test_a_sampler_may_start_half_way():
    z0, noise = jax.random.normal(KEY, (2, 3, 4))
    z_500 = schedule.add_noise(ALPHA_BAR, z0, noise, jnp.full(3, 500))
    np.testing.assert_allclose(sample(samplers.ddim(TO_ONE, [500, 200, 30]), z_500, oracle(z0)), z0, atol=2e-5)
    to_200 = samplers.ddim(SD, [500, 350], previous=[350, 200])
    expected = schedule.add_noise(ALPHA_BAR, z0, noise, jnp.full(3, 200))
    np.testing.assert_allclose(sample(to_200, z_500, oracle(z0)), expected, atol=2e-5)


def test_plms_visits_its_second_timestep_twice():
    visited = multistep.pndm(SD, 50).timesteps.tolist()
    assert len(visited) == 51
    assert visited[:4] == [981, 961, 961, 941]
    assert visited[-2:] == [21, 1]
    assert sorted(set(visited)) == list(range(1, 1000, 20))


def test_ddim_over_the_plms_grid_stops_at_t_1():
    """The grid and jumps of a public extraction code: 50 entries of the PLMS list, each jumping to max(1, t - 20)."""
    visited = multistep.pndm(SD, 50).timesteps[:50]
    sampler = samplers.ddim(SD, visited, previous=np.maximum(1, visited - 20))
    assert sampler.timesteps.tolist() == [981, 961, 961, *range(941, 20, -20)]
    step = jax.jit(
        lambda state, i: sampler.step(KEY, state, i, model_fn=gaussian, x0_fn=samplers.identity, index=jnp.arange(1))
    )
    state = sampler.init(jnp.ones((1, 2)))
    for i in range(sampler.num_steps):
        before = state.z
        state = step(state, i)
    eps = gaussian(before, jnp.array([21]))
    x0 = schedule.to_x0(ALPHA_BAR, eps, before, jnp.array([21]))
    np.testing.assert_allclose(state.z, schedule.add_noise(ALPHA_BAR, x0, eps, jnp.array([1])), atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim_eta", "euler_ancestral"])
def test_an_image_does_not_depend_on_its_batch(name):
    z_T = jax.random.normal(jax.random.key(1), (4, 3, 2))
    sampler = STOCHASTIC[name](SD, 10)
    whole = sample(sampler, z_T)
    np.testing.assert_allclose(sample(sampler, z_T[2:3], index=jnp.array([2])), whole[2:3], rtol=1e-5, atol=1e-6)
    other = sample(sampler, z_T[2:3], index=jnp.array([7]))
    assert np.abs(other - whole[2:3]).max() > 0.05


@pytest.mark.parametrize("name", ["ddpm", "pndm", "dpmpp_2m"])
def test_sample_is_the_loop_over_step(name):
    sampler = (DETERMINISTIC | STOCHASTIC)[name](SD, 6)
    z_T = jax.random.normal(jax.random.key(1), (2, 3))
    step = jax.jit(lambda key, state, i: sampler.step(
        key, state, i, model_fn=gaussian, x0_fn=samplers.identity, index=jnp.arange(2)))  # fmt: skip
    state = sampler.init(z_T)
    for i in range(sampler.num_steps):
        state = step(jax.random.fold_in(KEY, i), state, i)
    np.testing.assert_allclose(sample(sampler, z_T), state.z, atol=1e-5)


def test_ancestral_samplers_are_one_family():
    cfg = dataclasses.replace(TO_ONE, steps_offset=0)
    z_T = jax.random.normal(jax.random.key(1), (2, 6))
    ddpm = sample(samplers.ddpm(cfg, 20), z_T)
    np.testing.assert_allclose(sample(samplers.ddim(cfg, 20, eta=1.0), z_T), ddpm, atol=1e-5)
    np.testing.assert_allclose(sample(samplers.euler_ancestral(cfg, 20), z_T), ddpm, atol=1e-5)
    np.testing.assert_allclose(sample(samplers.euler(cfg, 20), z_T), sample(samplers.ddim(cfg, 20), z_T), atol=1e-5)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_the_hook_decides_the_clean_latent(name):
    sampler = (DETERMINISTIC | STOCHASTIC)[name](TO_ONE, 10)
    z_T = jax.random.normal(jax.random.key(1), (2, 6))
    np.testing.assert_allclose(sample(sampler, z_T, x0_fn=lambda x0: jnp.full_like(x0, 0.3)), 0.3, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmpp_2m"])
def test_the_hook_keeps_the_latent_on_the_line_between_clean_and_noise(name):
    sampler = DETERMINISTIC[name](SD, 10)
    z_T = jnp.ones((1, 3))
    halve = lambda x0: 0.5 * x0
    state = sampler.step(KEY, sampler.init(z_T), 0, model_fn=gaussian, x0_fn=halve, index=jnp.arange(1))
    t, then = sampler.timesteps[0], multistep.pndm(SD, 10).timesteps[1] if name != "dpmpp_2m" else sampler.timesteps[1]
    x0 = halve(schedule.to_x0(ALPHA_BAR, gaussian(z_T, jnp.array([t])), z_T, jnp.array([t])))
    eps = (z_T - np.sqrt(A64[t]) * x0) / np.sqrt(1 - A64[t])
    np.testing.assert_allclose(state.z, np.sqrt(A64[then]) * x0 + np.sqrt(1 - A64[then]) * eps, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmpp_2m", "euler"])
def test_prediction_types_agree(kind, name):
    def model_fn(z_t, t):
        eps = gaussian(z_t, t)
        x0 = schedule.to_x0(ALPHA_BAR, eps, z_t, t)
        return schedule.target(ALPHA_BAR, x0, eps, t, kind)

    cfg = dataclasses.replace(SD, prediction_type=kind)
    z_T = jax.random.normal(jax.random.key(1), (2, 3))
    # a multistep method extrapolates another quantity then, so it agrees in the limit only
    steps, tolerance = (200, 1e-2) if name == "pndm" else (10, 2e-5)
    got = sample(DETERMINISTIC[name](cfg, steps), z_T, model_fn)
    np.testing.assert_allclose(got, sample(DETERMINISTIC[name](SD, steps), z_T), atol=tolerance)


def test_clipping_bounds_the_clean_latent():
    cfg = dataclasses.replace(TO_ONE, clip_sample=True, clip_sample_range=0.25)
    z_T = 3 * jax.random.normal(jax.random.key(1), (2, 6))
    for make in (samplers.ddim, samplers.ddpm):
        assert np.abs(sample(make(cfg, 10), z_T)).max() <= 0.25 + 1e-6


def test_bfloat16_predictions_keep_a_float32_state():
    half = lambda z_t, t: gaussian(z_t, t).astype(jnp.bfloat16)
    z = jax.eval_shape(
        lambda z: samplers.sample(KEY, z, multistep.pndm(SD, 5), model_fn=half), jnp.ones((1, 2), jnp.bfloat16)
    )
    assert z.dtype == jnp.float32


def test_one_step_of_the_gaussian_is_the_corruption_formula():
    """The clean estimate of a Gaussian model is m + sqrt(a) s^2 / (a s^2 + 1 - a) (x_t - sqrt(a) m)."""
    x_t = jax.random.normal(KEY, (5, 7))
    t = jnp.array([0, 50, 100, 500, 999])
    a = A64[np.asarray(t)][:, None]
    expected = MEAN + np.sqrt(a) * VAR / (a * VAR + 1 - a) * (np.asarray(x_t) - np.sqrt(a) * MEAN)
    np.testing.assert_allclose(schedule.to_x0(ALPHA_BAR, gaussian(x_t, t), x_t, t), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: samplers.ddim(SD, 10, eta=1.5), r"eta must be in \[0, 1\]"),
        (lambda: samplers.ddim(SD, []), "steps must be a number or a list"),
        (lambda: samplers.ddim(SD, [1000]), "steps must be a number or a list"),
        (lambda: samplers.ddim(SD, [-1, 5]), "steps must be a number or a list"),
        (lambda: samplers.ddim(SD, 3, previous=[1, 2]), "previous must be 3 timesteps"),
        (lambda: samplers.ddim(SD, 1, previous=[1000]), "previous must be 1 timesteps"),
        (lambda: samplers.ddim(SD, 0), r"num_steps must be in 1\.\.1000"),
        (lambda: samplers.ddpm(SD, 10, variance="learned"), "variance must be fixed_small or fixed_large"),
        (lambda: samplers.ddim_inversion(SD, [300, 100]), "ascending from start"),
        (lambda: samplers.ddim_inversion(SD, [100, 300], start=200), "ascending from start"),
        (lambda: samplers.ddim_inversion(SD, 4, evaluate_at="both"), "evaluate_at must be current or target"),
        (
            lambda: samplers.ddim_inversion(dataclasses.replace(TO_ONE, prediction_type="sample"), 4),
            "where alpha_bar = 1",
        ),
        (
            lambda: samplers.ddim(dataclasses.replace(SD, rescale_betas_zero_snr=True), [999, 500]),
            "where alpha_bar = 0",
        ),
        (lambda: multistep.pndm(dataclasses.replace(SD, skip_prk_steps=False), 3), "at least 4"),
        (lambda: multistep.dpmpp_2m(SD, 10, spacing="lu"), "spacing must be schedule or karras"),
        (lambda: multistep.dpmpp_2m(SD, 10, final="one"), "final must be zero or sigma_min"),
        (lambda: multistep.dpmpp_2m(SD, 0, spacing="karras"), "num_steps must be at least 1"),
    ],
)
def test_wrong_settings_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()
