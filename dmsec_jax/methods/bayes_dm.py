"""Bayesian few-shot fine-tuning: a posterior over the weights instead of one set of them, against the corruption stage.

Wu, Li, Liu, Zhu, Wang, Chen, Liu et al., "Exploring Diffusion Models' Corruption Stage in Few-Shot Fine-tuning and Mitigating with Bayesian
Neural Networks", 2024, arXiv 2405.19931.

Algorithm, per step (paper, Eqs. 3 and 4, Algorithm 1)
    1. theta ~ Q = N(mu, diag(sigma^2)) on the selected leaves of the trainable tree, the others as they are (`perturbed`).
    2. J = E_theta [L_instance(theta) + prior_weight L_prior(theta)] + kl_weight KL(Q || P),   P = N(mu_0, sigma_0^2 I)
    3. AdamW on mu as DreamBooth's; Adam on sigma with a rate of its own and without weight decay.
    With `noise="activations"` Dense layers draw what theta does to their outputs, each row for itself (local reparameterisation); the rest as above.
    Inference takes mu, which costs nothing (`mean`); `sample` draws other models.

Symbols
    mu -> `State.tuned.trainable`    sigma -> `deviations(State.raw)`    mu_0 -> `centre`    lambda -> `kl_weight`    W -> any adapter's tree

Deviations: public code, and what is here by default (the public behaviour by name, and the test that pins it)
    - Computes KL(P || Q), its paper's Algorithm 1; its Eq. 3 says KL(Q || P): the latter, and the other by name
      (`kl="prior-posterior"`; test_divergences_have_their_closed_forms).
    - Sums KL over up to 2e8 weights beside a mean loss: the mean over weights, so that kl_weight means the same for every selection
      (`kl_scale="sum"`; test_kl_does_not_depend_on_the_number_of_weights).
    - Trains sigma with mu's rate and weight decay: a rate of its own and none (`sigma_rate`, `sigma_decay`; test_sigma_has_its_own_rate_and_decay).
    - One theta for instance and class pictures: so does this (`halves="separate"` draws two; test_halves_can_have_weights_of_their_own).

Baselines, under the same selections: a sigma that stays (`sigma_rate=0`), dropout (`noise="dropout"`), averages of mu (`ema_decay`, `swa_start`).
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from dmsec_jax.core import trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.config import config
from dmsec_jax.core.means import mean_over
from dmsec_jax.core.types import EpsFn, Key, Latent, Params
from dmsec_jax.core.weight_noise import dropped, perturbed
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune import dreambooth
from dmsec_jax.finetune.adapters import Adapter
from dmsec_jax.finetune.dreambooth import TextFn
from dmsec_jax.finetune.examples import Data

NORM = (r"(^|/)(conv_norm_out|norm\d?)/(scale|bias)$",)
LINEAR = (r"/attn1/to_(q|k|v|out_0)/(kernel|bias)$", r"/ff/net_(0/proj|2)/(kernel|bias)$")
UP = tuple(f"up_blocks_.*{pattern}" for pattern in LINEAR)
SELECTIONS = {
    "norm": NORM,
    "linear": LINEAR,
    "linear+cross": (*LINEAR, r"/attn2/to_(q|k|v|out_0)/(kernel|bias)$"),
    "up": UP,
    "up+time": (*UP, r"up_blocks_.*/time_emb_proj/(kernel|bias)$", r"(^|/)time_embedding/"),
    "lora-up": (r"/up$",),
    "oft": (r"/generator$",),
}
"""Named selections of leaves: for full fine-tuning of a UNet, then for LoRA and OFT. "norm" is the paper's best in fidelity, at no memory."""
NoisyFn = Callable[..., Latent]
"""(params, sigma, key, z_t, t, context) -> the prediction with the weights' noise drawn in the outputs of the Dense layers that `sigma` names."""
START, WEIGHTS = 2**32 - 2, 2**32 - 3
"""Folded in for the initial state and for the weights' noise; no step counts so far."""


@config
class Posterior:
    """What the method adds to DreamBooth's settings; defaults are the paper's.

    sigma0: deviation of prior and posterior at the start.
    sigma_min: lower bound of sigma with the direct parameterisation.
    sigma_rate: learning rate of sigma; 0 freezes it.
    kl_weight: lambda; the paper takes 0, or 0.1 with the sum over weights.
    dropout: with `noise="dropout"`, how often what was learnt of a weight is dropped: theta = mu_0 + keep (mu - mu_0) / (1 - dropout), keep 0 or 1
        (Lee et al., "Mixout", ICLR 2020, Eq. 5); sigma then plays no part.
    """

    sigma0: float = 0.01
    sigma_min: float = 1e-7
    sigma_rate: float = 5e-6
    sigma_decay: float = 0.0
    kl_weight: float = 0.0
    dropout: float = 0.1
    noise: Literal["weights", "activations", "dropout"] = "weights"
    selection: str | tuple[str, ...] = "norm"  # of SELECTIONS, or regular expressions over paths of the trainable tree
    parameterisation: Literal["direct", "softplus"] = "direct"
    kl: Literal["posterior-prior", "prior-posterior"] = "posterior-prior"
    kl_scale: Literal["mean", "sum"] = "mean"
    halves: Literal["shared", "separate"] = "shared"  # theta of instance and class pictures
    weight_samples: int = 1  # theta per step, averaged over
    generator: Literal["threefry2x32", "rbg"] = (
        "threefry2x32"  # of the weights' noise; rbg may be faster on accelerators
    )


@config
class Config(dreambooth.Config, Posterior):
    """DreamBooth's settings and the posterior's, side by side."""


class State(NamedTuple):
    tuned: dreambooth.State
    """mu and everything that is trained without a posterior, with optimiser and average."""
    raw: Params
    """sigma of the selected leaves, as it is parameterised."""
    raw_opt: optax.OptState
    prior: Params
    """mu_0 of the selected leaves that are no weights of the base model; that of the others is the base weight itself, which is not kept twice."""


class Info(NamedTuple):
    loss: Float[Array, "..."]
    """J without the KL term, at the weights drawn."""
    instance_loss: Float[Array, "..."]
    prior_loss: Float[Array, "..."]
    kl: Float[Array, "..."]
    """Before kl_weight, scaled as configured."""
    sigma: Float[Array, "..."]
    """Mean over the selected weights."""
    grad_norm: Float[Array, "..."]
    """Of mu and sigma together, before clipping."""
    finite: Bool[Array, "..."]


def init(key: Key, params: Params, cfg: Config, *, adapter: Adapter) -> State:
    """The state before the first step: the adapter's start, and sigma0 everywhere.

    Raises:
        ValueError: on an unknown selection, one that finds nothing, counts below 1, or what `dreambooth.init` refuses.
    """
    require(cfg.weight_samples >= 1, "weight_samples", "at least 1", cfg.weight_samples, "draw one or more")
    tuned = dreambooth.init(key, params, cfg, adapter=adapter)
    chosen = selected(tuned.trainable, cfg)
    sigma0 = jnp.asarray(cfg.sigma0, jnp.float32)
    start = sigma0 if cfg.parameterisation == "direct" else sigma0 + jnp.log(-jnp.expm1(-sigma0))
    raw = jax.tree.map(lambda leaf: jnp.full_like(leaf, start), chosen)
    own = {path: leaf for path, leaf in trees.flatten(chosen).items() if path not in trees.flatten(params)}
    return State(tuned, raw, _adam(cfg).init(raw), jax.tree.map(jnp.copy, trees.unflatten(own)))


def check(cfg: Posterior) -> None:
    """Refuses numbers that make no posterior; `cfg` holds numbers, not tracers.

    Raises:
        ValueError: on a deviation, rate or weight that is negative or not finite, or no deviation with the softplus parameterisation.
    """
    require(cfg.weight_samples >= 1, "weight_samples", "at least 1", cfg.weight_samples, "draw one or more")
    for name in ("sigma0", "sigma_min", "sigma_rate", "sigma_decay", "kl_weight"):
        require(0 <= getattr(cfg, name) < math.inf, name, "at least 0 and finite", getattr(cfg, name), "correct it")
    require(0 <= cfg.dropout < 1, "dropout", "in [0, 1)", cfg.dropout, "for example 0.1")
    direct = cfg.parameterisation == "direct"
    require(direct or cfg.sigma_decay == 0, "sigma_decay", "0 with softplus", cfg.sigma_decay, "it would widen sigma")
    reached = direct or cfg.sigma0 > 0
    require(reached, "sigma0", "positive with softplus", cfg.sigma0, "use the direct parameterisation for no noise")


def selected(trainable: Params, cfg: Posterior) -> Params:
    """The leaves that have a posterior.

    Raises:
        ValueError: on an unknown name, or a pattern that finds nothing.
    """
    patterns = cfg.selection
    if isinstance(patterns, str):
        known = ", ".join(SELECTIONS)
        require(patterns in SELECTIONS, "selection", f"one of {known}", repr(patterns), "or a list of patterns")
        patterns = SELECTIONS[patterns]
    flat = trees.flatten(trainable)
    return trees.unflatten({path: flat[path] for path in trees.match(flat, patterns)})


def centre(state: State, params: Params) -> Params:
    """mu_0 of the selected leaves: the base weights, or where an adapter started."""
    flat, own = trees.flatten(params), trees.flatten(state.prior)
    chosen = trees.flatten(state.raw)
    return trees.unflatten(
        {path: own[path] if path in own else jnp.asarray(flat[path], jnp.float32) for path in chosen}
    )


def deviations(raw: Params, cfg: Posterior) -> Params:
    """sigma."""
    if cfg.parameterisation == "softplus":
        return jax.tree.map(jax.nn.softplus, raw)
    return raw


def dense(sigma: Params) -> tuple[Params, Params]:
    """The part of `sigma` that belongs to Dense layers (kernels [I, O] and the biases beside them), and the rest."""
    flat = trees.flatten(sigma)
    wide = {path.rpartition("/")[0] for path, leaf in flat.items() if path.endswith("kernel") and leaf.ndim == 2}
    mine = {path for path in flat if path.rpartition("/")[0] in wide and path.endswith(("kernel", "bias"))}
    parts = ({path: leaf for path, leaf in flat.items() if (path in mine) == chosen} for chosen in (True, False))
    return tuple(trees.unflatten(part) for part in parts)


def mean(state: State) -> Params:
    """mu, averaged where an average is kept: what to sample pictures with and to export under standard names."""
    return dreambooth.averaged(state.tuned)


def sample(key: Key, state: State, cfg: Config) -> Params:
    """A trainable tree drawn from the posterior, for pictures of more variety."""
    return perturbed(key, mean(state), deviations(state.raw, cfg))


def divergence(mu: Params, sigma: Params, prior: Params, cfg: Posterior) -> Float[Array, ""]:
    """KL between posterior N(mu, sigma^2) and prior N(prior, sigma0^2), in the direction and scale that are configured.

    mu, sigma, prior: trees of the same selected leaves.
    """

    def one(mu, sigma, centre):
        q, p = jnp.square(sigma), jnp.square(jnp.asarray(cfg.sigma0, jnp.float32))
        if cfg.kl == "prior-posterior":
            q, p = p, q
        return 0.5 * (jnp.log(p / q) - 1 + (q + jnp.square(mu - centre)) / p).sum()

    total = sum(jax.tree.leaves(jax.tree.map(one, mu, sigma, prior)))
    return total if cfg.kl_scale == "sum" else total / trees.count(prior)


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
    noisy_fn: NoisyFn | None = None,
) -> tuple[State, Info]:
    """One optimiser step on `batch`, with pictures corrupted as `dreambooth.step` does with the same key, and shared among devices
    likewise: all of them draw the same weights. `noisy_fn`, of the same network as `eps_fn`, is for noise of activations.

    Raises:
        ValueError: on what `dreambooth.gradients` refuses, and on noise of activations without `noisy_fn`, with a text encoder, with
            accumulation, or under `pmap`: every row must draw noise of its own.
    """
    together = cfg.noise == "activations"
    network = {"schedule": schedule, "text_fn": text_fn, "axis_name": axis_name, "together": together}
    trainable, prior_mean = {"mu": state.tuned.trainable, "raw": state.raw}, centre(state, params)
    if together:
        alone = noisy_fn is not None and text_fn is None and axis_name is None and cfg.accumulation == 1
        cure = 'train full weights of the UNet alone, or take noise="weights"'
        require(alone, "noise", "of weights unless rows are drawn at once by a noisy_fn", "activations", cure)

    def at(own: Key, part: Data):
        """Gradient of mu and raw at one draw of the weights."""
        merge = lambda base, both: _drawn(own, base, both, prior_mean, cfg, adapter)
        fn = eps_fn
        if together:
            fn = lambda drawn, *inputs: noisy_fn(drawn["params"], drawn["sigma"], own, *inputs)
        noisy = Adapter(adapter.init, merge)
        return dreambooth.gradients(key, trainable, part, params, cfg, eps_fn=fn, adapter=noisy, **network)

    def draw(k):
        own = _weight_key(key, k, cfg)
        if cfg.halves == "shared" or batch.prior is None:
            found, info = at(own, batch)
            return found, info.instance_loss, info.prior_loss
        found, info = at(own, Data(batch.instance))
        other, prior_info = at(jax.random.fold_in(own, 1), Data(None, batch.prior))
        found = jax.tree.map(lambda a, b: a + cfg.prior_weight * b, found, other)
        return found, info.instance_loss, prior_info.instance_loss

    grads, instance, prior = mean_over(draw, jnp.arange(cfg.weight_samples))
    grads, kl = _regularised(grads, trainable, prior_mean, cfg)
    norm = optax.tree.norm(grads)
    loss = instance + cfg.prior_weight * prior
    sigma = deviations(state.raw, cfg)
    info = Info(
        loss=loss,
        instance_loss=instance,
        prior_loss=prior,
        kl=kl,
        sigma=sum(leaf.sum() for leaf in jax.tree.leaves(sigma)) / trees.count(sigma),
        grad_norm=norm,
        finite=jnp.isfinite(loss) & jnp.isfinite(norm),
    )
    return _update(state, grads, norm, cfg), info


def run(
    key: Key,
    data: Data,
    params: Params,
    cfg: Config,
    *,
    eps_fn: EpsFn,
    adapter: Adapter,
    schedule: ScheduleConfig,
    text_fn: TextFn | None = None,
    axis_name: str | None = None,
    noisy_fn: NoisyFn | None = None,
) -> tuple[State, Info]:
    """All `cfg.num_steps` steps as one `scan`; step i uses fold_in(key, i) and sees `dreambooth.draw(key, i, data, cfg)`."""
    state = init(jax.random.fold_in(key, START), params, cfg, adapter=adapter)
    options = {"eps_fn": eps_fn, "adapter": adapter, "schedule": schedule, "text_fn": text_fn, "axis_name": axis_name}
    options["noisy_fn"] = noisy_fn
    return advance(key, state, data, params, cfg, num_steps=cfg.num_steps, **options)


def advance(
    key: Key, state: State, data: Data, params: Params, cfg: Config, *, num_steps: int, **options
) -> tuple[State, Info]:
    """`num_steps` steps on from a state: pieces give what one run gives. Options as `step`."""

    def body(state: State, i):
        batch = dreambooth.draw(key, i, data, cfg)
        return step(jax.random.fold_in(key, i), state, batch, params, cfg, **options)

    return jax.lax.scan(body, state, state.tuned.step + jnp.arange(num_steps))


def _drawn(key: Key, base: Params, both: dict[str, Params], prior: Params, cfg: Config, adapter: Adapter) -> Params:
    """The network's parameters at one draw; for noise of activations "params" and the "sigma" that is left to the network."""
    if cfg.noise == "dropout":
        return adapter.merge(base, dropped(key, both["mu"], prior, cfg.dropout))
    sigma = deviations(both["raw"], cfg)
    any_noise = (jnp.asarray(cfg.sigma0) > 0) | (jnp.asarray(cfg.sigma_rate) > 0) | (jnp.asarray(cfg.sigma_min) > 0)
    if cfg.noise == "weights":
        return adapter.merge(base, perturbed(key, both["mu"], sigma, any_noise))
    layers, rest = dense(sigma)
    return {"params": adapter.merge(base, perturbed(key, both["mu"], rest, any_noise)), "sigma": layers}


def _regularised(grads: Params, both: dict[str, Params], prior: Params, cfg: Config) -> tuple[Params, Float[Array, ""]]:
    """The gradient with that of the KL term, and KL."""

    def penalty(mu, raw):
        return divergence(mu, deviations(raw, cfg), prior, cfg)

    kl, (pull, raw_pull) = jax.value_and_grad(penalty, (0, 1))(selected(both["mu"], cfg), both["raw"])
    # a weight of zero must not turn an infinite divergence (sigma = 0) into NaN
    add = lambda grad, pull: grad + jnp.where(cfg.kl_weight > 0, cfg.kl_weight * pull, 0.0)
    mu = trees.flatten(grads["mu"])
    mu |= {path: add(mu[path], leaf) for path, leaf in trees.flatten(pull).items()}
    grads = {"mu": trees.unflatten(mu), "raw": jax.tree.map(add, grads["raw"], raw_pull)}
    # frozen sigmas must not take part in the clipping of the others
    grads["raw"] = jax.tree.map(lambda leaf: jnp.where(cfg.sigma_rate > 0, leaf, 0.0), grads["raw"])
    return grads, kl


def _weight_key(key: Key, k, cfg: Config) -> Key:
    """That of the weights' noise in draw k of a step, of the generator that is configured."""
    own = jax.random.fold_in(jax.random.fold_in(key, WEIGHTS), k)
    if cfg.generator == "threefry2x32":
        return own
    return jax.random.wrap_key_data(jax.random.bits(own, (4,), "uint32"), impl=cfg.generator)


def _update(state: State, grads: dict[str, Params], norm: Float[Array, ""], cfg: Config) -> State:
    """AdamW on mu, Adam on sigma; both clipped by their common norm, as the public code does."""
    tuned = dreambooth.update(state.tuned, grads["mu"], norm, cfg)
    scale = jnp.minimum(1.0, cfg.clip_norm / (norm + 1e-6))
    clipped = jax.tree.map(lambda leaf: leaf * scale, grads["raw"])
    change, raw_opt = _adam(cfg).update(clipped, state.raw_opt, state.raw)
    raw = optax.apply_updates(state.raw, change)
    if cfg.parameterisation == "direct":
        raw = jax.tree.map(lambda leaf: jnp.maximum(leaf, cfg.sigma_min), raw)
    return State(tuned, raw, raw_opt, state.prior)


def _adam(cfg: Config) -> optax.GradientTransformation:
    return optax.adamw(cfg.sigma_rate, cfg.beta1, cfg.beta2, cfg.adam_epsilon, weight_decay=cfg.sigma_decay)
