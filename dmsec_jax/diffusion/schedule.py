"""The forward process as data: betas, alpha_bar, adding noise, and conversions between the three prediction types.

Symbols: `alpha_bar[t]` is the product of (1 - beta) up to t; z_t = alpha z_0 + sigma noise with
alpha = sqrt(alpha_bar[t]), sigma = sqrt(1 - alpha_bar[t])   (Ho et al. 2020, Eq. 4). A network predicts `epsilon` (the
noise), `sample` (z_0) or `v_prediction`, v = alpha noise - sigma z_0   (Salimans & Ho 2022, App. D).
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmsec_jax.core.arrays import expand
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.config import config, from_dict, to_dict

PredictionType = Literal["epsilon", "sample", "v_prediction"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
Spacing = Literal["leading", "trailing", "linspace"]

MAX_TRAIN_TIMESTEPS = 100_000  # a downloaded config may ask for anything


@config
class ScheduleConfig:
    """A noise schedule in the words of diffusers' `scheduler_config.json`; the defaults are Stable Diffusion 1.x.

    Every field is static (`float | int` is not traced): tables are computed on the host, once, in float64.
    """

    num_train_timesteps: int = 1000
    beta_start: float | int = 0.00085
    beta_end: float | int = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None  # overrides the three fields above
    rescale_betas_zero_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 1  # added to `leading` timesteps
    set_alpha_to_one: bool = False  # alpha_bar after the last step: 1, or alpha_bar[0]
    clip_sample: bool = False  # ddpm and ddim only
    clip_sample_range: float | int = 1.0
    skip_prk_steps: bool = True  # pndm only


# What a diffusers scheduler assumes for the fields that its file leaves out, where it is not the common default below.
_COMMON = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "timestep_spacing": "linspace",
    "skip_prk_steps": False,
}
_LEADING = {"timestep_spacing": "leading"}
_KNOWN_SCHEDULERS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": _LEADING | {"set_alpha_to_one": False},
    "DDIMScheduler": _LEADING | {"clip_sample": True},
    "DDIMInverseScheduler": _LEADING | {"clip_sample": True},
    "DDPMScheduler": _LEADING | {"clip_sample": True},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "LMSDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
}


def from_scheduler_json(values: object, where: str = "scheduler_config.json") -> ScheduleConfig:
    """Reads the parsed `scheduler_config.json` of a diffusers folder; missing fields take that scheduler's default.

    Only what describes the noise schedule is read; a solver's choices (order, Karras sigmas, ...) belong to samplers.

    Raises:
        ValueError: on an unknown scheduler, prediction type or beta schedule (naming the choices), on values of the
            wrong type or range, and on `thresholding: true`, which a sampler gets as `x0_fn` instead.
    """
    require(
        isinstance(values, Mapping), where, "a JSON object", type(values).__name__, "use the file of a diffusers folder"
    )
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in _KNOWN_SCHEDULERS:
        raise fail(
            f"{where}._class_name",
            f"one of {', '.join(_KNOWN_SCHEDULERS)}",
            repr(name),
            "this model has no such noise schedule",
        )
    if values.get("thresholding"):
        raise fail(
            f"{where}.thresholding",
            "false",
            "true",
            "remove it and give the sampler x0_fn=guidance.percentile_threshold",
        )
    known = {key: value for key, value in values.items() if key in ScheduleConfig.__dataclass_fields__}
    cfg = from_dict(ScheduleConfig, _COMMON | _KNOWN_SCHEDULERS[name] | known, where)
    check(cfg, where)
    return cfg


def to_scheduler_json(cfg: ScheduleConfig, class_name: str = "PNDMScheduler") -> dict[str, Any]:
    """The content of `scheduler_config.json` for diffusers' `class_name`; the inverse of `from_scheduler_json`."""
    if class_name not in _KNOWN_SCHEDULERS:
        raise fail("class_name", f"one of {', '.join(_KNOWN_SCHEDULERS)}", repr(class_name), "choose one of them")
    return {"_class_name": class_name, **to_dict(cfg)}


def check(cfg: ScheduleConfig, where: str = "schedule") -> None:
    """Raises ValueError unless the numbers of `cfg` make a schedule."""
    steps, low, high = cfg.num_train_timesteps, cfg.beta_start, cfg.beta_end
    require(
        0 < steps <= MAX_TRAIN_TIMESTEPS,
        f"{where}.num_train_timesteps",
        f"in 1..{MAX_TRAIN_TIMESTEPS}",
        steps,
        "SD uses 1000",
    )
    require(
        0 < low <= high < 1,
        f"{where}.beta_start",
        "0 < beta_start <= beta_end < 1",
        (low, high),
        "SD uses 0.00085, 0.012",
    )
    require(0 <= cfg.steps_offset < steps, f"{where}.steps_offset", f"in 0..{steps - 1}", cfg.steps_offset, "SD uses 1")
    require(
        0 < cfg.clip_sample_range < np.inf, f"{where}.clip_sample_range", "positive", cfg.clip_sample_range, "use 1"
    )
    if cfg.trained_betas is not None:
        given = np.asarray(cfg.trained_betas, np.float64)
        require(
            len(given) == steps,
            f"{where}.trained_betas",
            f"{steps} long, as num_train_timesteps",
            len(given),
            "make them agree",
        )
        ok = bool(np.all((given > 0) & (given < 1)))
        require(
            ok, f"{where}.trained_betas", "in (0, 1)", f"[{given.min():.3g}, {given.max():.3g}]", "correct the file"
        )


def alpha_bars64(cfg: ScheduleConfig) -> np.ndarray:
    """alpha_bar as float64 [T], decreasing in (0, 1), of which sampler tables are made.

    The last entry is 0 with `rescale_betas_zero_snr`.

    Raises:
        ValueError: if `cfg` is no schedule (see `check`).
    """
    check(cfg)
    alpha_bar = np.cumprod(1.0 - _betas(cfg))
    if not cfg.rescale_betas_zero_snr:
        return alpha_bar
    root = np.sqrt(alpha_bar)  # Lin et al. 2024, Algorithm 1: shift the last sqrt(alpha_bar) to 0, keep the first
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _betas(cfg: ScheduleConfig) -> np.ndarray:
    steps, low, high = cfg.num_train_timesteps, cfg.beta_start, cfg.beta_end
    if cfg.trained_betas is not None:
        return np.asarray(cfg.trained_betas, np.float64)
    if cfg.beta_schedule == "linear":
        return np.linspace(low, high, steps)
    if cfg.beta_schedule == "scaled_linear":
        return np.linspace(low**0.5, high**0.5, steps) ** 2
    if cfg.beta_schedule == "sigmoid":
        return low + (high - low) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps)))
    if cfg.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, Eq. 17
        cosine = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1.0 - cosine[1:] / cosine[:-1], 0.999)
    raise fail(
        "beta_schedule",
        "one of linear, scaled_linear, squaredcos_cap_v2, sigmoid",
        repr(cfg.beta_schedule),
        "choose one of them",
    )


def alpha_bars(cfg: ScheduleConfig) -> Float[Array, "T"]:
    """alpha_bar as float32 [T], accumulated in float64; index it with int `t`."""
    return jnp.asarray(alpha_bars64(cfg), jnp.float32)


def final_alpha_bar(cfg: ScheduleConfig) -> float:
    """alpha_bar of what a sampler calls clean: 1, or alpha_bar[0] where the schedule says so, as Stable Diffusion's."""
    return 1.0 if cfg.set_alpha_to_one else float(alpha_bars64(cfg)[0])


def timesteps(cfg: ScheduleConfig, num_steps: int) -> np.ndarray:
    """The `num_steps` training timesteps to visit, int32, descending   (Lin et al. 2024, Table 2).

    `steps_offset` shifts `leading` timesteps only.

    Raises:
        ValueError: unless 1 <= num_steps <= T and every timestep exists.
    """
    total = cfg.num_train_timesteps
    require(
        1 <= num_steps <= total,
        "num_steps",
        f"in 1..{total}",
        num_steps,
        "a schedule cannot be refined beyond training",
    )
    if cfg.timestep_spacing == "linspace":
        ascending = np.linspace(0, total - 1, num_steps).round()
    elif cfg.timestep_spacing == "trailing":
        ascending = np.arange(total, 0, -total / num_steps).round()[:num_steps][::-1] - 1
    elif cfg.timestep_spacing == "leading":
        ascending = np.arange(num_steps) * (total // num_steps) + cfg.steps_offset
    else:
        raise fail(
            "timestep_spacing", "one of leading, trailing, linspace", repr(cfg.timestep_spacing), "choose one of them"
        )
    require(
        bool(ascending[-1] < total),
        "num_steps",
        f"such that timesteps stay below {total}",
        num_steps,
        "lower it or set steps_offset=0",
    )
    return ascending[::-1].astype(np.int32)


def previous_by_stride(cfg: ScheduleConfig, num_steps: int) -> np.ndarray:
    """t - T // num_steps for each of `timesteps`, where negative means clean: the rule of diffusers' DDIM.

    It equals the next timestep of the list, except for `linspace` and uneven `trailing` grids, where diffusers jumps to
    one level and then evaluates at another; give it to `samplers.ddim(previous=...)` to reproduce that.
    """
    return timesteps(cfg, num_steps) - np.int32(cfg.num_train_timesteps // num_steps)


def levels(alpha_bar: Float[Array, "T"], t: Int[Array, "B"], like: Float[Array, "B ..."]) -> tuple[Array, Array]:
    """(alpha, sigma) at `t`, each broadcast against `like`."""
    chosen = expand(jnp.asarray(alpha_bar)[t], like)
    return jnp.sqrt(chosen), jnp.sqrt(1.0 - chosen)


def add_noise(
    alpha_bar: Float[Array, "T"], z0: Float[Array, "B ..."], noise: Float[Array, "B ..."], t: Int[Array, "B"]
) -> Float[Array, "B ..."]:
    """z_t = alpha z_0 + sigma noise   (Ho et al. 2020, Eq. 4)."""
    alpha, sigma = levels(alpha_bar, t, z0)
    return alpha * z0 + sigma * noise


def velocity(
    alpha_bar: Float[Array, "T"], z0: Float[Array, "B ..."], noise: Float[Array, "B ..."], t: Int[Array, "B"]
) -> Float[Array, "B ..."]:
    """v = alpha noise - sigma z_0   (Salimans & Ho 2022, App. D)."""
    alpha, sigma = levels(alpha_bar, t, z0)
    return alpha * noise - sigma * z0


def to_x0(
    alpha_bar: Float[Array, "T"],
    prediction: Float[Array, "B ..."],
    z_t: Float[Array, "B ..."],
    t: Int[Array, "B"],
    prediction_type: str = "epsilon",
) -> Float[Array, "B ..."]:
    """The clean latent that a prediction at (z_t, t) stands for."""
    return x0_at(prediction, z_t, *levels(alpha_bar, t, z_t), prediction_type)


def to_eps(
    alpha_bar: Float[Array, "T"],
    prediction: Float[Array, "B ..."],
    z_t: Float[Array, "B ..."],
    t: Int[Array, "B"],
    prediction_type: str = "epsilon",
) -> Float[Array, "B ..."]:
    """The noise that a prediction at (z_t, t) stands for."""
    return eps_at(prediction, z_t, *levels(alpha_bar, t, z_t), prediction_type)


def x0_at(prediction: Array, z_t: Array, alpha: Array, sigma: Array, prediction_type: str) -> Array:
    """`to_x0` at a level given as (alpha, sigma), which need not be one of the T training levels."""
    if prediction_type == "epsilon":
        return (z_t - sigma * prediction) / alpha
    if prediction_type == "v_prediction":
        return alpha * z_t - sigma * prediction
    if prediction_type == "sample":
        return prediction
    raise _no_prediction_type(prediction_type)


def eps_at(prediction: Array, z_t: Array, alpha: Array, sigma: Array, prediction_type: str) -> Array:
    """`to_eps` at a level given as (alpha, sigma)."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return alpha * prediction + sigma * z_t
    if prediction_type == "sample":
        return (z_t - alpha * prediction) / sigma
    raise _no_prediction_type(prediction_type)


def target(
    alpha_bar: Float[Array, "T"],
    z0: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    t: Int[Array, "B"],
    prediction_type: str = "epsilon",
) -> Float[Array, "B ..."]:
    """What a perfect network of this prediction type returns at `add_noise(alpha_bar, z0, noise, t)`."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(alpha_bar, z0, noise, t)
    if prediction_type == "sample":
        return z0
    raise _no_prediction_type(prediction_type)


def _no_prediction_type(got: object) -> ValueError:
    return fail(
        "prediction_type", "one of epsilon, sample, v_prediction", repr(got), "read it from the scheduler's config"
    )
