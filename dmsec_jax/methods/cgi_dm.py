"""CGI-DM: was this picture used? Hide half of it, let the fine-tuned model fill it in against the base model, and look.

Wu, Hua, Liang, Zhang, Wang, Song, Guan, "CGI-DM: Digital Copyright Authentication for Diffusion Models via Contrasting Gradient
Inversion", CVPR 2024, arXiv 2403.11162.

Algorithm
    1. Keep a part of the picture's latent z (`mask`), hide the rest; start from what the autoencoder makes of the kept part (`start`).
    2. Maximise KL(p' || p) given the completed picture by Monte Carlo and projected gradient: descend

           J(u) = E_t,eps |eps' (w_t, t, c') - eps|^2 - |eps (w_t, t, c) - eps|^2,   w = M z + (1 - M) u,   u = start + delta,

       in steps of size alpha, delta inside a ball of radius eps (`step`).
    3. A recovery that resembles the picture says that the picture was trained on: compare `completed` with it.

Symbols
    theta' -> tuned    theta -> base    M -> `mask`    u0 -> `start`    w(u) -> `completed`    J -> `Info.contrast`

Deviations: public code, and what is here by default (the public behaviour by name, and the test that pins it)
    - Draws noise for the two models apart: both see the same (`noise="independent"`; test_common_noise_has_the_smaller_variance).
    - Divides by one gradient norm for the whole batch: each example has its own (test_a_batch_is_its_examples).
    - One draw per step: `num_draws`, stratified or antithetic if the caller says so (`draw_fn`).
    - Starts from an eight-bit decoding, encoded again by a random draw: `initial` keeps floats and means (`quantise`, `key`;
      test_public_start_is_quantised).
    - Sets gradients that are not finite to zero in silence: so does this, and `Info.finite` says so.
    - Scores by the best match over all recoveries: that is left to `metrics.evidence` (`paired_scores`, `best_of_split`).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmsec_jax.core import pgd
from dmsec_jax.core.arrays import expand
from dmsec_jax.core.checks import require
from dmsec_jax.core.config import config
from dmsec_jax.core.types import AnyArray, Key, Latent, Params, PerExample, Timestep
from dmsec_jax.diffusion import draws
from dmsec_jax.diffusion.draws import Draw
from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars, to_eps

PairFn = Callable[[Params, Latent | tuple[Latent, Latent], Timestep], tuple[Latent, Latent]]
"""(params, z_t, t) -> (base prediction, tuned prediction); `z_t` may be a pair, the base model's and the tuned one's."""

LatentFn = Callable[[Params, AnyArray], Latent]
"""(params, completed) -> latent: nothing in latent space, the encoder's mean in pixel space."""


@config
class Config:
    """The public code's values, in latent space at 64 x 64 x 4.

    eps: radius of the ball, a number or [B]; the public "adaptive" radius is the norm of start - z.
    alpha: size of a step.
    bound: start + delta stays within [-bound, bound]; 1 in pixel space.
    t_min, t_max: t_min <= t < t_max.
    """

    eps: float = 70.0
    alpha: float = 2.0
    bound: float = 100.0
    num_steps: int = 1000
    num_draws: int = 1
    t_min: int = 1
    t_max: int = 1000
    norm: pgd.Norm = "l2"
    noise: Literal["common", "independent"] = "common"
    domain: Literal["space", "frequency"] = "space"  # where the mask is: entries kept, or frequencies


class State(NamedTuple):
    delta: Float[Array, "B ..."]
    index: Int[Array, "B"]
    """Global indices of the examples."""
    i: Int[Array, ""]
    """Steps done."""


class Info(NamedTuple):
    """Per example, of one step; `run` stacks steps in front."""

    contrast: Float[Array, "... B"]
    """J at the draws of the step, before it."""
    gradient_norm: Float[Array, "... B"]
    finite: Bool[Array, "... B"]
    """Whether the gradient was; where not, the example stayed where it was."""


def in_latent_space(params: Params, completed: Latent) -> Latent:
    """The `latent_fn` of latent space."""
    return completed


def checkerboard(height: int, width: int, tile: int = 4) -> np.ndarray:
    """The public code's mask [1, H, W, 1] float32: of each tile the upper left and lower right quarter is kept, half of all.

    Raises:
        ValueError: unless the tile is even and divides both sides.
    """
    fits = tile >= 2 and tile % 2 == 0 and height % tile == 0 and width % tile == 0
    require(fits, "tile", f"even and a divisor of {height} and {width}", tile, "take for example 4")
    half = tile // 2
    cell = np.kron(np.eye(2), np.ones((half, half)))
    return np.tile(cell, (height // tile, width // tile)).astype(np.float32)[None, :, :, None]


def blocks(seed: int, count: int, height: int, width: int, *, block: int = 4, kept: float = 0.5) -> np.ndarray:
    """Masks [count, H, W, 1] that keep that share of square blocks, drawn anew for each example (block 1: single entries).

    Raises:
        ValueError: unless the block divides both sides and the share lies in [0, 1].
    """
    fits = block >= 1 and height % block == 0 and width % block == 0
    require(fits, "block", f"a divisor of {height} and {width}", block, "take for example 4")
    require(0 <= kept <= 1, "kept", "a share in [0, 1]", kept, "take for example 0.5")
    rows, columns = height // block, width // block
    order = np.random.default_rng(seed).random((count, rows * columns)).argsort(axis=1)
    cells = (order < round(kept * rows * columns)).reshape(count, rows, columns)
    return np.kron(cells, np.ones((1, block, block))).astype(np.float32)[..., None]


def half(height: int, width: int) -> np.ndarray:
    """The plain mask [1, H, W, 1]: the left half is kept."""
    return np.broadcast_to(np.arange(width) < width // 2, (height, width)).astype(np.float32)[None, :, :, None]


def low_pass(height: int, width: int, kept: float = 0.25) -> np.ndarray:
    """The blur, as a mask of frequencies [1, H, W, 1] for `domain="frequency"`: those up to `kept` cycles per entry (at most 1/2) stay."""
    require(0 <= kept <= 0.5, "kept", "a frequency in [0, 0.5]", kept, "take for example 0.25")
    fast = np.maximum(np.abs(np.fft.fftfreq(height))[:, None], np.abs(np.fft.fftfreq(width))[None])
    return (fast <= kept).astype(np.float32)[None, :, :, None]


def kept(known: AnyArray, mask: AnyArray, cfg: Config) -> AnyArray:
    """The part of `known` [B, H, W, C] that the mask [B or 1, H, W, 1] keeps; the rest is zero."""
    if cfg.domain == "space":
        return known * mask
    axes = (1, 2)
    return jnp.fft.ifft2(jnp.fft.fft2(known, axes=axes) * mask, axes=axes).real.astype(jnp.float32)


def completed(state: State, known: AnyArray, start: AnyArray, mask: AnyArray, cfg: Config) -> AnyArray:
    """w(u) = M known + (1 - M) (start + delta)."""
    u = start + state.delta
    return u + kept(known - u, mask, cfg)


def initial(
    known: Latent,
    mask: AnyArray,
    cfg: Config,
    *,
    encode_fn: Callable[[Latent], tuple[Latent, Latent]],
    decode_fn: Callable[[Latent], AnyArray],
    quantise: bool = False,
    key: Key | None = None,
) -> Latent:
    """u0 in latent space: the kept part, decoded and encoded again, so that what is hidden is filled by the autoencoder.

    Args:
        encode_fn: image [B, H, W, 3] -> (mean, logvar) of scaled latents; decode_fn: the way back, in [-1, 1].
        quantise: round the decoding to eight bits, as the public code does.
        key: draw from the encoder's posterior, as the public code does; None takes the mean.
    """
    image = decode_fn(kept(known, mask, cfg))
    if quantise:
        image = jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5) / 127.5 - 1
    mean, logvar = encode_fn(image)
    if key is None:
        return mean
    noise = draws.example_noise(key, jnp.arange(mean.shape[0]), mean.shape[1:])
    return mean + jnp.exp(0.5 * logvar) * noise


def init(start: AnyArray, index: Int[AnyArray, "B"], cfg: Config) -> State:
    """Nothing changed yet."""
    return State(jnp.zeros_like(start), jnp.asarray(index, jnp.int32), jnp.int32(0))


def step(
    key: Key,
    state: State,
    known: AnyArray,
    start: AnyArray,
    mask: AnyArray,
    params: Params,
    cfg: Config,
    *,
    pair_fn: PairFn,
    schedule: ScheduleConfig,
    latent_fn: LatentFn = in_latent_space,
    draw_fn: Draw = draws.uniform_draw,
) -> tuple[State, Info]:
    """One projected gradient step of all examples.

    Args:
        key: this step's; example j folds in its global index.
        known: the pictures in question, latents or (with a `latent_fn`) pixels, [B, H, W, C].
        start: u0, like `known`; mask: [B or 1, H, W, 1], 1 where `known` is kept.
        params: what `pair_fn` and `latent_fn` need.
        draw_fn: of `diffusion.draws`; draws `cfg.num_draws` of (t, noise) per example.
    """

    def objective(delta):
        latent = latent_fn(params, completed(state._replace(delta=delta), known, start, mask, cfg))
        found = contrast(key, latent, params, cfg, state.index, pair_fn=pair_fn, schedule=schedule, draw_fn=draw_fn)
        return found.sum(), found

    gradient, found = jax.grad(objective, has_aux=True)(state.delta)
    norm = pgd.norm(gradient)
    finite = jnp.isfinite(norm)
    gradient = jnp.where(finite[:, None, None, None], gradient, 0.0)
    moved = state.delta - expand(jnp.asarray(cfg.alpha), gradient) * pgd.direction(gradient, cfg.norm)
    moved = jnp.clip(start + moved, -cfg.bound, cfg.bound) - start
    delta = pgd.project(moved, cfg.eps, cfg.norm)
    return State(delta, state.index, state.i + 1), Info(found, norm, finite)


def run(
    key: Key,
    known: AnyArray,
    start: AnyArray,
    mask: AnyArray,
    index: Int[AnyArray, "B"],
    params: Params,
    cfg: Config,
    *,
    pair_fn: PairFn,
    schedule: ScheduleConfig,
    latent_fn: LatentFn = in_latent_space,
    draw_fn: Draw = draws.uniform_draw,
) -> tuple[State, Info]:
    """All steps as one `scan`; step i uses fold_in(key, i).

    Example:
        jax.jit(run, static_argnames=("pair_fn", "schedule", "latent_fn", "draw_fn"))
    """
    options = {"pair_fn": pair_fn, "schedule": schedule, "latent_fn": latent_fn, "draw_fn": draw_fn}
    state = init(start, index, cfg)
    return advance(key, state, known, start, mask, params, cfg, num_steps=cfg.num_steps, **options)


def advance(
    key: Key,
    state: State,
    known: AnyArray,
    start: AnyArray,
    mask: AnyArray,
    params: Params,
    cfg: Config,
    *,
    num_steps: int,
    **options,
) -> tuple[State, Info]:
    """`num_steps` steps on from a state: pieces give what one run gives. Options as `step`."""

    def body(state, i):
        return step(jax.random.fold_in(key, i), state, known, start, mask, params, cfg, **options)

    return jax.lax.scan(body, state, state.i + jnp.arange(num_steps))


def contrast(
    key: Key,
    latent: Latent,
    params: Params,
    cfg: Config,
    index: Int[AnyArray, "B"],
    *,
    pair_fn: PairFn,
    schedule: ScheduleConfig,
    draw_fn: Draw = draws.uniform_draw,
) -> PerExample:
    """J of each latent [B, h, w, c]: mean over `cfg.num_draws` draws and over entries; images, draws and models in one call."""
    alpha_bar = alpha_bars(schedule)
    window, count = draws.window(cfg.t_min, cfg.t_max, schedule.num_train_timesteps), cfg.num_draws
    shape = latent.shape[1:]

    def drawn(own, k):  # (t, the base's noise, the tuned model's)
        t, noise = draw_fn(own, k, count, shape, window)
        if cfg.noise == "common":
            return t, noise, noise
        return t, noise, draw_fn(jax.random.fold_in(own, count), k, count, shape, window)[1]

    t, noise_base, noise_tuned = draws.many(key, index, count, drawn)
    z0 = jnp.repeat(latent, count, axis=0)
    z_base = z_tuned = add_noise(alpha_bar, z0, noise_base, t)
    z_t = z_base
    if cfg.noise == "independent":
        z_tuned = add_noise(alpha_bar, z0, noise_tuned, t)
        z_t = (z_base, z_tuned)
    base, tuned = pair_fn(params, z_t, t)
    as_noise = lambda prediction, z: to_eps(alpha_bar, prediction.astype(jnp.float32), z, t, schedule.prediction_type)
    square = lambda error: jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    loss_tuned, loss_base = square(as_noise(tuned, z_tuned) - noise_tuned), square(as_noise(base, z_base) - noise_base)
    return (loss_tuned - loss_base).reshape(-1, count).mean(axis=1)
