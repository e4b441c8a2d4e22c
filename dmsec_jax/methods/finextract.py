"""FineXtract: training pictures out of a fine-tuned diffusion model, by guidance with the model it was tuned from.

Wu, Zhang, Wu, "Leveraging Model Guidance to Extract Training Data from Personalized Diffusion Models", ICML 2025,
arXiv 2410.03039.

Algorithm
    1. Fine-tuning moves the base distribution p part of the way to the training pictures q:  p' ~ p^(1 - lambda)
       q^lambda, so score_q = score_p + w (score_p' - score_p)  with  w = 1 / lambda.
    2. Sample N images from that extrapolated score, with a correction k against the text condition (`guided`).
    3. Embed them; link pairs whose similarity reaches a threshold; take maximum cliques greedily.
    4. The medoids of the cliques are the extracted set, as many as there were training pictures.

Symbols
    w' -> `w`    k -> `k`    N0 -> `count`    phi -> `threshold`
    eps_theta(z_t, t, null) -> `eps_base`    eps_theta'(z_t, t, c) -> `eps_tuned`

Deviations: public code, and what is here by default (the public behaviour by name, and the test that pins it)
    - Takes PNDM's timesteps, of which the second comes twice, for DDIM steps and stops at t = 1: `clean_ddim`
      (`public_ddim`; test_public_sampler_visits_the_documented_timesteps).
    - `--dt` divides by one standard deviation of the whole batch: `guidance.std_threshold` is per image, so that
      batches do not matter (`std_threshold_batch`; test_batch_threshold_couples_images).
    - Starts the threshold at a quantile of 1000 random entries, zero diagonal included: all pairs
      (`extracted_set_public`; tests of `clusters.sampled_start_threshold`).
    - Ends a clique search after 30 s and goes on to the next threshold: a budget of search nodes, whose best clique
      counts (`extracted_set_public` skips such thresholds; test_skipping_sweep_passes_over_an_exhausted_budget).
    - Keeps every clique, perhaps more than N0: ranked by size x tightness and cut at N0 (`extracted_set_public`;
      test_public_set_is_not_capped).
    - Needs N0: `extracted_set_unknown` ranks clusters with a confidence where it is unknown.
    - Takes the fine-tuned model's baseline with another sampler than its own method: every baseline here runs through
      `run`.

Baselines, on the same start noise: each is another `pair_fn` and `guide_fn` of the same functions
    plain sampling             pair_fn = alone(tuned at c)                       guide_fn = plain
    LoRA-scale extrapolation   pair_fn = alone(weights merged at scale s, at c)  guide_fn = plain
    classifier-free guidance   pair_fn = (tuned at null, tuned at c)             guide_fn = guided_by_caption
    the caption variant        pair_fn = (base at c, tuned at c)                 guide_fn = guided_by_caption
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmsec_jax.core import spread
from dmsec_jax.core.arrays import expand
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.config import config
from dmsec_jax.core.types import Latent, Params, Timestep
from dmsec_jax.diffusion import multistep, samplers
from dmsec_jax.diffusion.draws import example_noise
from dmsec_jax.diffusion.schedule import ScheduleConfig, alpha_bars, to_eps
from dmsec_jax.metrics import cliques, clusters

PairFn = Callable[[Params, Latent, Timestep], tuple[Latent, Latent]]
"""(params, z_t, t) -> (base prediction, tuned prediction), both of the type that the schedule names."""

GuideFn = Callable[[Latent, Latent, "Config"], Latent]
"""(eps_base, eps_tuned, cfg) -> eps_hat."""

SamplerFn = Callable[[ScheduleConfig, int], samplers.Sampler]
"""(schedule, num_steps) -> sampler."""


@config
class Config:
    """Guidance; the defaults are the public code's for full fine-tuning (LoRA: w = 5, k = 0).

    `w` and `k` may be [B], one value per image.
    """

    w: float = 3.0
    k: float = -0.02
    num_steps: int = 50


class NoneFinite(ValueError):
    """Guidance so strong that no image of any setting is finite."""


class State(NamedTuple):
    sampler: Any
    """The sampler's own state; `sampler.z` is z_t [B, h, w, c]."""
    index: Int[Array, "B"]
    """Global indices of the images."""
    i: Int[Array, ""]
    """Steps done."""


class Info(NamedTuple):
    """Per image; `run` stacks steps in front."""

    finite: Bool[Array, "... B"]
    rms: Float[Array, "... B"]
    """Root mean square of z_t: near 1 for latents that the model knows, large where guidance is too strong."""


class Extraction(NamedTuple):
    """[N, ...] from `extract`, [G, N, ...] from `sweep`."""

    images: np.ndarray
    """Clean latents, or what `finish_fn` made of them."""
    finite: np.ndarray
    """bool. Images that are not finite must be left out of features and means: `images[finite]`."""
    rms: np.ndarray
    """Root mean square of the final latent."""


KeptFn = Callable[[range, Callable[[], Extraction]], Extraction]
"""(numbers of the batch's images, what computes them) -> the batch."""


def guided(eps_base: Latent, eps_tuned: Latent, cfg: Config) -> Latent:
    """eps_hat = (1 - w + k) eps_base + w eps_tuned   (guidance with its text correction k)."""
    return guided_by_caption(eps_base, eps_tuned, cfg) + expand(jnp.asarray(cfg.k), eps_base) * eps_base


def guided_by_caption(eps_base: Latent, eps_tuned: Latent, cfg: Config) -> Latent:
    """eps_hat = eps_base + w (eps_tuned - eps_base), where the base branch sees the caption too."""
    return eps_base + expand(jnp.asarray(cfg.w), eps_base) * (eps_tuned - eps_base)


def plain(eps_base: Latent, eps_tuned: Latent, cfg: Config) -> Latent:
    """eps_hat = eps_tuned."""
    return eps_tuned


def alone(eps_fn: Callable[[Params, Latent, Timestep], Latent]) -> PairFn:
    """The pair of a model with itself, for one evaluation; goes with `plain`. Keep it: a new one compiles anew."""

    def pair_fn(params, z_t, t):
        prediction = eps_fn(params, z_t, t)
        return prediction, prediction

    return pair_fn


def clean_ddim(schedule: ScheduleConfig, num_steps: int) -> samplers.Sampler:
    """Deterministic DDIM on the schedule's own timesteps, down to its final level."""
    return samplers.ddim(schedule, num_steps)


def public_ddim(schedule: ScheduleConfig, num_steps: int) -> samplers.Sampler:
    """The public code's sampler: DDIM from t to max(1, t - T // n), over PNDM's list of n + 1 without its last."""
    visited = multistep.pndm(dataclasses.replace(schedule, skip_prk_steps=True), num_steps).timesteps[:num_steps]
    previous = np.maximum(1, visited - schedule.num_train_timesteps // num_steps)
    return samplers.ddim(schedule, visited, previous=previous)


def std_threshold_batch(x0: Latent) -> Latent:
    """x0 / max(1, std(x0)) with one unbiased standard deviation for the whole batch, as the public code's `--dt`."""
    return x0 / jnp.maximum(1.0, jnp.std(x0, ddof=1))


def init(
    z_T: Latent, index: Int[Array, "B"], cfg: Config, *, schedule: ScheduleConfig, sampler_fn: SamplerFn = clean_ddim
) -> State:
    """Standard normal latents, one for each global image index, before the first step."""
    return State(sampler=_sampler(schedule, cfg, sampler_fn).init(z_T), index=index, i=jnp.int32(0))


def step(
    key: Array,
    state: State,
    params: Params,
    cfg: Config,
    *,
    pair_fn: PairFn,
    schedule: ScheduleConfig,
    sampler_fn: SamplerFn = clean_ddim,
    guide_fn: GuideFn = guided,
    x0_fn: samplers.X0Fn = samplers.identity,
) -> tuple[State, Info]:
    """One denoising step of all images.

    Args:
        key: this step's; only stochastic samplers use it, folded with each image's index.
        params: whatever `pair_fn` needs: weights of both models, contexts.
        pair_fn: (params, z_t, t) -> (base prediction, tuned prediction).
        schedule: of both models; predictions of another type are turned into noise before they are mixed.
        x0_fn: hook on the predicted clean latent, for example `guidance.std_threshold`.
    """
    alpha_bar = alpha_bars(schedule)

    def model_fn(z_t, t):
        as_noise = lambda p: to_eps(alpha_bar, p.astype(jnp.float32), z_t, t, schedule.prediction_type)
        eps_base, eps_tuned = map(as_noise, pair_fn(params, z_t, t))
        return guide_fn(eps_base, eps_tuned, cfg)

    sampler = _sampler(schedule, cfg, sampler_fn)
    inner = sampler.step(key, state.sampler, state.i, model_fn=model_fn, x0_fn=x0_fn, index=state.index)
    axes = tuple(range(1, inner.z.ndim))
    info = Info(finite=jnp.isfinite(inner.z).all(axes), rms=jnp.sqrt(jnp.square(inner.z).mean(axes)))
    return State(sampler=inner, index=state.index, i=state.i + 1), info


def run(
    key: Array,
    z_T: Latent,
    index: Int[Array, "B"],
    params: Params,
    cfg: Config,
    *,
    pair_fn: PairFn,
    schedule: ScheduleConfig,
    sampler_fn: SamplerFn = clean_ddim,
    guide_fn: GuideFn = guided,
    x0_fn: samplers.X0Fn = samplers.identity,
) -> tuple[State, Info]:
    """All denoising steps of a batch; step i uses fold_in(key, i).

    Example:
        jax.jit(run, static_argnames=("pair_fn", "schedule", "sampler_fn", "guide_fn", "x0_fn"))
    """

    def body(state, i):
        options = {"pair_fn": pair_fn, "schedule": schedule, "sampler_fn": sampler_fn, "guide_fn": guide_fn}
        return step(jax.random.fold_in(key, i), state, params, cfg, x0_fn=x0_fn, **options)

    num_steps = _sampler(schedule, cfg, sampler_fn).num_steps  # PNDM takes more evaluations than cfg.num_steps
    return jax.lax.scan(body, init(z_T, index, cfg, schedule=schedule, sampler_fn=sampler_fn), jnp.arange(num_steps))


def start_noise(key: Array, index: Int[Array, "B"], shape: tuple[int, ...]) -> Latent:
    """z_T [B, *shape]; row j depends on the key and the global index[j] alone: whatever model and batch size."""
    return example_noise(key, index, shape)


def extract(key: Array, params: Params, cfg: Config, *, count: int, **options) -> Extraction:
    """`count` images at one guidance; options and errors as `sweep`."""
    grid = dataclasses.replace(cfg, w=jnp.reshape(jnp.float32(cfg.w), 1), k=jnp.reshape(jnp.float32(cfg.k), 1))
    return Extraction(*(array[0] for array in sweep(key, params, grid, count=count, **options)))


def sweep(
    key: Array,
    params: Params,
    grid: Config,
    *,
    count: int,
    shape: tuple[int, ...],
    batch_size: int,
    pair_fn: PairFn,
    schedule: ScheduleConfig,
    sampler_fn: SamplerFn = clean_ddim,
    guide_fn: GuideFn = guided,
    x0_fn: samplers.X0Fn = samplers.identity,
    finish_fn: Callable[[Latent], Array] | None = None,
    progress: Callable[[int, int], None] | None = None,
    kept_fn: KeptFn | None = None,
) -> Extraction:
    """`count` images for each of G guidance settings, all from the same start noise, in batches that may span settings.

    Args:
        grid: a Config whose `w` and `k` are [G].
        shape: of one latent (h, w, c).
        finish_fn: latents [B, h, w, c] -> array [B, ...], for example decoding, called on each batch outside `jit`.
        progress: called as progress(done, total) after each batch.
        kept_fn: for runs that may be interrupted, asked for every batch: it computes it, or brings what it computed in an earlier run.

    Raises:
        ValueError: on counts below 1 or w and k of other shapes.
        NoneFinite: if no image of any setting is finite.
    """
    w, k = np.asarray(grid.w, np.float32), np.asarray(grid.k, np.float32)
    paired = w.ndim == 1 and w.shape == k.shape and w.size > 0
    require(paired, "grid", "w and k of one shape [G]", (w.shape, k.shape), "pair them up")
    require(count >= 1, "count", "at least 1", count, "ask for some images")
    require(batch_size >= 1, "batch_size", "at least 1", batch_size, "use as many as fit the memory")
    total = w.size * count
    options = {"pair_fn": pair_fn, "schedule": schedule, "sampler_fn": sampler_fn, "guide_fn": guide_fn, "x0_fn": x0_fn}
    chunks = []
    for position, used in spread.batches(total, batch_size):
        point, index = position // count, position % count

        def chunk(point=point, index=index, used=used) -> Extraction:
            cfg = dataclasses.replace(grid, w=jnp.asarray(w[point]), k=jnp.asarray(k[point]))
            latent, finite, rms = _sample_chunk(key, jnp.asarray(index, jnp.int32), params, cfg, shape=shape, **options)
            images = np.asarray(latent if finish_fn is None else finish_fn(latent))
            finite = np.asarray(finite) & np.isfinite(images).all(axis=tuple(range(1, images.ndim)))
            return Extraction(images[:used], finite[:used], np.asarray(rms)[:used])

        done = range(position[0], position[0] + used)
        chunks.append(chunk() if kept_fn is None else kept_fn(done, chunk))
        if progress is not None:
            progress(done.stop, total)
    joined = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    result = Extraction(*(array.reshape(w.size, count, *array.shape[1:]) for array in joined))
    if not result.finite.any():
        settings = ", ".join(f"(w={a:g}, k={b:g})" for a, b in zip(w, k, strict=True))
        got = f"none finite of {count} at {settings}"
        raise NoneFinite(*fail("guidance", "weak enough for finite images", got, "use a weaker one").args)
    return result


def extracted_set(
    features, count: int, *, partition_fn: clusters.PartitionFn = cliques.partition
) -> tuple[clusters.Cluster, ...]:
    """At most `count` (N0) clusters of features [N, D], best first; their medoids are the extracted pictures."""
    similarity = clusters.similarity_matrix(features)
    found = clusters.sweep_up(similarity, count, clusters.start_threshold(similarity), partition_fn=partition_fn)
    return clusters.rank(found.groups, similarity, features)[:count]


def extracted_set_public(seed: int, features, count: int) -> tuple[clusters.Cluster, ...]:
    """As the public code: sampled start, exhausted searches skipped, every clique kept: over `count`, or none."""
    similarity = clusters.similarity_matrix(features)
    found = clusters.sweep_up_skipping(similarity, count, clusters.sampled_start_threshold(seed, similarity))
    return clusters.rank(found.groups if found else (), similarity, features)


def extracted_set_unknown(
    features, *, partition_fn: clusters.PartitionFn = cliques.partition
) -> tuple[clusters.Cluster, ...]:
    """Where N0 is unknown: every stable cluster, ranked, with a confidence each."""
    return clusters.stable(clusters.similarity_matrix(features), features, partition_fn=partition_fn)


def _sampler(schedule: ScheduleConfig, cfg: Config, sampler_fn: SamplerFn) -> samplers.Sampler:
    """The sampler of guided noise, whatever the two networks predict."""
    return sampler_fn(dataclasses.replace(schedule, prediction_type="epsilon"), cfg.num_steps)


@partial(jax.jit, static_argnames=("shape", "pair_fn", "schedule", "sampler_fn", "guide_fn", "x0_fn"))
def _sample_chunk(key, index, params, cfg, *, shape, **options):
    """(clean latents [B, *shape], finite [B], rms [B]) of the images with these global indices."""
    key_start, key_steps = jax.random.split(key)
    index, cfg = spread.even((index, cfg))
    state, info = run(key_steps, start_noise(key_start, index, shape), index, params, cfg, **options)
    return spread.whole((state.sampler.z, info.finite[-1], info.rms[-1]))
