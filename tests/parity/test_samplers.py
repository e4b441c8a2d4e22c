"""Every sampler, step by step, against diffusers' scheduler, on a deterministic stand-in for the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion import multistep, samplers
from dmsec_jax.diffusion.draws import example_noise
from dmsec_jax.diffusion.schedule import (
    alpha_bars,
    final_alpha_bar,
    from_scheduler_json,
    previous_by_stride,
    timesteps,
    to_scheduler_json,
)

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SHAPE = (2, 3, 3, 4)
KEY = jax.random.key(0)
Z_T = np.asarray(jax.random.normal(jax.random.key(1), SHAPE))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BOTH = ("epsilon", "v_prediction")


def network(xp):
    """A bounded, time-dependent function that torch and jax compute alike."""
    return lambda z, t: xp.sin(1.3 * z + 0.7) * xp.cos(0.003 * t)


def scheduler(name, **settings):
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name)(**{**SD, **settings})


def ours(reference):
    """Our schedule, read from the file that this diffusers scheduler would save."""
    return from_scheduler_json({**reference.config, "_class_name": type(reference).__name__})


def path(sampler, z_T=Z_T):
    """Latents before every step and after the last, float32 [num_steps + 1, ...]."""

    @jax.jit
    def run(z):
        def body(state, i):
            def model_fn(z_t, t):
                return network(jnp)(z_t, t[:, None, None, None].astype(jnp.float32))

            step_key = jax.random.fold_in(KEY, i)
            index = jnp.arange(SHAPE[0])
            new = sampler.step(step_key, state, i, model_fn=model_fn, x0_fn=samplers.identity, index=index)
            return new, state.z

        state, before = jax.lax.scan(body, sampler.init(z), jnp.arange(sampler.num_steps))
        return jnp.concatenate([before, state.z[None]])

    return np.asarray(run(jnp.asarray(z_T)))


def noise_of_step(i):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.asarray(example_noise(jax.random.fold_in(KEY, i), jnp.arange(SHAPE[0]), SHAPE[1:])))


def reference_path(reference, num_steps, z_T=Z_T, step_arguments=lambda i: {}):
    """The same for diffusers, in the coordinates that the network sees."""
    torch = pytest.importorskip("torch")
    reference.set_timesteps(num_steps)
    sample = torch.tensor(z_T) * reference.init_noise_sigma
    seen = []
    for i, t in enumerate(reference.timesteps):
        scaled = reference.scale_model_input(sample, t)
        seen.append(scaled)
        prediction = network(torch)(scaled, t.to(torch.float32))
        sample = reference.step(prediction, t, sample, return_dict=False, **step_arguments(i))[0]
    return reference.timesteps.numpy(), np.stack([*(z.numpy() for z in seen), sample.numpy()])


def assert_same(sampler, reference, num_steps, z_T=Z_T, step_arguments=lambda i: {}, tolerance=2e-5):
    visited, expected = reference_path(reference, num_steps, z_T, step_arguments)
    np.testing.assert_allclose(sampler.timesteps, visited, rtol=1e-6)
    got = path(sampler, z_T)
    assert got.shape == expected.shape
    scale = np.maximum(1.0, np.abs(expected).max(axis=(1, 2, 3, 4), keepdims=True))
    np.testing.assert_allclose(got / scale, expected / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("settings", [
    {},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"num_train_timesteps": 10, "trained_betas": [0.01 * (i + 1) for i in range(10)]},
    {"rescale_betas_zero_snr": True},
])  # fmt: skip
def test_alpha_bars(settings):
    reference = scheduler("DDPMScheduler", **settings)
    np.testing.assert_allclose(alpha_bars(ours(reference)), reference.alphas_cumprod.numpy(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 7, 10, 30, 50, 999])
def test_timesteps(spacing, num_steps):
    reference = scheduler("DDPMScheduler", timestep_spacing=spacing, steps_offset=1)
    reference.set_timesteps(num_steps)
    np.testing.assert_array_equal(timesteps(ours(reference), num_steps), reference.timesteps.numpy())


@pytest.mark.parametrize("name", [
    "PNDMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
])  # fmt: skip
def test_missing_fields_take_the_scheduler_s_own_defaults(name):
    diffusers = pytest.importorskip("diffusers")
    reference = getattr(diffusers, name)()
    cfg = from_scheduler_json({"_class_name": name})
    stated = {field: value for field, value in reference.config.items() if field in cfg.__dataclass_fields__}
    assert {field: getattr(cfg, field) for field in stated} == stated
    assert len(stated) >= 5
    again = getattr(diffusers, name).from_config(to_scheduler_json(cfg, name))
    assert {field: again.config[field] for field in stated} == stated
    np.testing.assert_allclose(alpha_bars(cfg), again.alphas_cumprod.numpy(), atol=2e-6)


@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize("prediction", [*BOTH, "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(num_steps, prediction, eta):
    reference = scheduler(
        "DDIMScheduler", prediction_type=prediction, steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    noise = lambda i: {"eta": eta, "variance_noise": noise_of_step(i)}
    assert_same(samplers.ddim(ours(reference), num_steps, eta=eta), reference, num_steps, step_arguments=noise)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_spacings(spacing, to_one):
    reference = scheduler("DDIMScheduler", timestep_spacing=spacing, set_alpha_to_one=to_one, clip_sample=False)
    assert_same(samplers.ddim(ours(reference), 20), reference, 20)


@pytest.mark.parametrize(("spacing", "num_steps"), [("linspace", 10), ("trailing", 30)])
def test_ddim_by_stride_is_diffusers_rule_on_uneven_grids(spacing, num_steps):
    reference = scheduler("DDIMScheduler", timestep_spacing=spacing, clip_sample=False)
    cfg = ours(reference)
    by_stride = previous_by_stride(cfg, num_steps)
    assert_same(samplers.ddim(cfg, num_steps, previous=by_stride), reference, num_steps)
    along_the_list = path(samplers.ddim(cfg, num_steps))
    assert np.abs(along_the_list[-1] - reference_path(reference, num_steps)[1][-1]).max() > 1e-3


def test_ddim_zero_terminal_snr():
    reference = scheduler(
        "DDIMScheduler",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    assert_same(samplers.ddim(ours(reference), 20), reference, 20)
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        samplers.ddim(ours(scheduler("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")), 20)


def test_ddim_clipping_recomputes_the_noise():
    reference = scheduler("DDIMScheduler", clip_sample=True, clip_sample_range=0.8)
    assert_same(
        samplers.ddim(ours(reference), 20), reference, 20, step_arguments=lambda i: {"use_clipped_model_output": True}
    )


@pytest.mark.parametrize("prediction", BOTH)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_inversion(prediction, spacing, to_one):
    reference = scheduler("DDIMInverseScheduler", prediction_type=prediction, timestep_spacing=spacing, steps_offset=1,
                          set_alpha_to_one=to_one, clip_sample=False)  # fmt: skip
    cfg = ours(reference)
    reference.set_timesteps(50)
    assert final_alpha_bar(cfg) == pytest.approx(float(reference.initial_alpha_cumprod), abs=1e-6)
    assert_same(samplers.ddim_inversion(cfg, 50, evaluate_at="target"), reference, 50, z_T=0.5 * Z_T)


@pytest.mark.parametrize(("variance", "offset"), [("fixed_small", 0), ("fixed_small", 1), ("fixed_large", 0)])
@pytest.mark.parametrize("prediction", BOTH)
def test_ddpm(variance, prediction, offset, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm

    step = iter(range(1000))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise_of_step(next(step)))
    reference = scheduler(
        "DDPMScheduler", variance_type=variance, prediction_type=prediction, steps_offset=offset, clip_sample=True
    )
    assert_same(samplers.ddpm(ours(reference), 50, variance=variance), reference, 50)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddpm_spacings(spacing, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm

    step = iter(range(1000))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise_of_step(next(step)))
    reference = scheduler("DDPMScheduler", timestep_spacing=spacing, clip_sample=False)
    assert_same(samplers.ddpm(ours(reference), 10), reference, 10)


@pytest.mark.parametrize("num_steps", [4, 10, 50])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("prediction", BOTH)
def test_pndm(num_steps, skip, prediction):
    reference = scheduler("PNDMScheduler", skip_prk_steps=skip, steps_offset=1, prediction_type=prediction)
    sampler = multistep.pndm(ours(reference), num_steps)
    assert sampler.num_steps == num_steps + (1 if skip else 9)
    assert_same(sampler, reference, num_steps)


@pytest.mark.parametrize("settings", [
    {"num_steps": 1}, {"num_steps": 2}, {"num_steps": 25, "timestep_spacing": "trailing", "set_alpha_to_one": True},
    {"num_steps": 30, "steps_offset": 0},
])  # fmt: skip
def test_plms_grids(settings):
    settings = dict(settings)
    num_steps = settings.pop("num_steps")
    reference = scheduler("PNDMScheduler", skip_prk_steps=True, **settings)
    assert_same(multistep.pndm(ours(reference), num_steps), reference, num_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize("prediction", [*BOTH, "sample"])
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m(num_steps, prediction, karras):
    reference = scheduler("DPMSolverMultistepScheduler", prediction_type=prediction, use_karras_sigmas=karras)
    spacing = "karras" if karras else "schedule"
    assert_same(multistep.dpmpp_2m(ours(reference), num_steps, spacing=spacing), reference, num_steps)


@pytest.mark.parametrize("num_steps", [10, 20])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpmpp_2m_ending_at_sigma_min(num_steps, lower, spacing):
    reference = scheduler("DPMSolverMultistepScheduler", final_sigmas_type="sigma_min", lower_order_final=lower,
                          timestep_spacing=spacing, steps_offset=1)  # fmt: skip
    sampler = multistep.dpmpp_2m(ours(reference), num_steps, final="sigma_min", lower_order_final=lower)
    assert_same(sampler, reference, num_steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize("prediction", BOTH)
def test_euler(spacing, num_steps, prediction):
    reference = scheduler(
        "EulerDiscreteScheduler", timestep_spacing=spacing, prediction_type=prediction, steps_offset=1
    )
    assert_same(samplers.euler(ours(reference), num_steps), reference, num_steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_euler_ancestral(spacing, monkeypatch):
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    step = iter(range(1000))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise_of_step(next(step)))
    reference = scheduler("EulerAncestralDiscreteScheduler", timestep_spacing=spacing)
    assert_same(samplers.euler_ancestral(ours(reference), 20), reference, 20)


def test_zero_terminal_snr_in_sigma_samplers():
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    reference = scheduler("EulerDiscreteScheduler", **settings)
    assert_same(samplers.euler(ours(reference), 20), reference, 20)
    reference = scheduler("DPMSolverMultistepScheduler", **settings)
    assert_same(multistep.dpmpp_2m(ours(reference), 20), reference, 20)
