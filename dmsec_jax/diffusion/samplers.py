"""Reverse processes as tables of numbers: a sampler is `init`, `step` and the timesteps at which it asks the network.

All share one form. At level (alpha, sigma) the network's prediction gives a clean estimate x0 and a noise estimate eps;
the next latent is  a x0 + b eps + c noise,  with a, b, c computed once on the host in float64. Here: DDPM (Ho et al.
2020), DDIM and its inversion (Song et al. 2021), Euler and Euler ancestral (Karras et al. 2022); `multistep.py` has the
samplers that remember predictions. Latents stay variance preserving: Euler's sigma-scaled variable is z_t / alpha.

Differs from diffusers: where `x0_fn` or clipping changes x0, eps is recomputed so that z_t = alpha x0 + sigma eps still
holds (diffusers' DDIM does so only with `use_clipped_model_output=True`); the step after t is the next timestep of the
list, not t - T // n (see `schedule.previous_by_stride`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.types import ModelFn
from dmsec_jax.diffusion.draws import example_noise
from dmsec_jax.diffusion.schedule import (
    ScheduleConfig,
    alpha_bars64,
    eps_at,
    final_alpha_bar,
    timesteps,
    x0_at,
)

Steps = int | Sequence[int] | np.ndarray
"""How many steps (the schedule's spacing decides where), or the timesteps themselves in visiting order."""

X0Fn = Callable[[Array], Array]
"""A hook on the predicted clean latent [B, ...], for example `guidance.percentile_threshold`."""


class Sampler(NamedTuple):
    """A reverse process for `sample`.

    init: z_T [B, ...] -> state; the state is a NamedTuple with the current latent in field `z`.
    step: (key, state, i, *, model_fn, x0_fn, index) -> state; `key` is this step's, `index` [B] the examples' indices.
    num_steps: evaluations of `model_fn`.
    timesteps: [num_steps] int32 (float32 where Euler's levels lie between training steps), what `model_fn` is given.
    """

    init: Callable
    step: Callable
    num_steps: int
    timesteps: np.ndarray


class State(NamedTuple):
    """What a one-step sampler carries."""

    z: Float[Array, "B ..."]


class Table(NamedTuple):
    """Coefficients, float64 [num_steps], from level (alpha, sigma): z <- clean x0 + direction eps + noise normal."""

    alpha: np.ndarray
    sigma: np.ndarray
    clean: np.ndarray
    direction: np.ndarray
    noise: np.ndarray


def identity(x0: Array) -> Array:
    """The hook that changes nothing."""
    return x0


def sample(
    key: Array,
    z_T: Float[Array, "B ..."],
    sampler: Sampler,
    *,
    model_fn: ModelFn,
    x0_fn: X0Fn = identity,
    index: Int[Array, "B"] | None = None,
) -> Float[Array, "B ..."]:
    """Runs the whole reverse process as one `lax.scan`; returns the clean latents (of an inversion, the noisy ones).

    Args:
        key: step i uses fold_in(key, i); example j folds in `index[j]` too, so its noise does not depend on the batch.
        z_T: standard normal latents, or latents at the sampler's first timestep.
        model_fn: (z_t, t[B]) -> prediction of the type that the sampler's schedule names.
        x0_fn: applied to the predicted clean latent of every step.
        index: global indices of the examples, 0..B-1 by default.
    """
    index = jnp.arange(z_T.shape[0]) if index is None else index

    def body(state, i):
        step_key = jax.random.fold_in(key, i)
        return sampler.step(step_key, state, i, model_fn=model_fn, x0_fn=x0_fn, index=index), None

    state, _ = jax.lax.scan(body, sampler.init(z_T), jnp.arange(sampler.num_steps))
    return state.z


def ddim(
    schedule: ScheduleConfig, steps: Steps, *, eta: float = 0.0, previous: Sequence[int] | np.ndarray | None = None
) -> Sampler:
    """DDIM   (Song et al. 2021, Eqs. 12 and 16): eta = 0 is deterministic, eta = 1 has DDPM's posterior variance.

    Args:
        steps: a number, or timesteps in visiting order; repeats are allowed.
        previous: the timestep each step goes to, negative meaning clean; by default the next of the list, then clean.

    Raises:
        ValueError: on timesteps outside the schedule, eta outside [0, 1], or an epsilon model at alpha_bar = 0.
    """
    require(0 <= eta <= 1, "eta", "in [0, 1]", eta, "0 is deterministic, 1 is ancestral")
    visited = resolve_steps(schedule, steps)
    here, there = _transition_levels(schedule, visited, previous)
    noise = eta * _posterior_std(here, there)
    return one_step_sampler(schedule, visited, _vp_table(here, there, noise, noise), clip=schedule.clip_sample)


def ddpm(schedule: ScheduleConfig, steps: Steps, *, variance: str = "fixed_small") -> Sampler:
    """Ancestral sampling   (Ho et al. 2020, Eq. 7), on a subset of the timesteps too; always ends at alpha_bar = 1.

    `fixed_small` is the posterior's variance, `fixed_large` is beta's (both in Sec. 3.2). The step to clean adds no noise
    (differs from diffusers, which adds beta's at t > 0).

    Raises:
        ValueError: on timesteps outside the schedule, an unknown variance, or an epsilon model at alpha_bar = 0.
    """
    visited = resolve_steps(schedule, steps)
    here, there = _transition_levels(schedule, visited, None)
    there[-1] = 1.0
    small = _posterior_std(here, there)
    if variance == "fixed_large":
        noise = np.where(there < 1, np.sqrt(1.0 - here / there), 0.0)
    elif variance == "fixed_small":
        noise = small
    else:
        raise fail("variance", "fixed_small or fixed_large", repr(variance), "choose one of them")
    return one_step_sampler(schedule, visited, _vp_table(here, there, small, noise), clip=schedule.clip_sample)


def ddim_inversion(schedule: ScheduleConfig, steps: Steps, *, start: int = -1, evaluate_at: str = "current") -> Sampler:
    """DDIM run backwards, from a clean latent to the last of `steps`   (Song et al. 2021, Sec. 4.3).

    Args:
        steps: a number, or ascending timesteps to arrive at, one after the other.
        start: the timestep of the given latent; negative means clean.
        evaluate_at: the network sees the timestep that is left (`current`, as in the paper; clean counts as t = 0) or
            the one that is reached (`target`, as in diffusers).

    Raises:
        ValueError: on timesteps outside the schedule or not ascending, or levels where the prediction says nothing.
    """
    if isinstance(steps, (int, np.integer)):
        steps = timesteps(schedule, int(steps))[::-1]
    reached = resolve_steps(schedule, steps)
    left = np.concatenate([[start], reached[:-1]]).astype(np.int32)
    require(bool((reached > left).all()), "steps", f"ascending from start = {start}", reached.tolist(), "sort them")
    here, there = levels_at(schedule, left), levels_at(schedule, reached)
    if evaluate_at not in ("current", "target"):
        raise fail("evaluate_at", "current or target", repr(evaluate_at), "choose one of them")
    seen = np.maximum(left, 0) if evaluate_at == "current" else reached
    none = np.zeros(len(reached))
    return one_step_sampler(schedule, seen, _vp_table(here, there, none, none))


def euler(schedule: ScheduleConfig, num_steps: int) -> Sampler:
    """Euler's method on the probability-flow ODE in sigma   (Karras et al. 2022, Alg. 1 without Heun's correction).

    In variance-preserving latents this is DDIM on a grid that ends at sigma = 0; `linspace` timesteps are fractional.

    Raises:
        ValueError: on num_steps outside the schedule.
    """
    visited, sigma = _sigma_grid(schedule, num_steps)
    return _sigma_sampler(schedule, visited, sigma, down=sigma[1:], up=np.zeros(num_steps))


def euler_ancestral(schedule: ScheduleConfig, num_steps: int) -> Sampler:
    """Euler with ancestral noise: each step goes below the next sigma and adds noise back up to it.

    Raises:
        ValueError: on num_steps outside the schedule.
    """
    visited, sigma = _sigma_grid(schedule, num_steps)
    up = np.sqrt(sigma[1:] ** 2 * (sigma[:-1] ** 2 - sigma[1:] ** 2) / sigma[:-1] ** 2)
    return _sigma_sampler(schedule, visited, sigma, down=np.sqrt(sigma[1:] ** 2 - up**2), up=up)


def one_step_sampler(
    schedule: ScheduleConfig, visited: np.ndarray, table: Table, *, clip: bool = False, scale: float = 1.0
) -> Sampler:
    """The sampler of a table: asks the network at `visited` [num_steps]; `scale` multiplies the initial latent.

    Raises:
        ValueError: where the schedule's prediction type does not determine x0 and eps.
    """
    check_levels(schedule, table.alpha, table.sigma)
    recompute = np.divide(table.alpha, table.sigma, out=np.zeros_like(table.alpha), where=table.sigma > 0)
    rows = np.stack([*table, recompute], axis=1).astype(np.float32)  # [num_steps, 6]
    stochastic = bool(np.any(table.noise > 0))
    limit = float(schedule.clip_sample_range)

    def init(z_T):
        return State(z=z_T.astype(jnp.float32) * jnp.float32(scale))

    def step(key, state, i, *, model_fn, x0_fn, index):
        alpha, sigma, clean, direction, noise, ratio = jnp.asarray(rows)[i]
        prediction = ask(model_fn, state.z, visited, i)
        raw = x0_at(prediction, state.z, alpha, sigma, schedule.prediction_type)
        x0 = x0_fn(jnp.clip(raw, -limit, limit) if clip else raw)
        eps = eps_at(prediction, state.z, alpha, sigma, schedule.prediction_type) + ratio * (raw - x0)
        z = clean * x0 + direction * eps
        if stochastic:
            z = z + noise * example_noise(key, index, state.z.shape[1:])
        return State(z=z)

    return Sampler(init, step, len(visited), visited)


def ask(model_fn: ModelFn, z: Array, visited: np.ndarray, i: Array | int) -> Array:
    """The network's prediction for the i-th of the `visited` timesteps, float32."""
    return model_fn(z, jnp.full(z.shape[:1], jnp.asarray(visited)[i])).astype(jnp.float32)


def resolve_steps(schedule: ScheduleConfig, steps: Steps) -> np.ndarray:
    """`steps` as int32 timesteps in visiting order.

    Raises:
        ValueError: on an empty list, or timesteps outside the schedule.
    """
    if isinstance(steps, (int, np.integer)):
        return timesteps(schedule, int(steps))
    visited, total = np.asarray(steps, np.int32), schedule.num_train_timesteps
    ok = visited.ndim == 1 and visited.size > 0 and bool(visited.min() >= 0 and visited.max() < total)
    require(
        ok, "steps", f"a number or a list of timesteps in 0..{total - 1}", visited.tolist(), "see schedule.timesteps"
    )
    return visited


def levels_at(schedule: ScheduleConfig, t: np.ndarray) -> np.ndarray:
    """alpha_bar float64 at each of `t`; negative means clean."""
    alpha_bar = alpha_bars64(schedule)
    return np.where(t >= 0, alpha_bar[np.maximum(t, 0)], final_alpha_bar(schedule))


def sigmas(schedule: ScheduleConfig) -> np.ndarray:
    """sqrt((1 - alpha_bar) / alpha_bar) float64 [T], ascending.

    A last level without signal becomes alpha_bar = 2^-24, as in diffusers.
    """
    alpha_bar = alpha_bars64(schedule)
    alpha_bar[-1] = max(alpha_bar[-1], 2.0**-24)
    return np.sqrt((1.0 - alpha_bar) / alpha_bar)


def check_levels(schedule: ScheduleConfig, alpha: np.ndarray, sigma: np.ndarray) -> None:
    """Raises ValueError where an epsilon model sees no signal (alpha = 0), or a sample model no noise (sigma = 0)."""
    kind = schedule.prediction_type
    if kind == "epsilon" and np.any(alpha == 0):
        raise fail(
            "prediction_type", "v_prediction or sample where alpha_bar = 0", kind, "start below the last timestep"
        )
    if kind == "sample" and np.any(sigma == 0):
        raise fail("prediction_type", "epsilon or v_prediction where alpha_bar = 1", kind, "set set_alpha_to_one=False")


def _transition_levels(schedule, visited, previous) -> tuple[np.ndarray, np.ndarray]:
    if previous is None:
        previous = np.append(visited[1:], -1)
    previous = np.asarray(previous, np.int32)
    ok = previous.shape == visited.shape and bool(previous.max() < schedule.num_train_timesteps)
    require(ok, "previous", f"{len(visited)} timesteps, one for each step", previous.tolist(), "negative means clean")
    return levels_at(schedule, visited), levels_at(schedule, previous)


def _posterior_std(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    variance = (1.0 - there) / (1.0 - here) * (1.0 - here / there)  # Song et al. 2021, Eq. 16 with eta = 1
    return np.sqrt(np.maximum(variance, 0.0))


def _vp_table(here: np.ndarray, there: np.ndarray, std: np.ndarray, noise: np.ndarray) -> Table:
    """Jumps between alpha_bar levels; the direction makes room for variance std^2   (Song et al. 2021, Eq. 12)."""
    direction = np.sqrt(np.maximum(1.0 - there - std**2, 0.0))
    return Table(np.sqrt(here), np.sqrt(1.0 - here), np.sqrt(there), direction, noise)


def _sigma_grid(schedule: ScheduleConfig, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [num_steps] and sigmas [num_steps + 1] ending in 0."""
    visited = timesteps(schedule, num_steps)
    if schedule.timestep_spacing == "linspace":  # not rounded: the network is asked between training steps
        visited = np.linspace(0, schedule.num_train_timesteps - 1, num_steps, dtype=np.float32)[::-1].copy()
    every = sigmas(schedule)
    return visited, np.append(np.interp(visited, np.arange(len(every)), every), 0.0)


def _sigma_sampler(schedule, visited, sigma, *, down, up) -> Sampler:
    alpha = 1.0 / np.sqrt(1.0 + sigma**2)
    now, then = alpha[:-1], alpha[1:]
    table = Table(now, now * sigma[:-1], then, then * down, then * up)
    # Grids that begin at the last training step start from pure noise of std sigma_max, others from the marginal.
    scale = 1.0 if schedule.timestep_spacing == "leading" else float(now[0] * sigma[0])
    return one_step_sampler(schedule, visited, table, scale=scale)
