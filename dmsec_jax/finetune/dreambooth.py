"""DreamBooth: fine-tuning a diffusion model on a few pictures (Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image
Diffusion Models for Subject-Driven Generation", 2023), for any adapter: full weights, LoRA, and what else turns a
trainable tree into parameters.

Algorithm, per step (paper, section 3.2, Eq. 2):
    z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) noise            for instance pictures, z_t' for class pictures
    loss = mean |eps_fn(z_t, t, c) - noise|^2 + prior_weight * mean |eps_fn(z_t', t', c') - noise'|^2
    grad <- grad * min(1, clip_norm / |grad|)
    trainable <- AdamW(trainable, grad);   ema <- d ema + (1 - d) trainable

Symbols: theta -> `adapter.merge(params, trainable)`; lambda -> `prior_weight`; x, x_pr -> `Data.instance`,
`Data.prior`.

Randomness: step i uses `fold_in(key, i)` and example j of its batch folds in j, so results depend neither on
microbatches nor on interruptions. Pictures come as cached latents, so random crops are extra rows of the cache, made by
the caller.

`params` is the UNet's tree and prompts are cached contexts [N, L, D]; or, to train the text encoder, `text_fn` is
given, `params` is {"unet": ..., "text_encoder": ...} and prompts are token ids [N, L]. The adapter sees the same tree.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dmsec_jax.core import spread
from dmsec_jax.core.checks import require
from dmsec_jax.core.config import config
from dmsec_jax.core.means import mean_over
from dmsec_jax.core.types import Context, EpsFn, Key, Latent, Params, PerExample
from dmsec_jax.diffusion import draws
from dmsec_jax.diffusion.draws import example_keys, standard_normal, uniform_draw
from dmsec_jax.diffusion.loss import denoising_loss, min_snr_weights
from dmsec_jax.diffusion.schedule import ScheduleConfig, alpha_bars
from dmsec_jax.finetune.adapters import Adapter
from dmsec_jax.finetune.examples import Data, Examples, take

TextFn = Callable[[Params, Int[Array, "B L"]], Context]

ORDER = 2**32 - 1  # folded in for the order of the data; no step counts so far


@config
class Config:
    """Defaults are DreamBooth's on Stable Diffusion; optimiser constants are those of `torch.optim.AdamW`."""

    num_steps: int = 1200
    batch_size: int = 1  # instance pictures per forward pass; as many class pictures beside them where there are any
    accumulation: int = 1  # forward passes per optimiser step
    learning_rate: float = 5e-6
    warmup_steps: int = 0  # step i < warmup_steps uses learning_rate * (i + 1) / warmup_steps; constant afterwards
    beta1: float = 0.9
    beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    prior_weight: float = 1.0
    min_snr_gamma: float = 0.0  # 0: the plain mean over t
    t_min: int = 0
    t_max: int | None = None  # t is uniform in [t_min, t_max); None: the whole schedule
    sample_posterior: bool = True  # draw latents from the autoencoder's posterior at every step; False: use its mean
    horizontal_flip: bool = False  # flips latents, which is not quite encoding the flipped picture: or cache both
    ema_decay: float | None = None  # None: no such average is kept
    swa_start: int | None = (
        None  # equal weight for every step from this one on (Izmailov et al. 2018), instead of ema_decay
    )


class State(NamedTuple):
    trainable: Params
    opt_state: optax.OptState
    ema: Params | None
    step: Int[Array, ""]


class Info(NamedTuple):
    loss: Float[Array, ""]
    instance_loss: Float[Array, ""]
    prior_loss: Float[Array, ""]  # before prior_weight; 0 without class pictures
    grad_norm: Float[Array, ""]  # before clipping
    finite: Bool[Array, ""]


def init(key: Key, params: Params, cfg: Config, *, adapter: Adapter) -> State:
    """The state before the first step. Use another key than for `run`.

    Raises:
        ValueError: on counts below 1, an EMA decay outside (0, 1), or what `adapter.init` refuses.
    """
    _check_static(cfg)
    trainable = adapter.init(key, params)
    averaging = cfg.ema_decay is not None or cfg.swa_start is not None
    ema = jax.tree.map(jnp.copy, trainable) if averaging else None
    return State(trainable, _optimizer(cfg, cfg.learning_rate).init(trainable), ema, jnp.zeros((), jnp.int32))


def check(cfg: Config, schedule: ScheduleConfig) -> None:
    """Refuses options that make no training, before anything is built; `cfg` holds numbers, not tracers.

    Raises:
        ValueError: on what `init` refuses, a learning rate or clip norm that is not positive, another number out of its
            range, or a window of t that is empty or leaves the schedule.
    """
    _check_static(cfg)
    window(cfg, schedule)
    for name in ("learning_rate", "clip_norm", "adam_epsilon"):
        ok = 0 < getattr(cfg, name) < math.inf
        require(ok, name, "positive and finite", getattr(cfg, name), "correct it")
    for name in ("warmup_steps", "weight_decay", "prior_weight", "min_snr_gamma"):
        require(getattr(cfg, name) >= 0, name, "at least 0", getattr(cfg, name), "use 0 or more")
    for name in ("beta1", "beta2"):
        require(0 <= getattr(cfg, name) < 1, name, "in [0, 1)", getattr(cfg, name), "use AdamW's 0.9 and 0.999")


def window(cfg: Config, schedule: ScheduleConfig) -> tuple[int, int]:
    """The range [t_min, t_max) that t is drawn from.

    Raises:
        ValueError: if it is empty or leaves the schedule.
    """
    return draws.window(cfg.t_min, cfg.t_max, schedule.num_train_timesteps)


def averaged(state: State) -> Params:
    """The trainable tree to sample with or to export: the average where one is kept, else the last."""
    return state.trainable if state.ema is None else state.ema


def draw(key: Key, step: Int[Array, ""] | int, data: Data, cfg: Config) -> Data:
    """The batch of step `step`: `batch_size * accumulation` rows of each set, in shuffled epochs (`examples.take`).

    `key` is that of `run`.
    """
    size = cfg.batch_size * cfg.accumulation
    key_instance, key_prior = jax.random.split(jax.random.fold_in(key, ORDER))
    instance = take(key_instance, step * size, size, data.instance)
    return Data(instance, None if data.prior is None else take(key_prior, step * size, size, data.prior))


def corrupt(
    keys: Key, batch: Examples, cfg: Config, schedule: ScheduleConfig
) -> tuple[Latent, Int[Array, "B"], Latent]:
    """Clean latents, t and noise; key j of `keys` [B] decides example j's posterior sample, flip, t and noise.

    Raises:
        ValueError: on `sample_posterior` without log-variances, or a window of t that is empty or leaves the schedule.
    """
    chosen = window(cfg, schedule)
    absent = cfg.sample_posterior and batch.logvar is None
    cure = "pass the encoder's log-variance or set sample_posterior to false"
    require(not absent, "logvar", "given to sample the posterior", None, cure)

    def one(key: Key, mean: Float[Array, "h w c"], logvar: Float[Array, "h w c"] | None):
        key_posterior, key_flip, key_draw = jax.random.split(key, 3)
        z0 = mean
        if cfg.sample_posterior:
            z0 = mean + jnp.exp(0.5 * logvar) * standard_normal(key_posterior, mean.shape)
        if cfg.horizontal_flip:
            z0 = jnp.where(jax.random.bernoulli(key_flip), z0[:, ::-1], z0)
        return z0, *uniform_draw(key_draw, jnp.int32(0), 1, mean.shape, chosen)

    return jax.vmap(one)(keys, batch.mean, batch.logvar)


def losses(
    keys: Key,
    batch: Examples,
    params: Params,
    cfg: Config,
    *,
    eps_fn: EpsFn,
    schedule: ScheduleConfig,
    text_fn: TextFn | None = None,
) -> PerExample:
    """Denoising loss of each example under merged parameters, at the t and noise of `corrupt`.

    Raises:
        ValueError: on what `corrupt` refuses.
    """
    z0, t, noise = corrupt(keys, batch, cfg, schedule)
    if text_fn is None:
        context, unet = batch.prompt, params
    else:
        context, unet = text_fn(params["text_encoder"], batch.prompt), params["unet"]
    alpha_bar = alpha_bars(schedule)
    kind = schedule.prediction_type
    plain = denoising_loss(lambda z_t, t: eps_fn(unet, z_t, t, context), alpha_bar, z0, t, noise, kind)
    weight = min_snr_weights(alpha_bar, t, cfg.min_snr_gamma, kind)
    return plain * jnp.where(cfg.min_snr_gamma > 0, weight, 1.0)


def step(
    key: Key,
    state: State,
    batch: Data,
    params: Params,
    cfg: Config,
    *,
    eps_fn: EpsFn,
    adapter: Adapter,
    schedule: ScheduleConfig,
    text_fn: TextFn | None = None,
    axis_name: str | None = None,
) -> tuple[State, Info]:
    """One optimiser step on `batch` (as from `draw`, or a caller's own of `batch_size * accumulation` rows).

    On several devices each takes its share of every microbatch: under `jax.set_mesh`, or under `jax.pmap` with `axis_name`.

    Raises:
        ValueError: as `gradients`.
    """
    network = {"eps_fn": eps_fn, "adapter": adapter, "schedule": schedule, "text_fn": text_fn, "axis_name": axis_name}
    grads, info = gradients(key, state.trainable, batch, params, cfg, **network)
    return update(state, grads, info.grad_norm, cfg), info


def gradients(
    key: Key,
    trainable: Params,
    batch: Data,
    params: Params,
    cfg: Config,
    *,
    eps_fn: EpsFn,
    adapter: Adapter,
    schedule: ScheduleConfig,
    text_fn: TextFn | None = None,
    axis_name: str | None = None,
    together: bool = False,
) -> tuple[Params, Info]:
    """Gradient of the loss (Eq. 2), a tree like `trainable`, averaged over `accumulation` microbatches, which changes nothing but memory.

    Of a batch of class pictures alone (no instance) it is the gradient of theirs, at their t and noise, with `Info.instance_loss` theirs too.
    `together` is for an `eps_fn` that draws for all rows at once, so that devices cannot call it for their own.

    Raises:
        ValueError: on rows that cannot be split into equal microbatches, and on what `losses` refuses.
    """
    network = {"eps_fn": eps_fn, "schedule": schedule, "text_fn": text_fn}
    sets = [(own, rows) for own, rows in zip(jax.random.split(key), batch, strict=True) if rows is not None]
    sizes = [rows.mean.shape[0] for _, rows in sets]
    size = sizes[0]
    contract = f"a multiple of accumulation={cfg.accumulation} rows, as many of each set"
    require(sizes == [size] * len(sets) and size % cfg.accumulation == 0, "batch", contract, sizes, "use draw")
    parts = [(example_keys(own, jnp.arange(size)), rows) for own, rows in sets]

    def objective(trainable: Params, parts: list[tuple[Key, Examples]]) -> tuple[Float[Array, ""], Float[Array, "set"]]:
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)  # one pass for both sets
        rows_keys, rows = spread.rows(joined)
        per_example = losses(rows_keys, rows, spread.whole(adapter.merge(params, trainable)), cfg, **network)
        means = per_example.reshape(len(parts), -1).mean(1)
        return means[0] + cfg.prior_weight * means[1:].sum(), means  # (Eq. 2)

    def on(axis_name: spread.Axis):
        def one(parts: list[tuple[Key, Examples]]):
            own = spread.own_rows(parts, axis_name)
            (loss, means), grads = jax.value_and_grad(objective, has_aux=True)(trainable, own)
            return grads, loss, means

        return spread.mean(mean_over(one, micro), axis_name)

    micro = jax.tree.map(lambda leaf: leaf.reshape(cfg.accumulation, -1, *leaf.shape[1:]), parts)
    # of rows that are drawn at once the compiler takes care, as of those of cut weights
    grads, loss, means = on(axis_name) if together else spread.each(on, axis_name, size // cfg.accumulation)
    norm = optax.tree.norm(grads)
    return grads, Info(
        loss=loss,
        instance_loss=means[0],
        prior_loss=means[1:].sum(),
        grad_norm=norm,
        finite=jnp.isfinite(loss) & jnp.isfinite(norm),
    )


def update(state: State, grads: Params, norm: Float[Array, ""], cfg: Config) -> State:
    """Clips by the global `norm` as `torch.nn.utils.clip_grad_norm_` does, then AdamW, then the average.

    The moving average's decay warms up, `min(ema_decay, (1 + i) / (10 + i))` at step i, so that early weights do not linger.
    """
    scale = jnp.minimum(1.0, cfg.clip_norm / (norm + 1e-6))
    warmup = jnp.minimum(1.0, (state.step + 1) / max(cfg.warmup_steps, 1))
    clipped = jax.tree.map(lambda leaf: leaf * scale, grads)
    optimizer = _optimizer(cfg, cfg.learning_rate * warmup)
    change, opt_state = optimizer.update(clipped, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, change)
    ema = None
    if state.ema is not None:
        decay = _decay(state.step, cfg)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, trainable)
    return State(trainable, opt_state, ema, state.step + 1)


def run(
    key: Key,
    state: State,
    data: Data,
    params: Params,
    cfg: Config,
    *,
    eps_fn: EpsFn,
    adapter: Adapter,
    schedule: ScheduleConfig,
    text_fn: TextFn | None = None,
    axis_name: str | None = None,
    num_steps: int | None = None,
) -> tuple[State, Info]:
    """`num_steps` (None: `cfg.num_steps`) steps on from `state`; `Info` gains a leading axis of steps.

    Step i sees `draw(key, i, data, cfg)` and `fold_in(key, i)`, so a run cut in pieces equals one in a piece. To
    compile once and reuse:

        advance = jax.jit(run, static_argnames=("eps_fn", "adapter", "text_fn", "num_steps"), donate_argnames="state")
    """
    network = {"eps_fn": eps_fn, "adapter": adapter, "schedule": schedule, "text_fn": text_fn, "axis_name": axis_name}

    def body(state: State, i: Int[Array, ""]) -> tuple[State, Info]:
        return step(jax.random.fold_in(key, i), state, draw(key, i, data, cfg), params, cfg, **network)

    return jax.lax.scan(body, state, state.step + jnp.arange(cfg.num_steps if num_steps is None else num_steps))


def _check_static(cfg: Config) -> None:
    for name in ("num_steps", "batch_size", "accumulation"):
        require(getattr(cfg, name) >= 1, name, "at least 1", getattr(cfg, name), "use 1 or more")
    decay = cfg.ema_decay
    require(decay is None or 0 < decay < 1, "ema_decay", "in (0, 1)", decay, "use null for no average")
    require(cfg.swa_start is None or cfg.swa_start >= 0, "swa_start", "at least 0", cfg.swa_start, "name a step")
    both = decay is not None and cfg.swa_start is not None
    require(not both, "ema_decay, swa_start", "one of them at most", "both", "set ema_decay to null")


def _decay(step: Int[Array, ""], cfg: Config) -> Float[Array, ""]:
    """Share of the old average that is kept at a step."""
    if cfg.swa_start is not None:
        count = jnp.maximum(step - cfg.swa_start, 0)  # steps that are averaged already; until then the last one counts
        return count / (count + 1)
    return jnp.minimum(cfg.ema_decay, (1 + step) / (10 + step))


def _optimizer(cfg: Config, learning_rate: Float[Array, ""] | float) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, cfg.beta1, cfg.beta2, cfg.adam_epsilon, weight_decay=cfg.weight_decay)
