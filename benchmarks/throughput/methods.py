"""Rows of the attacks and of FineXtract's sampling, on the embedded model."""

import copy
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.throughput.cases import HOW, PUBLIC, Case
from benchmarks.throughput.networks import PROMPT, embedded, fresh
from benchmarks.torch_baselines import attacks, sampling
from benchmarks.torch_baselines.networks import Models, whole
from dmsec_jax import pipeline
from dmsec_jax.checkpoints import mapping
from dmsec_jax.core import pgd
from dmsec_jax.core.pgd import Budget
from dmsec_jax.diffusion import draws, schedule
from dmsec_jax.methods import advdm, cgi_dm, finextract

STEPS = 3
"""Gradient steps in one call."""
SEED = 4


@functools.cache
def moved_unet(scale: float = 0.05) -> dict:
    """Parameters of a second UNet: the embedded model's, each weight changed by that share of itself."""
    base, _ = embedded()
    leaves, tree = jax.tree.flatten(base.params["unet"])
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [w * (1 + scale * jax.random.normal(key, w.shape)) for key, w in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


def moved_models(base_models: Models) -> Models:
    """Modules with those parameters."""
    models = copy.deepcopy(base_models)
    state = {name: whole(leaf) for name, leaf in mapping.to_state(moved_unet(), mapping.UNET).items()}
    models.unet.load_state_dict(state)
    return models


def protect(objective: str, batch: int, num_draws: int = 1) -> Case:
    """Steps of AdvDM, or of SDS, from the picture; with more than one draw a step there are no peers."""
    base, _ = embedded()
    shape, sds = base.latent_shape, objective == "sds"
    attack = pgd.Config(budget=Budget(8.0, "8bit"), step_size=Budget(2.0, "8bit"), num_steps=STEPS)
    cfg = advdm.Config(attack=attack, num_draws=num_draws)
    image = np.random.default_rng(0).uniform(-0.9, 0.9, (batch, base.pixels, base.pixels, 3)).astype(np.float32)
    context = pipeline.contexts(base, [PROMPT])
    eps_fn, params = pipeline.single(base, base.params["unet"], context)
    encode_fn = lambda params, image: base.functions.encode_fn(params["vae"], image)
    options = {"encode_fn": encode_fn, "eps_fn": eps_fn, "schedule": base.schedule}
    options["objective_fn"] = advdm.distillation if sds else advdm.denoising
    key, index, one = jax.random.key(SEED), jnp.arange(batch), jnp.ones((1, 1, 1, 1))

    def run(params, image, cfg):
        state, info = advdm.run(key, image, one, 0.0, index, params, cfg, **options)
        return state.attack.delta, info.gradient_norm[0]

    def drawn(i, j):
        own = jax.random.fold_in(jax.random.fold_in(key, i), j)
        t, noise = draws.uniform_draw(own, jnp.int32(0), 1, shape, (cfg.t_min, cfg.t_max))
        own_posterior = jax.random.fold_in(jax.random.fold_in(own, 1), 0)
        return t, noise, draws.standard_normal(own_posterior, shape)

    given = _given(drawn, batch)
    own = lambda how: attacks.own(batch, shape, how)
    size = {"steps": STEPS, "radius": 16 / 255, "size": 4 / 255, "sds": sds}
    ids = base.tokenizer.encode([PROMPT])

    def public(draw):
        return attacks.protect_public(fresh(), image, ids, draw, **size)

    def best(draw, how):
        return attacks.protect_best(fresh(), image, context, draw, how=how, **size)

    def named(out):
        return {"delta": np.asarray(out[0]), "norm": np.asarray(out[1])}

    return Case(
        op="sds-step" if sds else "advdm-step",
        shape="embedded",
        batch=batch,
        steps=STEPS,
        fn=run,
        args=({**params, "vae": base.params["vae"]}, jnp.asarray(image), cfg),
        rows=(1,),
        named=named,
        loose={"delta": 0.15},  # a sign flips where a gradient is near zero
        peers=_peers(public, best, given, own) if num_draws == 1 else {},
    )


def _given(drawn: Callable, batch: int) -> Callable[[str], attacks.DrawFn]:
    """All draws of all steps, made by us, as a baseline takes them."""
    found = jax.vmap(lambda i: jax.vmap(lambda j: drawn(i, j))(jnp.arange(batch)))(jnp.arange(STEPS))
    return lambda how: attacks.given(*found, how)


def _peers(public: Callable, best: Callable, given: Callable, own: Callable) -> dict:
    """Builders of all baselines: a pair of runs each, one with our draws to be compared, one with draws of its own to be timed."""

    def both(build, how):
        return lambda: (_with_norm(build(given(how))), build(own(how)))

    peers = {PUBLIC: both(public, "plain")}
    for name, how in HOW.items():
        peers[name] = both(functools.partial(best, how=how), how)
    return peers


def _with_norm(run: Callable) -> Callable:
    """Adds the first gradient's norm per picture to what a run returns."""

    def wrapped():
        outcome = run()
        norm = lambda: np.linalg.norm(outcome["gradient"]().reshape(len(outcome["gradient"]()), -1), axis=1)
        return {"delta": outcome["delta"], "norm": norm}

    return wrapped


def contrast(batch: int) -> Case:
    """Steps of CGI-DM on latents, both models at the same draws."""
    base, _ = embedded()
    shape = base.latent_shape
    cfg = cgi_dm.Config(num_steps=STEPS, alpha=1.0)
    known = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    mask = cgi_dm.checkerboard(*shape[:2])
    start = known * mask
    context = pipeline.contexts(base, [PROMPT])
    pair_fn, params = pipeline.pair(base, (base.params["unet"], context), (moved_unet(), context))
    key, index = jax.random.key(SEED), jnp.arange(batch)

    def run(params, known, start, mask, cfg):
        state, info = cgi_dm.run(key, known, start, mask, index, params, cfg, pair_fn=pair_fn, schedule=base.schedule)
        return state.delta, info.gradient_norm[0]

    def drawn(i, j):
        own = jax.random.fold_in(jax.random.fold_in(key, i), j)
        t, noise = draws.uniform_draw(own, jnp.int32(0), 1, shape, (cfg.t_min, cfg.t_max))
        return t, noise, noise

    case = attacks.Contrast(known, start, mask, STEPS, cfg.eps, cfg.alpha, cfg.bound)
    ids, own = base.tokenizer.encode([PROMPT]), lambda how: attacks.own(batch, shape, how)

    def public(draw):
        models = fresh()
        return attacks.contrast_public(models, moved_models(models), case, ids, draw, common=True)

    def best(draw, how):
        models = fresh()
        return attacks.contrast_best(models, moved_models(models), case, context, draw, how=how)

    return Case(
        op="cgi-dm-step",
        shape="embedded",
        batch=batch,
        steps=STEPS,
        fn=run,
        args=(params, *map(jnp.asarray, (known, start, mask)), cfg),
        rows=(1, 2),
        named=lambda out: {"delta": np.asarray(out[0]), "norm": np.asarray(out[1])},
        loose={"delta": 5e-3, "norm": 5e-3},  # a difference of two nearly equal losses
        peers=_peers(public, best, _given(drawn, batch), own),
    )


def two_models(batch: int, num_steps: int = 50) -> Case:
    """FineXtract: all steps with both networks; times are per step."""
    base, _ = embedded()
    cfg = finextract.Config(w=3.0, k=-0.02, num_steps=num_steps)
    z_T = np.random.default_rng(0).standard_normal((batch, *base.latent_shape)).astype(np.float32)
    empty, context = pipeline.contexts(base, ["", PROMPT])[:, None]
    pair_fn, params = pipeline.pair(base, (base.params["unet"], empty), (moved_unet(), context))
    key, index = jax.random.key(SEED), jnp.arange(batch)

    def run(params, z_T, cfg):
        return finextract.run(key, z_T, index, params, cfg, pair_fn=pair_fn, schedule=base.schedule)[0].sampler.z

    visited, final = schedule.timesteps(base.schedule, num_steps), schedule.final_alpha_bar(base.schedule)
    size = {"w": cfg.w, "k": cfg.k, "final_alpha_bar": final}

    def build(how, batch):
        models = fresh()
        return sampling.two_models(
            models, moved_models(models), z_T, (empty, context), visited, batch=batch, how=how, **size
        )

    peers = {PUBLIC: lambda: build("plain", sampling.PUBLIC_BATCH)}
    peers |= {name: lambda how=how: build(how, batch) for name, how in HOW.items()}
    return Case(
        op="finextract-sampling",
        shape="embedded",
        batch=batch,
        steps=num_steps,
        fn=run,
        args=(params, jnp.asarray(z_T), cfg),
        rows=(1,),
        named=lambda out: {"latent": np.asarray(out)},
        loose={"latent": 2e-2},  # rounding grows over 50 steps
        peers=peers,
    )


def every(batches: tuple[int, ...]) -> Iterator[tuple[str, str, int, Callable[[], Case]]]:
    """(op, shape, batch, builder) of these rows."""
    ops = {
        "finextract-sampling": two_models,
        "advdm-step": functools.partial(protect, "advdm"),
        "sds-step": functools.partial(protect, "sds"),
        "cgi-dm-step": contrast,
    }
    for op, make in ops.items():
        for batch in batches:
            yield op, "embedded", batch, functools.partial(make, batch)
