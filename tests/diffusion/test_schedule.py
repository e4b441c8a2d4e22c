"""Tables and conversions of the forward process, against closed forms and hand-computed numbers."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core.config import from_dict, to_dict
from dmsec_jax.diffusion import schedule
from dmsec_jax.diffusion.schedule import ScheduleConfig

SD = ScheduleConfig()
DDPM = ScheduleConfig(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
ALPHA_BAR = schedule.alpha_bars(SD)


def test_stable_diffusion_s_constants():
    beta = 1.0 - schedule.alpha_bars64(SD)[1:] / schedule.alpha_bars64(SD)[:-1]
    assert beta[-1] == pytest.approx(0.012, rel=1e-9)
    assert ALPHA_BAR.shape == (1000,)
    assert ALPHA_BAR.dtype == jnp.float32
    assert float(ALPHA_BAR[0]) == pytest.approx(1 - 0.00085, abs=1e-7)
    assert float(ALPHA_BAR[999]) == pytest.approx(0.0046601, abs=5e-8)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alpha_bar_decreases_from_near_one(kind, zero_snr):
    cfg = ScheduleConfig(beta_schedule=kind, rescale_betas_zero_snr=zero_snr)
    alpha_bar = schedule.alpha_bars64(cfg)
    assert np.all(np.diff(alpha_bar) < 0)
    assert 0.99 < alpha_bar[0] < 1
    assert (alpha_bar[-1] == 0) == zero_snr
    assert alpha_bar[-1] >= 0
    plain = schedule.alpha_bars64(dataclasses.replace(cfg, rescale_betas_zero_snr=False))
    assert alpha_bar[0] == pytest.approx(plain[0], rel=1e-12)


def test_beta_schedules_at_their_ends():
    low, high = SD.beta_start, SD.beta_end
    linear = schedule.alpha_bars64(dataclasses.replace(SD, beta_schedule="linear"))
    assert linear[1] / linear[0] == pytest.approx(1 - (low + (high - low) / 999), rel=1e-12)
    sigmoid = schedule.alpha_bars64(dataclasses.replace(SD, beta_schedule="sigmoid"))
    assert 1 - sigmoid[0] == pytest.approx(low + (high - low) / (1 + np.exp(6)), rel=1e-9)
    cosine = schedule.alpha_bars64(dataclasses.replace(SD, beta_schedule="squaredcos_cap_v2"))
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    assert cosine[499] == pytest.approx(f(0.5) / f(0.0), rel=1e-9)
    assert 1 - cosine[-1] / cosine[-2] == pytest.approx(0.999)


def test_trained_betas_win():
    betas = (0.1, 0.2, 0.3)
    cfg = ScheduleConfig(num_train_timesteps=3, trained_betas=betas, steps_offset=0)
    np.testing.assert_allclose(schedule.alpha_bars64(cfg), [0.9, 0.72, 0.504])


def test_timesteps_of_the_three_spacings():
    at = lambda spacing, n: schedule.timesteps(dataclasses.replace(SD, timestep_spacing=spacing), n).tolist()
    assert at("leading", 4) == [751, 501, 251, 1]
    assert at("trailing", 4) == [999, 749, 499, 249]
    assert at("linspace", 4) == [999, 666, 333, 0]
    assert at("leading", 50)[:3] == [981, 961, 941]
    assert at("trailing", 7)[-1] == 142
    assert schedule.timesteps(SD, 3).dtype == np.int32


@hypothesis.given(st.integers(1, 1000), st.sampled_from(["leading", "trailing", "linspace"]))
def test_timesteps_are_distinct_and_inside(num_steps, spacing):
    visited = schedule.timesteps(ScheduleConfig(timestep_spacing=spacing, steps_offset=0), num_steps)
    assert len(visited) == num_steps
    assert np.all(np.diff(visited) < 0)
    assert visited[-1] >= 0
    assert visited[0] < 1000


def test_previous_by_stride_differs_from_the_list_where_diffusers_does():
    leading = schedule.timesteps(SD, 30)
    assert schedule.previous_by_stride(SD, 30).tolist() == [*leading[1:].tolist(), 1 - 33]
    linspace = dataclasses.replace(SD, timestep_spacing="linspace")
    assert schedule.previous_by_stride(linspace, 10)[:2].tolist() == [899, 788]
    assert schedule.timesteps(linspace, 10)[:3].tolist() == [999, 888, 777]


@pytest.mark.parametrize("num_steps", [0, 1001, -3])
def test_timesteps_refuse_counts_outside_training(num_steps):
    with pytest.raises(ValueError, match=r"num_steps must be in 1\.\.1000"):
        schedule.timesteps(SD, num_steps)


def test_offset_may_not_leave_the_schedule():
    with pytest.raises(ValueError, match="steps_offset=0"):
        schedule.timesteps(SD, 1000)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_conversions_invert_the_forward_process(kind, strict):
    key_z, key_noise = jax.random.split(jax.random.key(0))
    z0, noise = jax.random.normal(key_z, (5, 2, 2, 3)), jax.random.normal(key_noise, (5, 2, 2, 3))
    t = jnp.array([0, 1, 400, 800, 999], jnp.int32)
    z_t = schedule.add_noise(ALPHA_BAR, z0, noise, t)
    perfect = schedule.target(ALPHA_BAR, z0, noise, t, kind)
    np.testing.assert_allclose(schedule.to_x0(ALPHA_BAR, perfect, z_t, t, kind), z0, atol=2e-5)
    np.testing.assert_allclose(schedule.to_eps(ALPHA_BAR, perfect, z_t, t, kind), noise, atol=2e-5)


def test_eps_and_v_round_trip():
    v = jax.random.normal(jax.random.key(1), (3, 4))
    z_t = jax.random.normal(jax.random.key(2), (3, 4))
    t = jnp.array([10, 500, 990])
    eps = schedule.to_eps(ALPHA_BAR, v, z_t, t, "v_prediction")
    x0 = schedule.to_x0(ALPHA_BAR, v, z_t, t, "v_prediction")
    np.testing.assert_allclose(schedule.velocity(ALPHA_BAR, x0, eps, t), v, atol=1e-5)
    np.testing.assert_allclose(schedule.to_x0(ALPHA_BAR, eps, z_t, t, "epsilon"), x0, atol=1e-4)


def test_add_noise_keeps_unit_variance():
    z_t = schedule.add_noise(ALPHA_BAR, jnp.full((2, 8), 3.0), jnp.full((2, 8), 4.0), jnp.array([0, 999]))
    expected = 3 * np.sqrt(np.array([0.99915, 0.0046601])) + 4 * np.sqrt(1 - np.array([0.99915, 0.0046601]))
    np.testing.assert_allclose(z_t[:, 0], expected, rtol=1e-5)


def test_a_config_is_static_under_jit():
    traces = []

    @jax.jit
    def first(cfg):
        traces.append(1)
        return schedule.alpha_bars(cfg)[0]

    assert float(first(SD)) == pytest.approx(0.99915)
    assert float(first(ScheduleConfig())) == pytest.approx(0.99915)
    assert float(first(DDPM)) == pytest.approx(0.9999)
    assert len(traces) == 2


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_scheduler_json_round_trip(name):
    cfg = ScheduleConfig(
        prediction_type="v_prediction", num_train_timesteps=4, trained_betas=(0.1, 0.2, 0.3, 0.4), steps_offset=0
    )
    written = schedule.to_scheduler_json(cfg, name)
    assert written["_class_name"] == name
    assert schedule.from_scheduler_json(written) == cfg
    assert from_dict(ScheduleConfig, to_dict(cfg)) == cfg


def test_scheduler_json_ignores_what_only_a_solver_needs():
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    values = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.8.0",
        "solver_order": 2,
        "skip_prk_steps": True,
    } | noise
    assert schedule.from_scheduler_json(values) == SD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "flow"}, "'epsilon', 'sample', 'v_prediction'"),
        ({"beta_schedule": "laplace"}, "'linear', 'scaled_linear', 'squaredcos_cap_v2', 'sigmoid'"),
        ({"timestep_spacing": "karras"}, "'leading', 'trailing', 'linspace'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "one of PNDMScheduler, DDIMScheduler"),
        ({"_class_name": None}, "_class_name must be one of"),
        ({"_class_name": ["PNDMScheduler"]}, "_class_name must be one of"),
        ({"thresholding": True}, "x0_fn=guidance.percentile_threshold"),
        ({"num_train_timesteps": 10**9}, r"in 1\.\.100000"),
        ({"num_train_timesteps": 0}, r"in 1\.\.100000"),
        ({"num_train_timesteps": "1000"}, "of type int"),
        ({"beta_start": float("nan")}, "beta_start must be"),
        ({"beta_start": 0.5}, "0 < beta_start <= beta_end < 1"),
        ({"beta_end": None}, "of type"),
        ({"steps_offset": -1}, "steps_offset must be in"),
        ({"trained_betas": [0.1]}, "1000 long"),
        ({"trained_betas": [2.0] * 1000}, r"in \(0, 1\)"),
        ({"trained_betas": []}, "1000 long"),
        ({"clip_sample_range": -1.0}, "clip_sample_range must be positive"),
    ],
)
def test_scheduler_json_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        schedule.from_scheduler_json(schedule.to_scheduler_json(SD) | change)


@pytest.mark.parametrize("values", [None, [], "PNDMScheduler"])
def test_scheduler_json_must_be_an_object(values):
    with pytest.raises(ValueError, match="must be a JSON object"):
        schedule.from_scheduler_json(values)


def test_unknown_prediction_type_in_a_conversion():
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, sample, v_prediction"):
        schedule.x0_at(jnp.ones(3), jnp.ones(3), jnp.ones(()), jnp.ones(()), "flow")
