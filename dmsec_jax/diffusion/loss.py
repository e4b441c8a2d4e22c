"""The denoising loss, always per example: batching never changes a result, and the caller decides how to average."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import ModelFn
from dmsec_jax.diffusion.draws import Draw, Window, example_keys, standard_normal, uniform_draw
from dmsec_jax.diffusion.schedule import add_noise, target


def denoising_loss(
    model_fn: ModelFn,
    alpha_bar: Float[Array, "T"],
    z0: Float[Array, "B ..."],
    t: Int[Array, "B"],
    noise: Float[Array, "B ..."],
    prediction_type: str = "epsilon",
) -> Float[Array, "B"]:
    """Mean over latent entries of (prediction - target)^2, one value per example, float32   (Ho et al. 2020, Eq. 14).

    Args:
        model_fn: (z_t, t) -> prediction of the schedule's type.
        alpha_bar: from `schedule.alpha_bars`.
        z0: clean latents.
        t: timesteps, 0 <= t < T.
        noise: standard normal, like `z0`.
    """
    prediction = model_fn(add_noise(alpha_bar, z0, noise, t), t)
    error = prediction.astype(jnp.float32) - target(alpha_bar, z0, noise, t, prediction_type)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def snr(alpha_bar: Float[Array, "T"], t: Int[Array, "B"]) -> Float[Array, "B"]:
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) at `t`."""
    chosen = jnp.asarray(alpha_bar)[t]
    return chosen / (1.0 - chosen)


def min_snr_weights(
    alpha_bar: Float[Array, "T"], t: Int[Array, "B"], gamma: float, prediction_type: str = "epsilon"
) -> Float[Array, "B"]:
    """Weights that make a loss of any type min(SNR, gamma) times the loss on z_0   (Hang et al. 2023, Sec. 3.4).

    epsilon: min(SNR, gamma) / SNR; v_prediction: min(SNR, gamma) / (SNR + 1); sample: min(SNR, gamma).
    The paper uses gamma = 5.
    """
    ratio = snr(alpha_bar, t)
    clipped = jnp.minimum(ratio, gamma)
    if prediction_type == "epsilon":  # min(1, gamma / SNR), which also holds at SNR = 0
        return jnp.minimum(1.0, gamma / jnp.maximum(ratio, jnp.finfo(jnp.float32).tiny))
    if prediction_type == "v_prediction":
        return clipped / (ratio + 1.0)
    require(
        prediction_type == "sample",
        "prediction_type",
        "one of epsilon, sample, v_prediction",
        repr(prediction_type),
        "choose one",
    )
    return clipped


def monte_carlo_loss(
    key: Array,
    model_fn: ModelFn,
    alpha_bar: Float[Array, "T"],
    z0: Float[Array, "B ..."],
    *,
    num_draws: int,
    draw: Draw = uniform_draw,
    window: Window | None = None,
    index: Int[Array, "B"] | None = None,
    prediction_type: str = "epsilon",
    chunk: int = 1,
) -> Float[Array, "B K"]:
    """The loss of each example at each of its draws of (t, noise); the mean over the last axis estimates L_DM.

    Args:
        key: two calls with the same key compare models on the same draws.
        draw: `draws.uniform_draw`, `stratified_draw`, `antithetic_draw`, `listed_draw(...)`, or the caller's own.
        window: (low, high), low <= t < high; the whole schedule by default.
        index: global indices of the examples, 0..B-1 by default.
        chunk: draws that are evaluated at once; more uses more memory and fewer kernels, the result stays the same.

    Raises:
        ValueError: on num_draws < 1, or a window outside the schedule.
    """
    total = alpha_bar.shape[0]
    low, high = (0, total) if window is None else window
    require(num_draws >= 1, "num_draws", "at least 1", num_draws, "ask for one draw or more")
    require(
        0 <= low < high <= total, "window", f"(low, high) with 0 <= low < high <= {total}", window, "high is exclusive"
    )
    keys = example_keys(key, jnp.arange(z0.shape[0]) if index is None else index)

    def one(k):
        t, noise = jax.vmap(lambda own: draw(own, k, num_draws, z0.shape[1:], (low, high)))(keys)
        return denoising_loss(model_fn, alpha_bar, z0, t, noise, prediction_type)

    return jax.lax.map(one, jnp.arange(num_draws), batch_size=chunk).T  # [K, B] -> [B, K]


def grid_loss(
    key: Array,
    model_fn: ModelFn,
    alpha_bar: Float[Array, "T"],
    z0: Float[Array, "B ..."],
    timesteps: Int[Array | np.ndarray, "M"],
    *,
    index: Int[Array, "B"] | None = None,
    prediction_type: str = "epsilon",
    chunk: int = 1,
) -> Float[Array, "B M"]:
    """The loss of each example at each given timestep, with noise of its own for every (example, position in the list).

    Raises:
        ValueError: if a timestep (where it is concrete) lies outside the schedule.
    """
    total = alpha_bar.shape[0]
    if isinstance(timesteps, np.ndarray):
        grid = np.asarray(timesteps)
        require(
            bool(((grid >= 0) & (grid < total)).all()),
            "timesteps",
            f"in 0..{total - 1}",
            grid.tolist(),
            "correct the list",
        )
    keys = example_keys(key, jnp.arange(z0.shape[0]) if index is None else index)

    def one(position_and_t):
        position, t = position_and_t
        noise = jax.vmap(lambda own: standard_normal(jax.random.fold_in(own, position), z0.shape[1:]))(keys)
        return denoising_loss(model_fn, alpha_bar, z0, jnp.full(z0.shape[:1], t), noise, prediction_type)

    grid = jnp.asarray(timesteps, jnp.int32)
    return jax.lax.map(one, (jnp.arange(grid.size), grid), batch_size=chunk).T  # [M, B] -> [B, M]
