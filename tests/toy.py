"""The analytic world: data whose best denoiser is known in closed form, so that methods are tested without a network.

Data are a mixture of K isotropic Gaussians, z_0 ~ sum_k w_k N(mean_k, scale_k^2 I). One component is a Gaussian; with
`scale` near zero it is a *planted memoriser*, whose samples are its training points. The forward process is
z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) noise, so with v_k = alpha_bar_t scale_k^2 + 1 - alpha_bar_t

    p(k | z_t) ~ w_k N(z_t; sqrt(alpha_bar_t) mean_k, v_k I)
    E[noise | z_t] = sqrt(1 - alpha_bar_t) sum_k p(k | z_t) (z_t - sqrt(alpha_bar_t) mean_k) / v_k.

The world is a parameter tree, an argument like any network's, so gradients, merges and pairs of models work on it:
{"mean": [K, h, w, c], "scale": [K], "log_weight": [K], "prompt": [K, D]}. A context [B, L, D] adds
(its mean over L) . prompt_k to log w_k: an all-zero context is the unconditional model.
"""

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 4  # D, of prompts


def alpha_bars(num_steps=1000, beta_start=0.00085, beta_end=0.012):
    """The scaled-linear schedule of Stable Diffusion, [T] float32, computed here on its own."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
    return jnp.asarray(np.cumprod(1 - betas), jnp.float32)


def gaussian(mean, scale):
    """One Gaussian: `mean` [h, w, c], `scale` its standard deviation in every coordinate."""
    return mixture(jnp.asarray(mean)[None], scale)


def memoriser(points, scale=0.01):
    """A model that has learnt `points` [K, h, w, c] by heart, all equally often."""
    return mixture(points, scale)


def mixture(means, scale, weights=None, prompts=None):
    """`means` [K, h, w, c]; `scale` one or [K]; `weights` [K], any positive numbers; `prompts` [K, D]."""
    means = jnp.asarray(means, jnp.float32)
    count = len(means)
    weights = np.ones(count) if weights is None else np.asarray(weights, float)
    return {
        "mean": means,
        "scale": jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (count,)),
        "log_weight": jnp.asarray(np.log(weights / weights.sum()), jnp.float32),
        "prompt": jnp.zeros((count, WIDTH)) if prompts is None else jnp.asarray(prompts, jnp.float32),
    }


def blend(first, second, share):
    """The mixture that draws from `second` with probability `share`: a base model that was fine-tuned a little."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    log_weight = jnp.concatenate([first["log_weight"] + np.log1p(-share), second["log_weight"] + np.log(share)])
    return both | {"log_weight": log_weight}


def empty_context(batch, length=2):
    """The unconditional context [B, L, D]."""
    return jnp.zeros((batch, length, WIDTH))


def eps_fn_of(alpha_bar):
    """An `eps_fn(params, z_t, t, context) -> E[noise | z_t]` for the schedule `alpha_bar` [T]."""

    def eps_fn(params, z_t, t, context):
        a = alpha_bar[t][:, None]  # [B, 1]
        away, v = _deviations(params, z_t, a)
        posterior = jax.nn.softmax(_log_joint(params, away, v, context), axis=-1)  # [B, K]
        mean = jnp.einsum("bk,bkhwc->bhwc", posterior / v, away)
        return jnp.sqrt(1 - a)[..., None, None] * mean

    return eps_fn


def log_density(params, z_t, alpha_bar_t, context):
    """log p(z_t | context) [B] at `alpha_bar_t` [B]; E[noise | z_t] is -sqrt(1 - alpha_bar_t) times its gradient."""
    a = alpha_bar_t[:, None]
    away, v = _deviations(params, z_t, a)
    prior = jax.nn.logsumexp(_logits(params, context), axis=-1)
    return jax.nn.logsumexp(_log_joint(params, away, v, context), axis=-1) - prior


def gaussian_loss(alpha_bar_t, scale):
    """Least expected squared error per coordinate, Var[noise | z_t], if the data are one Gaussian of width `scale`."""
    return alpha_bar_t * scale**2 / (alpha_bar_t * scale**2 + 1 - alpha_bar_t)


def sample(key, params, count):
    """`count` draws of z_0 from the unconditional world, [count, h, w, c]."""
    key_component, key_noise = jax.random.split(key)
    k = jax.random.categorical(key_component, params["log_weight"], shape=(count,))
    noise = jax.random.normal(key_noise, (count, *params["mean"].shape[1:]))
    return params["mean"][k] + params["scale"][k][:, None, None, None] * noise


def _deviations(params, z_t, a):
    """z_t - sqrt(a) mean_k [B, K, h, w, c] and the variance v_k [B, K] around it."""
    away = z_t[:, None] - jnp.sqrt(a)[..., None, None, None] * params["mean"][None]
    return away, a * params["scale"][None] ** 2 + 1 - a


def _logits(params, context):
    return params["log_weight"][None] + jnp.einsum("bld,kd->bk", context, params["prompt"]) / context.shape[1]


def _log_joint(params, away, v, context):
    """log w_k N(z_t; sqrt(a) mean_k, v_k I), [B, K]."""
    dimension = np.prod(away.shape[2:]).astype(np.float32)
    squares = jnp.sum(away**2, axis=(2, 3, 4))
    return _logits(params, context) - 0.5 * squares / v - 0.5 * dimension * jnp.log(2 * np.float32(np.pi) * v)
