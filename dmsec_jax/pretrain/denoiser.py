"""Training of the denoising network together with its text encoder on cached latents.

Classifier-free guidance needs an unconditional branch, so captions are dropped with probability `drop_caption`; time steps are
stratified over the batch and weighted by min-SNR (Hang et al. 2023), which together cut the variance of the gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dmsec_jax.core import spread
from dmsec_jax.core.config import config
from dmsec_jax.core.types import EpsFn, Params
from dmsec_jax.diffusion.draws import batch_stratified_t
from dmsec_jax.diffusion.loss import denoising_loss, min_snr_weights
from dmsec_jax.diffusion.schedule import PredictionType
from dmsec_jax.pretrain.optimiser import clipped_adamw, moving_average

TextFn = Callable[[Params, Int[Array, "B L"]], Float[Array, "B L D"]]


@config
class Config:
    """Recipe; `float` fields are traced."""

    num_steps: int = 6000
    batch_size: int = 64
    warmup_steps: int = 300
    prediction_type: PredictionType = "v_prediction"
    learning_rate: float = 1e-3
    final_rate_share: float = 0.05
    weight_decay: float = 1e-2
    drop_caption: float = 0.1
    full_caption: float = 0.7
    snr_gamma: float = 5.0
    ema_decay: float = 0.999


class Data(NamedTuple):
    """Cached posterior moments of N pictures and their mirror images, tokens of their K captions, tokens of the empty caption."""

    mean: Float[Array, "N 2 h w c"]
    std: Float[Array, "N 2 h w c"]
    captions: Int[Array, "N K L"]
    empty: Int[Array, "L"]


class State(NamedTuple):
    """What the next step needs; `params` and `ema` hold "unet" and "text_encoder"."""

    params: dict
    opt_state: optax.OptState
    ema: dict
    step: Array


class Info(NamedTuple):
    """Unweighted and weighted loss of one step."""

    loss: Float[Array, ""]
    weighted: Float[Array, ""]


def init(params: Params, cfg: Config) -> State:
    """State at step 0 for freshly drawn (or, to continue a shorter training, earlier) parameters."""
    return State(params, clipped_adamw(cfg).init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def draw(key, data: Data, cfg: Config):
    """A random batch: latents [B, h, w, c] and token ids [B, L]."""
    key_pick, key_flip, key_latent, key_caption, key_drop, key_full = jax.random.split(key, 6)
    size = (cfg.batch_size,)
    index = jax.random.randint(key_pick, size, 0, data.mean.shape[0])
    flip = jax.random.bernoulli(key_flip, 0.5, size).astype(jnp.int32)
    mean, std = data.mean[index, flip], data.std[index, flip]
    z0 = mean + std * jax.random.normal(key_latent, mean.shape)
    other = jax.random.randint(key_caption, size, 0, data.captions.shape[1])
    chosen = jnp.where(jax.random.bernoulli(key_full, cfg.full_caption, size), 0, other)
    dropped = jax.random.bernoulli(key_drop, cfg.drop_caption, size)
    return z0, jnp.where(dropped[:, None], data.empty, data.captions[index, chosen])


def step(key, state: State, data: Data, alpha_bar, cfg: Config, *, predict_fn: EpsFn, text_fn: TextFn):
    """One AdamW update of network and text encoder."""
    key_data, key_t, key_noise = jax.random.split(key, 3)
    z0, ids = draw(key_data, data, cfg)
    t = batch_stratified_t(key_t, jnp.arange(cfg.batch_size), cfg.batch_size, window=(0, alpha_bar.shape[0]))
    noise = jax.random.normal(key_noise, z0.shape)
    weights = min_snr_weights(alpha_bar, t, cfg.snr_gamma, cfg.prediction_type)
    z0, ids, t, noise = spread.even((z0, ids, t, noise))

    def objective(params):
        params = spread.whole(params)
        context = text_fn(params["text_encoder"], ids)
        model_fn = lambda z_t, t: predict_fn(params["unet"], z_t, t, context)
        loss = denoising_loss(model_fn, alpha_bar, z0, t, noise, cfg.prediction_type)
        weighted = jnp.mean(weights * loss)
        return weighted, Info(loss.mean(), weighted)

    grads, info = jax.grad(objective, has_aux=True)(state.params)
    updates, opt_state = clipped_adamw(cfg).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = moving_average(state.ema, params, cfg.ema_decay, state.step)
    return State(params, opt_state, ema, state.step + 1), info


def run(key, state: State, data: Data, alpha_bar, cfg: Config, *, predict_fn: EpsFn, text_fn: TextFn, num_steps: int):
    """`num_steps` further steps in one scan; step i draws from fold_in(key, i), so an interrupted run continues identically."""
    body = lambda s, _: step(
        jax.random.fold_in(key, s.step), s, data, alpha_bar, cfg, predict_fn=predict_fn, text_fn=text_fn
    )
    return jax.lax.scan(body, state, length=num_steps)
