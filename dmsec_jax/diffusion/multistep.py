"""Samplers that remember earlier predictions: PNDM/PLMS (Liu et al. 2022) and DPM-Solver++ 2M (Lu et al. 2022).

Both jump between levels like deterministic DDIM; what they extrapolate from earlier steps is the network's raw output
(PNDM) or the clean estimate (DPM-Solver++). What each step does is a row of a table.
"""

from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmsec_jax.core.checks import fail, require
from dmsec_jax.diffusion.samplers import Sampler, ask, check_levels, levels_at, sigmas
from dmsec_jax.diffusion.schedule import ScheduleConfig, eps_at, timesteps, x0_at


class PndmState(NamedTuple):
    """z: current latent; base: where this group of evaluations starts; history: last three outputs, newest first;
    total: running Runge-Kutta sum."""

    z: Float[Array, "B ..."]
    base: Float[Array, "B ..."]
    history: Float[Array, "3 B ..."]
    total: Float[Array, "B ..."]


class DpmState(NamedTuple):
    """z: current latent; x0: clean estimate of the step before."""

    z: Float[Array, "B ..."]
    x0: Float[Array, "B ..."]


class Evaluation(NamedTuple):
    """One network call of PNDM: at `t`, then jump `source` -> `goal` (timesteps) with output

    new * this + history . last three + total * running sum.
    """

    t: int
    source: int
    goal: int
    new: float = 1.0
    history: tuple[float, float, float] = (0.0, 0.0, 0.0)
    total: float = 0.0
    add: float = 0.0  # weight with which this output enters the running sum
    keep: bool = False  # the running sum goes on
    remember: bool = True  # this output enters the history
    rewind: bool = False  # jump from `base`, not from `z`
    anchor: bool = False  # `z` becomes the base


_ADAMS = (  # Adams-Bashforth weights of (this, last three) by the number of outputs known
    (1.0, (0.0, 0.0, 0.0)),
    (3 / 2, (-1 / 2, 0.0, 0.0)),
    (23 / 12, (-16 / 12, 5 / 12, 0.0)),
    (55 / 24, (-59 / 24, 37 / 24, -9 / 24)),
)


def pndm(schedule: ScheduleConfig, num_steps: int) -> Sampler:
    """Pseudo numerical method, 4th order   (Liu et al. 2022, Eqs. 9-13).

    With `schedule.skip_prk_steps` (PLMS, Stable Diffusion's default) there are num_steps + 1 evaluations, since the
    second timestep is visited twice; without, a Runge-Kutta start makes it num_steps + 9.

    Raises:
        ValueError: on num_steps outside the schedule, or fewer than 4 with the Runge-Kutta start.
    """
    plan = _plms_plan(schedule, num_steps) if schedule.skip_prk_steps else _prk_plan(schedule, num_steps)
    visited, source, goal = (np.array([getattr(e, name) for e in plan], np.int32) for name in ("t", "source", "goal"))
    here, there = levels_at(schedule, source), levels_at(schedule, goal)
    alpha, sigma = np.sqrt(here), np.sqrt(1.0 - here)
    check_levels(schedule, alpha, sigma)
    levels = np.stack([alpha, sigma, np.sqrt(there), np.sqrt(1.0 - there)], axis=1).astype(np.float32)
    weights = np.array([[e.new, e.total, e.add, e.keep, *e.history] for e in plan], np.float32)
    flags = np.array([[e.remember, e.rewind, e.anchor] for e in plan])

    def init(z_T):
        z = z_T.astype(jnp.float32)
        none = jnp.zeros_like(z)
        return PndmState(z=z, base=z, history=jnp.zeros((3, *z.shape), z.dtype), total=none)

    def step(key, state, i, *, model_fn, x0_fn, index):
        alpha, sigma, next_alpha, next_sigma = jnp.asarray(levels)[i]
        new, total, add, keep, *past = jnp.asarray(weights)[i]
        remember, rewind, anchor = jnp.asarray(flags)[i]
        output = ask(model_fn, state.z, visited, i)
        mixed = new * output + total * state.total
        for weight, earlier in zip(past, state.history, strict=True):
            mixed = mixed + weight * earlier
        z = jnp.where(rewind, state.base, state.z)
        raw = x0_at(mixed, z, alpha, sigma, schedule.prediction_type)
        x0 = x0_fn(raw)
        eps = eps_at(mixed, z, alpha, sigma, schedule.prediction_type) + alpha / sigma * (raw - x0)
        pushed = jnp.concatenate([output[None], state.history[:-1]])
        return PndmState(
            z=next_alpha * x0 + next_sigma * eps,
            base=jnp.where(anchor, state.z, state.base),
            history=jnp.where(remember, pushed, state.history),
            total=keep * state.total + add * output,
        )

    return Sampler(init, step, len(plan), visited)


def _plms_plan(schedule: ScheduleConfig, num_steps: int) -> list[Evaluation]:
    t = [*timesteps(schedule, num_steps).tolist(), -1]
    plan = [Evaluation(t[0], t[0], t[1], anchor=True)]
    if num_steps > 1:  # the first jump again, with the mean of both ends (Heun)
        plan.append(
            Evaluation(t[1], t[0], t[1], new=0.5, history=(0.5, 0.0, 0.0), remember=False, rewind=True),
        )
    for known in range(1, num_steps):
        new, history = _ADAMS[min(known, 3)]
        plan.append(Evaluation(t[known], t[known], t[known + 1], new, history))
    return plan


def _prk_plan(schedule: ScheduleConfig, num_steps: int) -> list[Evaluation]:
    require(num_steps >= 4, "num_steps", "at least 4 with skip_prk_steps=False", num_steps, "set skip_prk_steps=True")
    t = [*timesteps(schedule, num_steps).tolist(), -1]
    half = schedule.num_train_timesteps // num_steps // 2
    plan = []
    for start, end in pairwise(t[:4]):  # three classical Runge-Kutta steps: k1, k2, k3, k4
        middle = end + half
        plan += [
            Evaluation(start, start, start - half, add=1 / 6, keep=True, anchor=True),
            Evaluation(middle, start, middle, add=1 / 3, keep=True, remember=False, rewind=True),
            Evaluation(middle, start, end, add=1 / 3, keep=True, remember=False, rewind=True),
            Evaluation(end, start, end, new=1 / 6, total=1.0, remember=False, rewind=True),
        ]
    new, history = _ADAMS[3]
    return plan + [Evaluation(here, here, there, new, history) for here, there in pairwise(t[3:])]


def dpmpp_2m(
    schedule: ScheduleConfig,
    num_steps: int,
    *,
    spacing: str = "schedule",
    final: str = "zero",
    lower_order_final: bool = True,
) -> Sampler:
    """DPM-Solver++ 2M, second-order multistep with midpoint weights   (Lu et al. 2022, DPM-Solver++, Alg. 2).

    Args:
        spacing: `schedule`, the levels of its timesteps, or `karras` (rho = 7), levels between its smallest and largest
            sigma, where the network is asked at the nearest timestep.
        final: the last level: `zero`, sigma = 0 (that step is first order, since the second-order one has no limit
            there), or `sigma_min`, the schedule's smallest.
        lower_order_final: the last step is first order when num_steps < 15, for stability.

    Raises:
        ValueError: on num_steps outside the schedule or an unknown choice.
    """
    visited, sigma = _solver_grid(schedule, num_steps, spacing)
    if final not in ("zero", "sigma_min"):
        raise fail("final", "zero or sigma_min", repr(final), "choose one of them")
    sigma = np.append(sigma, 0.0 if final == "zero" else sigmas(schedule)[0])
    alpha = 1.0 / np.sqrt(1.0 + sigma**2)
    first_order_end = final == "zero" or (lower_order_final and num_steps < 15)
    extrapolate = _midpoint_weights(sigma, first_order_end)
    # a D + b z with D the extrapolated clean estimate: deterministic DDIM from D
    shrink = alpha[1:] * sigma[1:] / (alpha[:-1] * sigma[:-1])
    clean = alpha[1:] - alpha[:-1] * shrink
    rows = np.stack([alpha[:-1], alpha[:-1] * sigma[:-1], clean, shrink, extrapolate], axis=1).astype(np.float32)

    def init(z_T):
        z = z_T.astype(jnp.float32)
        return DpmState(z=z, x0=jnp.zeros_like(z))

    def step(key, state, i, *, model_fn, x0_fn, index):
        alpha, sigma, clean, shrink, weight = jnp.asarray(rows)[i]
        prediction = ask(model_fn, state.z, visited, i)
        x0 = x0_fn(x0_at(prediction, state.z, alpha, sigma, schedule.prediction_type))
        extrapolated = x0 + weight * (x0 - state.x0)
        return DpmState(z=clean * extrapolated + shrink * state.z, x0=x0)

    return Sampler(init, step, num_steps, visited)


def _midpoint_weights(sigma: np.ndarray, first_order_end: bool) -> np.ndarray:
    """h_i / (2 h_{i-1}) with h the steps in log(alpha / sigma); 0 where the step is first order."""
    log_snr = -np.log(sigma[:-1] if sigma[-1] == 0 else sigma)
    h = np.diff(log_snr)  # [n - 1], or [n] where the last level has noise
    weights = np.zeros(len(sigma) - 1)
    second_order = len(h) if not first_order_end else len(sigma) - 2
    weights[1:second_order] = h[1:second_order] / (2.0 * h[: second_order - 1])
    return weights


def _solver_grid(schedule: ScheduleConfig, num_steps: int, spacing: str) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps int32 [num_steps] and their sigmas."""
    every = sigmas(schedule)
    if spacing == "karras":
        require(num_steps >= 1, "num_steps", "at least 1", num_steps, "ask for one step or more")
        ramp = np.linspace(0, 1, num_steps)
        sigma = (
            every[-1] ** (1 / 7) + ramp * (every[0] ** (1 / 7) - every[-1] ** (1 / 7))
        ) ** 7  # Karras et al., Eq. 5
        return np.interp(np.log(sigma), np.log(every), np.arange(len(every))).round().astype(np.int32), sigma
    if spacing != "schedule":
        raise fail("spacing", "schedule or karras", repr(spacing), "choose one of them")
    if schedule.timestep_spacing == "trailing":
        visited = timesteps(schedule, num_steps)
    else:  # the grid of one more step, without its last point: the solver ends at a level of its own
        visited = timesteps(schedule, num_steps + 1)[:-1]
    return visited, every[visited]
