"""The optimiser that both pre-training stages share: clipped AdamW, warm-up and cosine decay, moving average of the weights."""

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(step, peak, warmup_steps: int, num_steps: int, final_share):
    """Learning rate at `step`: linear warm-up to `peak`, then a cosine down to `peak * final_share` at `num_steps`."""
    ramp = (step + 1) / max(warmup_steps, 1)
    progress = jnp.clip((step - warmup_steps) / max(num_steps - warmup_steps, 1), 0, 1)
    return peak * jnp.minimum(ramp, final_share + (1 - final_share) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def clipped_adamw(cfg) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip of 1, for any config with the rate fields of this package.

    optax's own warm-up cosine branches in Python on the peak rate, which is traced here.
    """
    rate = lambda step: warmup_cosine(step, cfg.learning_rate, cfg.warmup_steps, cfg.num_steps, cfg.final_rate_share)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=cfg.weight_decay))


def moving_average(average, new, decay, step):
    """Exponential moving average of a tree, with a decay that grows from 0.1 to `decay` over the first steps."""
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, fresh: old * decay + fresh * (1 - decay), average, new)
