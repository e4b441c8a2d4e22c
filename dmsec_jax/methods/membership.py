"""Membership tests of the literature, each in its paper's form: one statistic per picture from a model (or two) and its latent.

All take `model_fn` (z_t, t) -> prediction with parameters and context bound, clean scaled latents z0 [B, h, w, c] and a schedule; whatever
the network predicts, errors are those of the noise, as in the papers. What a statistic says of a member differs:

| function            | a member has | network evaluations                       | source |
|---------------------|--------------|-------------------------------------------|--------|
| `loss`              | low          | K                                         | Carlini et al. 2023; Matsumoto et al. 2023 |
| `loss_difference`   | high         | 2 K                                       | the loss of two models under common noise |
| `secmi`             | low          | t / interval + 2                          | Duan et al. 2023, SecMI_stat |
| `pia`               | low          | 1 + timesteps                             | Kong et al. 2024, PIA; PIAN if normalised |
| `pfami`             | low          | (1 + neighbours) x timesteps              | Fu et al. 2023, PFAMI_Met |
| `clid`              | high         | 2 K                                       | Zhai et al. 2024, CLiD |
| `gradient_norms`    | low          | timesteps, with weight gradients          | Pang et al. 2023, GSA_1 and GSA_2 |

`SIGN` turns each into evidence, higher for members. No threshold is chosen here: see `metrics.evidence`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmsec_jax.core.arrays import expand
from dmsec_jax.core.checks import require
from dmsec_jax.core.means import mean_over
from dmsec_jax.core.types import AnyArray, Key, Latent, ModelFn, Params, PerExample
from dmsec_jax.diffusion import draws, samplers
from dmsec_jax.diffusion.draws import Draw, Window
from dmsec_jax.diffusion.loss import denoising_loss, grid_loss, monte_carlo_loss
from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars, to_eps

SIGN = {
    "loss": -1,
    "loss-difference": 1,
    "secmi": -1,
    "pia": -1,
    "pian": -1,
    "pfami": -1,
    "clid": 1,
    "gradient-norm": -1,
}
"""Statistic times this is higher for members."""

Grid = Sequence[int] | Int[AnyArray, "M"]


class Difference(NamedTuple):
    """Of two models on the same draws, per example."""

    mean: PerExample
    """Loss of the base model minus loss of the fine-tuned one."""
    t_statistic: PerExample
    """That mean over its standard error across the draws."""


def predicts_noise(model_fn: ModelFn, schedule: ScheduleConfig) -> ModelFn:
    """The model as one that predicts the noise, float32."""
    alpha_bar = alpha_bars(schedule)
    return lambda z_t, t: to_eps(alpha_bar, model_fn(z_t, t).astype(jnp.float32), z_t, t, schedule.prediction_type)


def losses(
    key: Key,
    model_fn: ModelFn,
    z0: Latent,
    schedule: ScheduleConfig,
    *,
    num_draws: int,
    draw: Draw = draws.uniform_draw,
    window: Window | None = None,
    index: Int[AnyArray, "B"] | None = None,
    chunk: int = 1,
) -> Float[Array, "B K"]:
    """|eps_theta(z_t, t) - eps|^2 / entries at each of K draws of (t, eps); `draws.listed_draw([t])` asks at one timestep.

    Options as `diffusion.loss.monte_carlo_loss`: the same key asks several models on the same draws.
    """
    eps_fn, alpha_bar = predicts_noise(model_fn, schedule), alpha_bars(schedule)
    options = {"num_draws": num_draws, "draw": draw, "window": window, "index": index, "chunk": chunk}
    return monte_carlo_loss(key, eps_fn, alpha_bar, z0, **options)


def loss(key: Key, model_fn: ModelFn, z0: Latent, schedule: ScheduleConfig, **options) -> PerExample:
    """Mean over K draws of |eps_theta(z_t, t) - eps|^2. Options as `losses`."""
    return losses(key, model_fn, z0, schedule, **options).mean(axis=1)


def loss_difference(
    key: Key,
    base_fn: ModelFn,
    tuned_fn: ModelFn,
    z0: Latent,
    schedule: ScheduleConfig,
    *,
    common: bool = True,
    **options,
) -> Difference:
    """Loss of the base model minus that of the fine-tuned one, both on the same draws of (t, noise).

    Args:
        common: False draws noise and timesteps for the two apart, to show what common draws are worth.
        options: as `losses`; `num_draws` of at least 2 for a finite t statistic.
    """
    base = losses(key, base_fn, z0, schedule, **options)
    return difference(base, losses(key if common else apart(key), tuned_fn, z0, schedule, **options))


def difference(base: Float[Array, "B K"], tuned: Float[Array, "B K"]) -> Difference:
    """Of two models' losses on the same draws."""
    gap = base - tuned
    error = jnp.std(gap, axis=1, ddof=1) / jnp.sqrt(gap.shape[1])
    return Difference(gap.mean(axis=1), gap.mean(axis=1) / error)


def apart(key: Key) -> Key:
    """The key of the fine-tuned model's own draws, where they are not common."""
    return jax.random.fold_in(key, 1)


def secmi(model_fn: ModelFn, z0: Latent, schedule: ScheduleConfig, *, t: int = 100, interval: int = 10) -> PerExample:
    """|back(forth(x_t)) - x_t|^2 after deterministic inversion of z0 to t: DDIM's error over one interval.

    x_0 -> x_interval -> ... -> x_t by DDIM inversion, one interval further, and one step back. The public code takes t = 100 and interval 10.

    Raises:
        ValueError: unless interval divides t, and t + interval lies within the schedule.
    """
    total = schedule.num_train_timesteps
    fits = interval >= 1 and t >= interval and t % interval == 0 and t + interval < total
    require(fits, "t", f"a multiple of interval={interval} below {total - interval}", t, "take for example 100 and 10")
    eps_fn, as_eps = predicts_noise(model_fn, schedule), _of_noise(schedule)
    key = jax.random.key(0)  # nothing is drawn
    forth = samplers.ddim_inversion(as_eps, np.arange(interval, t + 1, interval))
    x_t = samplers.sample(key, z0, forth, model_fn=eps_fn)
    further = samplers.sample(key, x_t, samplers.ddim_inversion(as_eps, [t + interval], start=t), model_fn=eps_fn)
    back = samplers.sample(key, further, samplers.ddim(as_eps, [t + interval], previous=[t]), model_fn=eps_fn)
    return jnp.sum(jnp.square(back - x_t), axis=(1, 2, 3))


def pia(
    model_fn: ModelFn,
    z0: Latent,
    schedule: ScheduleConfig,
    *,
    timesteps: Grid = (200,),
    power: float = 4.0,
    normalised: bool = False,
) -> PerExample:
    """sum over t of |e0 - eps_theta(sqrt(a) z0 + sqrt(1 - a) e0, t)|_p^p with e0 = eps_theta(z0, 0).

    Args:
        timesteps: the evaluation of e0 serves all.
        normalised: PIAN: e0 is scaled so that its mean absolute entry is that of a normal variable, sqrt(2 / pi).
    """
    alpha_bar, eps_fn = alpha_bars(schedule), predicts_noise(model_fn, schedule)
    e0 = eps_fn(z0, jnp.zeros(z0.shape[0], jnp.int32))
    if normalised:
        e0 = e0 * expand(jnp.sqrt(2 / jnp.pi) / jnp.abs(e0).mean(axis=(1, 2, 3)), e0)

    def one(t):
        at = jnp.full(z0.shape[0], t)
        error = e0 - eps_fn(add_noise(alpha_bar, z0, e0, at), at)
        return jnp.sum(jnp.abs(error) ** power, axis=(1, 2, 3))

    return jax.lax.map(one, _grid(timesteps, schedule)).sum(axis=0)


def pfami(
    key: Key,
    model_fn: ModelFn,
    z0: Latent,
    neighbours: Float[AnyArray, "M B h w c"],
    schedule: ScheduleConfig,
    *,
    timesteps: Grid,
    index: Int[AnyArray, "B"] | None = None,
) -> PerExample:
    """Mean over neighbours of the sum over t of (L_t(z0) - L_t(neighbour)) / L_t(z0): a member sits in a dip of the loss.

    Args:
        neighbours: latents of the same pictures, changed a little; the paper crops by rising strengths.
        index: global indices of the examples; the same noise is used for a picture and its neighbours.
    """
    grid = _grid(timesteps, schedule)
    eps_fn, alpha_bar = predicts_noise(model_fn, schedule), alpha_bars(schedule)
    losses = lambda z: grid_loss(key, eps_fn, alpha_bar, z, grid, index=index)  # [B, T]
    own = losses(z0)
    dips = jax.lax.map(lambda z: ((own - losses(z)) / own).sum(axis=1), jnp.asarray(neighbours))
    return dips.mean(axis=0)


def clid(
    key: Key, conditional_fn: ModelFn, unconditional_fn: ModelFn, z0: Latent, schedule: ScheduleConfig, **options
) -> PerExample:
    """E[L(z0; null) - L(z0; c)] on common draws: a model that overfits knows its pictures by their captions.

    Options as `losses`.
    """
    return loss_difference(key, unconditional_fn, conditional_fn, z0, schedule, **options).mean


def gradient_norms(
    key: Key,
    predict_fn: Callable[[Params, Latent, Int[Array, "B"]], Latent],
    params: Params,
    z0: Latent,
    schedule: ScheduleConfig,
    *,
    timesteps: Grid,
    variant: int = 1,
    index: Int[AnyArray, "B"] | None = None,
) -> Float[Array, "B P"]:
    """Per example and parameter leaf (in the order of `jax.tree.leaves`), the norm of the loss gradient: features for a classifier.

    GSA_1: of the gradient of the mean over timesteps; GSA_2: mean over timesteps of the norms. One example and timestep at a time, with the noise
    of `grid_loss`, so that memory holds the activations of one evaluation. As one number, take `jnp.linalg.norm(features, axis=1)`.

    Args:
        predict_fn: (params, z_t, t) -> prediction.
        variant: 1 or 2.
    """
    require(variant in (1, 2), "variant", "1 or 2", variant, "choose GSA_1 or GSA_2")
    grid = _grid(timesteps, schedule)
    alpha_bar = alpha_bars(schedule)
    index = jnp.arange(z0.shape[0]) if index is None else jnp.asarray(index)

    norms = lambda tree: jnp.stack([jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(tree)])

    def features(example):
        z, own = example

        def gradient(item):
            position, t = item
            noise = draws.standard_normal(jax.random.fold_in(jax.random.fold_in(key, own), position), z.shape)[None]

            def loss(params):
                eps_fn = predicts_noise(lambda z_t, t: predict_fn(params, z_t, t), schedule)
                return denoising_loss(eps_fn, alpha_bar, z[None], t[None], noise)[0]

            return jax.grad(loss)(params)

        items = jnp.arange(grid.size), jnp.asarray(grid)
        return (
            norms(mean_over(gradient, items)) if variant == 1 else mean_over(lambda item: norms(gradient(item)), items)
        )

    return jax.lax.map(features, (z0, index))


def _of_noise(schedule: ScheduleConfig) -> ScheduleConfig:
    return dataclasses.replace(schedule, prediction_type="epsilon", clip_sample=False)


def _grid(timesteps: Grid, schedule: ScheduleConfig) -> Int[Array, "M"]:
    grid = np.asarray(timesteps, np.int32)
    fits = grid.ndim == 1 and grid.size > 0 and bool(((grid >= 0) & (grid < schedule.num_train_timesteps)).all())
    contract = f"a list of timesteps in 0..{schedule.num_train_timesteps - 1}"
    require(fits, "timesteps", contract, grid.tolist(), "correct the list")
    return jnp.asarray(grid)
