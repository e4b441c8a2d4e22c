"""AdvDM and its family: change a picture a little so that a diffusion model cannot denoise it, and so learns little from it.

Liang, Wu, Hua, Zhang, Xue, Song, Xue, Ma, Guan, "Adversarial Example Does Good: Preventing Painting Imitation from Diffusion Models via
Adversarial Examples", ICML 2023, arXiv 2302.04578.

Algorithm
    x' = argmax over |x' - x| <= radius of  L_DM(x') = E_z,t,eps |eps_theta(z_t, t, c) - eps|^2,   z ~ q(z | x'), by projected gradient ascent:
    1. Draw z from the encoder's posterior of x', a timestep and noise, `num_draws` times, for each picture on its own.
    2. Follow the gradient through network and encoder to the pixels, in sign (L-inf) or direction (L2); `core.pgd` keeps ball, box and mask.
    3. Repeat. What is ascended is one of the objectives below.

Objectives
    denoising          AdvDM: L_DM;  `denoising_descent`: minus L_DM
    distillation       SDS: E' [eps_theta - eps], without the network's own Jacobian (Xue et al., ICLR 2024, arXiv 2311.12832);
                       `distillation_descent` with the other sign, `distillation_targeted` joined with the textural term
    textural, fused    Mist: minus the squared distance to a target latent; with rate L_DM added (Liang & Wu 2023, arXiv 2305.12683)
    encoder            PhotoGuard's encoder attack: the same distance of posterior means (Salman et al., ICML 2023, arXiv 2302.06588)
    score              ACE: the predicted noise is pulled to a fixed latent (Zheng et al. 2023, arXiv 2310.04687)
    `control`          no objective: random change of the same norm, what every effect has to be compared with

Symbols
    x -> image    x' - x -> `State.attack.delta`    zeta -> `Config.attack.budget`    alpha -> `Config.attack.step_size`    z_y -> target

Deviations: public code, and what is here
    - Encodes the constant target and the constant prompt in every step, and the picture twice in the fused mode: constants are arguments here,
      the picture is encoded once (test_fused_is_the_sum_of_its_terms).
    - Draws the target's latent from the posterior: the caller passes the mean.
    - One draw per step: `num_draws`, averaged, stratified or antithetic if the caller says so (test_draws_are_averaged).
    - ACE+ as published ascends the distance to its target although it says that it descends: `score` descends it, and ACE+ is left out.
    - Budgets are quoted on [0, 1] (Mist, SDS) or [-1, 1] (ACE, PhotoGuard): `core.pgd.Budget` carries its unit.
    - One picture at a time: a batch, with keys per example (test_a_batch_is_its_examples).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmsec_jax.core import pgd
from dmsec_jax.core.arrays import expand
from dmsec_jax.core.config import config
from dmsec_jax.core.pgd import Budget
from dmsec_jax.core.types import AnyArray, Image, Key, Latent, Params, Timestep
from dmsec_jax.diffusion import draws
from dmsec_jax.diffusion.draws import Draw
from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars, to_eps

EncodeFn = Callable[[Params, Image], tuple[Latent, Latent]]
"""(params, image) -> (mean, logvar) of scaled latents."""

EpsFn = Callable[[Params, Latent, Timestep], Latent]
"""(params, z_t, t) -> the network's prediction, its context bound."""

Target = Float[AnyArray, "_ _ _ _"] | Float[AnyArray, ""] | float
"""z_y: latents [B or 1, h, w, c], or one number for all entries."""
Mask = Float[AnyArray, "..."]
"""Broadcasts to the pictures; 0 where they must not change, else 1."""
PerDraw = Float[Array, "R"]


@config
class Config:
    """The paper's values.

    attack: ball, box, steps.
    num_draws: of (z, t, noise) per step.
    t_min, t_max: t_min <= t < t_max.
    rate: weight of the denoising term beside the distance to the target, in `fused` and `distillation_targeted`.
    """

    attack: pgd.Config = pgd.Config()
    num_draws: int = 1
    t_min: int = 0
    t_max: int = 1000
    rate: float = 1e4


_SMALL_STEPS = {"budget": Budget(16.0, "8bit"), "step_size": Budget(1.0, "8bit"), "num_steps": 100}
ADVDM = Config()
MIST = Config(attack=pgd.Config(**_SMALL_STEPS, start="random"))
"""For `textural` and `fused`; the rate is for latents of 64 x 64 x 4, over which the distance is summed."""
SDS = Config(attack=pgd.Config(**_SMALL_STEPS), rate=5.0)
PHOTOGUARD = Config(
    attack=pgd.Config(budget=Budget(0.1, "pm1"), step_size=Budget(0.015, "pm1"), decay=0.01, start="random")
)
ACE = Config(attack=pgd.Config(budget=Budget(8 / 255, "pm1"), step_size=Budget(0.005, "pm1"), num_steps=150))


class State(NamedTuple):
    attack: pgd.State
    index: Int[Array, "B"]
    """Global indices of the examples."""


class Info(NamedTuple):
    """Per example, of one step; `run` stacks steps in front."""

    value: Float[Array, "... B"]
    """At the draws of the step, before it: L_DM, or the squared distance to the target where the network is not asked."""
    gradient_norm: Float[Array, "... B"]
    finite: Bool[Array, "... B"]
    """Whether the gradient was; where not, it counted as zero: without momentum the example stayed where it was."""


class Seen(NamedTuple):
    """A batch as an objective sees it; draws lie example by example, [B K, ...]."""

    mean: Latent
    """Of the posterior, repeated for each draw."""
    latent: Latent
    """Drawn from it."""
    target: Target
    """z_y, broadcasts to `latent`."""
    predict_fn: Callable[[Latent], tuple[Latent, Latent]]
    """z_0 -> (predicted noise, noise) at the draws of this step."""


ObjectiveFn = Callable[[Seen, Config], tuple[PerDraw, PerDraw]]
"""(seen, cfg) -> (what is ascended, what is reported), a number per draw."""


def denoising(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """AdvDM(+): L_DM, the mean over latent entries."""
    eps_hat, noise = seen.predict_fn(seen.latent)
    loss = _mean_square(eps_hat - noise)
    return loss, loss


def denoising_descent(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """AdvDM(-): the picture becomes easy to denoise, and loses its detail."""
    loss, _ = denoising(seen, cfg)
    return -loss, loss


def distillation(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """SDS(+): its gradient is that of the encoder applied to eps_theta - eps, no pass back through the network   (arXiv 2311.12832, Eq. 6)."""
    eps_hat, noise = seen.predict_fn(jax.lax.stop_gradient(seen.latent))
    error = jax.lax.stop_gradient(eps_hat - noise)
    return _sum(error * seen.latent), _mean_square(error)


def distillation_descent(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """SDS(-)."""
    value, loss = distillation(seen, cfg)
    return -value, loss


def distillation_targeted(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """SDST(-): descends both rate times SDS and the distance to the target."""
    value, loss = distillation(seen, cfg)
    return -cfg.rate * value - _sum(jnp.square(seen.latent - seen.target)), loss


def textural(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """Mist, mode 1: descends |z - z_y|^2, the sum over entries; the network is not asked."""
    distance = _sum(jnp.square(seen.latent - seen.target))
    return -distance, distance


def fused(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """Mist, mode 2 and its default: ascends rate L_DM - |z - z_y|^2."""
    loss, _ = denoising(seen, cfg)
    return cfg.rate * loss - _sum(jnp.square(seen.latent - seen.target)), loss


def encoder(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """PhotoGuard: descends |E(x').mean - z_y|^2; a target of zeros is its simple form."""
    distance = _sum(jnp.square(seen.mean - seen.target))
    return -distance, distance


def score(seen: Seen, cfg: Config) -> tuple[PerDraw, PerDraw]:
    """ACE: descends the mean of |eps_theta(z_t, t, c) - z_y|^2."""
    eps_hat, noise = seen.predict_fn(seen.latent)
    return -_mean_square(eps_hat - seen.target), _mean_square(eps_hat - noise)


def control(key: Key, image: Image, mask: Mask, index: Int[AnyArray, "B"], cfg: Config) -> Image:
    """A random change [B, H, W, C] of the norm of the budget: random signs (L-inf), or a random direction (L2)."""
    noise = draws.example_noise(key, jnp.asarray(index), image.shape[1:]) * mask
    radius = expand(jnp.asarray(cfg.attack.budget.to(cfg.attack.unit)), noise)
    return pgd.in_box(image, radius * pgd.direction(noise, cfg.attack.norm), cfg.attack)


def init(key: Key, image: Image, mask: Mask, index: Int[AnyArray, "B"], cfg: Config) -> State:
    """At the pictures, or at random around them, as `cfg.attack.start` says."""
    index = jnp.asarray(index, jnp.int32)
    return State(pgd.init(key, jnp.asarray(image), mask, index, cfg.attack), index)


def step(
    key: Key,
    state: State,
    image: Image,
    mask: Mask,
    target: Target,
    params: Params,
    cfg: Config,
    *,
    objective_fn: ObjectiveFn,
    encode_fn: EncodeFn,
    eps_fn: EpsFn,
    schedule: ScheduleConfig,
    draw_fn: Draw = draws.uniform_draw,
) -> tuple[State, Info]:
    """One step of all pictures.

    Args:
        key: this step's; example j folds in its global index.
        image: the originals [B, H, W, C] in [-1, 1]; C is what `encode_fn` takes.
        target: z_y; any number, for example 0, where the objective has none.
        params: what `encode_fn` and `eps_fn` need.
        draw_fn: of `diffusion.draws`; draws `cfg.num_draws` of (t, noise) per example.
    """
    options = {"encode_fn": encode_fn, "eps_fn": eps_fn, "schedule": schedule, "draw_fn": draw_fn}
    gradient_fn = _gradient_fn(state.index, target, params, cfg, objective_fn=objective_fn, **options)
    attack, info, value = pgd.step(key, state.attack, image, mask, cfg.attack, gradient_fn=gradient_fn)
    return State(attack, state.index), Info(value, *info)


def run(
    key: Key,
    image: Image,
    mask: Mask,
    target: Target,
    index: Int[AnyArray, "B"],
    params: Params,
    cfg: Config,
    *,
    objective_fn: ObjectiveFn,
    encode_fn: EncodeFn,
    eps_fn: EpsFn,
    schedule: ScheduleConfig,
    draw_fn: Draw = draws.uniform_draw,
) -> tuple[State, Info]:
    """All steps as one `scan`; step i uses fold_in(key, i), the random start fold_in(key, num_steps).

    Example:
        jax.jit(run, static_argnames=("objective_fn", "encode_fn", "eps_fn", "schedule", "draw_fn"))
    """
    options = {"encode_fn": encode_fn, "eps_fn": eps_fn, "schedule": schedule, "draw_fn": draw_fn}
    state = init(jax.random.fold_in(key, cfg.attack.num_steps), image, mask, index, cfg)
    steps = {"num_steps": cfg.attack.num_steps, "objective_fn": objective_fn}
    return advance(key, state, image, mask, target, params, cfg, **steps, **options)


def advance(
    key: Key,
    state: State,
    image: Image,
    mask: Mask,
    target: Target,
    params: Params,
    cfg: Config,
    *,
    num_steps: int,
    **options,
) -> tuple[State, Info]:
    """`num_steps` steps on from a state: pieces give what one run gives. Options as `step`."""
    gradient_fn = _gradient_fn(state.index, target, params, cfg, **options)
    steps = {"gradient_fn": gradient_fn, "num_steps": num_steps}
    attack, info, value = pgd.advance(key, state.attack, image, mask, cfg.attack, **steps)
    return State(attack, state.index), Info(value, *info)


def _gradient_fn(
    index, target, params, cfg: Config, *, objective_fn, encode_fn, eps_fn, schedule, draw_fn=draws.uniform_draw
) -> pgd.GradientFn:
    """(key, x') -> (gradient of the objective's mean over draws, what it reports), both per example."""

    def total(image, key):
        seen = _seen(key, image, index, target, params, cfg, encode_fn, eps_fn, schedule, draw_fn)
        ascended, reported = objective_fn(seen, cfg)
        return ascended.sum() / cfg.num_draws, reported.reshape(-1, cfg.num_draws).mean(axis=1)

    return lambda key, image: jax.grad(total, has_aux=True)(image, key)


def _seen(key, image, index, target, params, cfg, encode_fn, eps_fn, schedule, draw_fn) -> Seen:
    """Encodes once, draws (z, t, noise) `num_draws` times for each example; the network is asked for all at once."""
    count, window = cfg.num_draws, draws.window(cfg.t_min, cfg.t_max, schedule.num_train_timesteps)
    mean, logvar = (jnp.repeat(x, count, axis=0) for x in encode_fn(params, image))
    shape, alpha_bar = mean.shape[1:], alpha_bars(schedule)

    def drawn(own, k):  # (t, noise, the posterior's noise)
        own_posterior = jax.random.fold_in(own, count)  # no draw uses it
        posterior = draws.standard_normal(jax.random.fold_in(own_posterior, k), shape)
        return *draw_fn(own, k, count, shape, window), posterior

    t, noise, posterior = draws.many(key, index, count, drawn)

    def predict_fn(z0):
        z_t = add_noise(alpha_bar, z0, noise, t)
        prediction = eps_fn(params, z_t, t).astype(jnp.float32)
        return to_eps(alpha_bar, prediction, z_t, t, schedule.prediction_type), noise

    target = jnp.asarray(target, mean.dtype)
    if target.ndim and target.shape[0] > 1:
        target = jnp.repeat(target, count, axis=0)
    return Seen(mean, mean + jnp.exp(0.5 * logvar) * posterior, target, predict_fn)


def _sum(x):
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _mean_square(x):
    return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))
