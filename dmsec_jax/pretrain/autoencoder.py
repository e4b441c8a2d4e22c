"""Training of the autoencoder: L1 + 2 L2 + a tiny KL, AdamW with cosine decay and an exponential moving average of the weights.

Afterwards each latent channel is standardised by folding its mean and deviation into the 1x1 convolutions on both sides of the
bottleneck, so that `scaling_factor` is 1 and every diffusers pipeline sees unit-variance latents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from dmsec_jax.core import spread
from dmsec_jax.core.config import config
from dmsec_jax.models import vae
from dmsec_jax.pretrain.optimiser import clipped_adamw, moving_average


@config
class Config:
    """Recipe; `float` fields are traced."""

    num_steps: int = 3000
    batch_size: int = 32
    warmup_steps: int = 200
    learning_rate: float = 1.5e-3
    final_rate_share: float = 0.02
    weight_decay: float = 1e-4
    kl_weight: float = 1e-5
    l2_weight: float = 2.0
    ema_decay: float = 0.998


class State(NamedTuple):
    """What the next step needs: parameters, optimiser state, moving average, step number."""

    params: dict
    opt_state: optax.OptState
    ema: dict
    step: Array


class Info(NamedTuple):
    """Losses of one step, each a mean over the batch."""

    l1: Float[Array, ""]
    l2: Float[Array, ""]
    kl: Float[Array, ""]


def init(key, model: vae.VAEConfig, cfg: Config) -> State:
    """Fresh parameters and optimiser state."""
    params = vae.init(key, model)
    return State(params, clipped_adamw(cfg).init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def step(key, state: State, pictures: UInt8[Array, "N H W 3"], cfg: Config, *, model: vae.VAEConfig):
    """One update on a random batch of `pictures` (mirrored half of the time)."""
    key_pick, key_flip, key_noise = jax.random.split(key, 3)
    index = jax.random.randint(key_pick, (cfg.batch_size,), 0, pictures.shape[0])
    batch = pictures[index].astype(jnp.float32) / 127.5 - 1
    flip = jax.random.bernoulli(key_flip, 0.5, (cfg.batch_size, 1, 1, 1))
    batch = spread.even(jnp.where(flip, batch[:, :, ::-1], batch))

    def objective(params):
        params = spread.whole(params)
        mean, logvar = vae.encode(model, params, batch)
        error = vae.decode(model, params, vae.sample_posterior(key_noise, mean, logvar)) - batch
        l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
        return l1 + cfg.l2_weight * l2 + cfg.kl_weight * kl, Info(l1, l2, kl)

    grads, info = jax.grad(objective, has_aux=True)(state.params)
    updates, opt_state = clipped_adamw(cfg).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = moving_average(state.ema, params, cfg.ema_decay, state.step)
    return State(params, opt_state, ema, state.step + 1), info


def run(key, state: State, pictures: UInt8[Array, "N H W 3"], cfg: Config, *, model: vae.VAEConfig, num_steps: int):
    """`num_steps` further steps in one scan; step i draws from fold_in(key, i), so an interrupted run continues identically."""
    body = lambda s, _: step(jax.random.fold_in(key, s.step), s, pictures, cfg, model=model)
    return jax.lax.scan(body, state, length=num_steps)


def standardise(params: dict, mean: Float[Array, "c"], std: Float[Array, "c"]) -> dict:
    """Parameters whose latents are (latent - mean) / std, and whose decoder undoes it: the same pictures.

    Args:
        mean, std: per-channel moments of the posterior means over a corpus.
    """
    quant, post = params["quant_conv"], params["post_quant_conv"]
    scale = jnp.concatenate([1 / std, jnp.ones_like(std)])
    shift = jnp.concatenate([-mean / std, -2 * jnp.log(std)])  # the second half are log-variances
    kernel = post["kernel"]  # [1, 1, c, c]
    return {
        **params,
        "quant_conv": {"kernel": quant["kernel"] * scale, "bias": quant["bias"] * scale + shift},
        "post_quant_conv": {"kernel": kernel * std[:, None], "bias": post["bias"] + mean @ kernel[0, 0]},
    }
