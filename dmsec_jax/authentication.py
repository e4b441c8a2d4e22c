"""Floor 6, the membership audit: CGI-DM and the statistics of the literature on one pair of models, all as evidence that is higher for members.

Costs are network evaluations per picture; a gradient with respect to the latent counts as two (the pass there, and the pass back).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax import pipeline
from dmsec_jax.core import spread
from dmsec_jax.core.checks import image_batch, require
from dmsec_jax.core.types import Latent, Params
from dmsec_jax.diffusion import draws
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.methods import cgi_dm, membership
from dmsec_jax.pipeline import Subject

PUBLIC_ENTRIES = 64 * 64 * 4
"""Latent entries of the model that the public step sizes were chosen for; others are scaled to the same change per entry."""
CROPS = (0.95, 0.9, 0.85, 0.8)
"""Shares of the side that PFAMI's neighbours keep."""
Mask = Literal["checkerboard", "blocks", "half", "blur"]
CHUNK = 25
"""Steps of CGI-DM in one compiled call, and between two chances to save; the number of steps is a multiple of it, or less."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the statistics are computed; hashable, so that it is part of the compiled program."""

    num_draws: int = 64
    """Draws of (timestep, noise) per picture, for the losses."""
    window: tuple[int, int] | None = None
    """low <= timestep < high; the whole schedule by default."""
    pia_timesteps: tuple[int, ...] = (200,)
    secmi_timestep: int = 100
    secmi_interval: int = 10
    pfami_timesteps: tuple[int, ...] = (100, 200, 300)
    gradient_timesteps: tuple[int, ...] = (100, 200, 300, 400, 500, 600, 700, 800)
    num_steps: int = 50
    """Steps of CGI-DM; many more make the hidden half worse on a small model."""
    cgi_draws: int = 1
    """Draws per step of CGI-DM; at equal cost more steps serve better than more draws (benchmarks/LOG.md)."""
    eps: float = 70.0
    """Radius of CGI-DM's ball in the units of the public code: for 64 x 64 x 4 latents, scaled to others."""
    alpha: float = 2.0
    """Its step, in the same units."""
    mask: Mask = "checkerboard"
    """What of a picture CGI-DM keeps: the public code's pattern, or blocks drawn for each picture, half of it each; its left half; or its blur."""
    tile: int = 4
    """Side of the tiles of checkerboard and blocks, in latent entries."""
    batch_size: int = 10
    """Pictures at once; does not change the result."""
    chunk: int = 4
    """Draws of the losses at once, for each of those pictures; does not change the result."""


MASKS = 2**32 - 1  # folded in for masks that are drawn


class Method(NamedTuple):
    """A membership test."""

    label: str
    description: str
    evaluations: Callable[[Settings], int]
    """Network evaluations per picture."""


METHODS = {
    "loss-difference": Method("loss difference", "how much better than the base model it denoises the picture", lambda s: 2 * s.num_draws),
    "loss-difference-independent": Method("loss difference, noise apart", "the same, with noise apart for each model", lambda s: 2 * s.num_draws),
    "cgi-dm": Method("CGI-DM", "how close it comes to the hidden half of the picture, asked to fill it in", lambda s: 4 * s.num_steps * s.cgi_draws),
    "cgi-dm-faithful": Method("CGI-DM, public code", "the same as published: noise apart for each model", lambda s: 4 * s.num_steps),
    "loss": Method("loss", "how well it denoises the picture", lambda s: s.num_draws),
    "secmi": Method("SecMI", "error of one deterministic step back and forth", lambda s: s.secmi_timestep // s.secmi_interval + 2),
    "pia": Method("PIA", "whether the noise predicted for the clean picture is predicted again", lambda s: 1 + len(s.pia_timesteps)),
    "pian": Method("PIAN", "PIA with normalised noise", lambda s: 1 + len(s.pia_timesteps)),
    "pfami": Method("PFAMI", "whether the loss rises for slightly cropped pictures", lambda s: (1 + len(CROPS)) * len(s.pfami_timesteps)),
    "clid": Method("CLiD", "how much the prompt helps it to denoise the picture", lambda s: 2 * s.num_draws),
    "gradient-norm": Method("gradient norm", "size of the weight gradient of the loss", lambda s: 3 * len(s.gradient_timesteps)),
    "base-loss": Method("loss of the base model", "how well the base model, which knows none of them, denoises the picture", lambda s: s.num_draws),
}  # fmt: skip
"""By name; "base-loss" is no test but a control: it tells two sets apart only if they differ in kind."""
RECOVERING = ("cgi-dm", "cgi-dm-faithful")
LOSSES = {
    "loss-difference": ("base", "tuned"),
    "loss-difference-independent": ("base", "tuned-apart"),
    "loss": (None, "tuned"),
    "clid": ("unconditional", "tuned"),
    "base-loss": (None, "base"),
}
"""The two losses whose difference is the evidence."""


class Recovery(NamedTuple):
    """What CGI-DM made of each picture."""

    images: np.ndarray
    """[N, H, W, 3]: the hidden half filled in."""
    partial: np.ndarray
    """[N, H, W, 3]: where it began."""
    error: np.ndarray
    """[N] distance of the recovered latent from the true one, over the distance it began with; minus this is the evidence."""
    skipped: np.ndarray
    """[N] steps whose gradient was not finite, so that nothing moved."""


class Unfinished(NamedTuple):
    """CGI-DM on its way, one entry per picture: what it takes to go on."""

    delta: np.ndarray
    """[N, h, w, c]"""
    done: np.ndarray
    """[N] steps."""
    skipped: np.ndarray
    """[N]"""


def statistics(
    key, subject: Subject, images: np.ndarray, names: Sequence[str], settings: Settings = Settings()
) -> dict[str, np.ndarray]:
    """Evidence [N] that each picture [N, H, W, 3] in [-1, 1] was trained on, for each test in `names`; higher for members.

    Losses that several tests need are computed once. Tests of `RECOVERING` are asked of `recover`.

    Raises:
        ValueError: on an unknown name, pictures of another form, scores that are not finite, and what `methods.membership` refuses.
    """
    known = [name for name in METHODS if name not in RECOVERING]
    for name in names:
        require(name in known, "method", f"one of {', '.join(known)}", repr(name), "choose one of them")
    image_batch("images", images)
    rows, networks = _rows(subject, images), _networks(subject)
    parts = dict.fromkeys(part for name in names for part in LOSSES.get(name, ()) if part is not None)
    drawn = {part: _drawn(key, part, rows, networks, subject, settings) for part in parts} | {None: np.zeros(1)}
    if "pfami" in names:
        crops = [latents(subject, _cropped(images, share)) for share in CROPS]
        rows["neighbours"] = jnp.stack(crops, axis=1)  # [N, M, h, w, c]
    options = {"settings": settings, **_static(subject)}

    def one(name: str) -> np.ndarray:
        if name in LOSSES:
            first, second = (drawn[part] for part in LOSSES[name])
            return (first - second).mean(axis=-1)
        run = lambda part: _statistic(key, part, networks["tuned"], name=name, **options)
        return _whole(run, rows, settings)

    found = {name: one(name) for name in names}
    for name, scores in found.items():
        broken = np.flatnonzero(~np.isfinite(scores))
        cure = "check the weights of both models, for example that they were not trained into NaN"
        require(not len(broken), f"scores of {name}", "finite", f"{len(broken)} of {len(scores)} that are not", cure)
    return found


def losses(
    key, subject: Subject, images: np.ndarray, which: Sequence[str], settings: Settings = Settings()
) -> dict[str, np.ndarray]:
    """Losses [N, K] of each picture [N, H, W, 3] in [-1, 1] at K = `settings.num_draws` draws.

    Args:
        which: "base", "tuned", "unconditional" (the tuned model without a prompt), all on the same draws, and "tuned-apart", on others.
    """
    rows, networks = _rows(subject, images), _networks(subject)
    return {name: _drawn(key, name, rows, networks, subject, settings) for name in which}


def latents(subject: Subject, images: np.ndarray) -> Latent:
    """Mean latents under the base model's autoencoder, which fine-tuning leaves alone."""
    return pipeline.encode(subject.base, images)[0]


def recover(
    key,
    subject: Subject,
    images: np.ndarray,
    settings: Settings = Settings(),
    *,
    name: str = "cgi-dm",
    resume: Unfinished | None = None,
    on_chunk: Callable[[Unfinished], None] | None = None,
) -> Recovery:
    """CGI-DM on each picture [N, H, W, 3] in [-1, 1].

    Args:
        name: "cgi-dm", or "cgi-dm-faithful" for the public code's choices: noise drawn for each model apart, one draw per step, and a start
            that was rounded to eight bits and encoded again by a random draw.
        resume: what `on_chunk` was last given in an earlier call with the same arguments, on whatever devices; the result is that of one call.
        on_chunk: called after every `CHUNK` steps of a batch.

    Raises:
        ValueError: on another name, pictures of another form, an unknown mask, a tile that does not divide the latent, or steps that
            are no multiple of `CHUNK`.
    """
    require(name in RECOVERING, "method", f"one of {', '.join(RECOVERING)}", repr(name), "choose one of them")
    image_batch("images", images)
    base, faithful = subject.base, name == "cgi-dm-faithful"
    z0 = latents(subject, images)
    cfg, masks = _config(settings, z0, faithful, base.schedule), _masks(key, settings, z0)
    pair_fn, params = _pair(subject)
    key_start, key_steps = jax.random.split(key)
    start = cgi_dm.initial(
        z0,
        masks,
        cfg,
        encode_fn=lambda images: pipeline.encode(base, images),
        decode_fn=lambda z: pipeline.decode(base, z),
        quantise=faithful,
        key=key_start if faithful else None,
    )
    run = functools.partial(_advance, num_steps=min(CHUNK, cfg.num_steps), pair_fn=pair_fn, schedule=base.schedule)
    count, size = len(images), spread.filled(min(settings.batch_size, len(images)))
    found = resume or Unfinished(np.zeros(z0.shape, np.float32), np.zeros(count, int), np.zeros(count, int))
    while (left := np.flatnonzero(found.done < cfg.num_steps)).size:
        # those that are as far as the first: batches of a run on other devices may have ended elsewhere
        rows = left[found.done[left] == found.done[left[0]]][:size]
        index = rows[np.minimum(np.arange(size), len(rows) - 1)]  # the last batch is filled up: one compilation
        state = cgi_dm.State(jnp.asarray(found.delta[index]), jnp.asarray(index), jnp.int32(found.done[rows[0]]))
        state, info = run(key_steps, state, z0[index], start[index], masks[index], params, cfg)
        found = jax.tree.map(np.copy, found)
        found.delta[rows] = np.asarray(state.delta)[: len(rows)]
        found.skipped[rows] += np.asarray((~info.finite).sum(axis=0))[: len(rows)]
        found.done[rows] += len(info.finite)
        if on_chunk is not None:
            on_chunk(found)
    whole = lambda delta: cgi_dm.completed(cgi_dm.State(delta, None, None), z0, start, masks, cfg)
    partial, completed = whole(jnp.zeros_like(z0)), whole(jnp.asarray(found.delta))
    distance = lambda z: np.asarray(jnp.sqrt(jnp.square(z - z0).sum(axis=(1, 2, 3))), np.float64)
    return Recovery(
        images=pipeline.decode(base, completed),
        partial=pipeline.decode(base, partial),
        error=distance(completed) / distance(partial),
        skipped=found.skipped,
    )


def require_steps(count: int) -> None:
    """CGI-DM runs in whole chunks.

    Raises:
        ValueError: if it cannot.
    """
    fits = count >= 1 and (count <= CHUNK or count % CHUNK == 0)
    require(fits, "num_steps", f"from 1 to {CHUNK}, or a multiple of {CHUNK}", count, "round it")


@functools.partial(jax.jit, static_argnames=("num_steps", "pair_fn", "schedule"), donate_argnames="state")
def _advance(key, state, known, start, mask, params, cfg, **options):
    state, known, start, mask = spread.even((state, known, start, mask))
    return spread.whole(cgi_dm.advance(key, state, known, start, mask, params, cfg, **options))


def _config(settings: Settings, z0: Latent, faithful: bool, schedule: ScheduleConfig) -> cgi_dm.Config:
    require_steps(settings.num_steps)
    share = float(np.sqrt(np.prod(z0.shape[1:]) / PUBLIC_ENTRIES))
    return cgi_dm.Config(
        eps=settings.eps * share,
        alpha=settings.alpha * share,
        num_steps=settings.num_steps,
        num_draws=1 if faithful else settings.cgi_draws,
        t_max=schedule.num_train_timesteps,
        noise="independent" if faithful else "common",
        domain="frequency" if settings.mask == "blur" else "space",
    )


def _masks(key, settings: Settings, z0: Latent) -> jax.Array:
    """Masks [N, h, w, 1] of what is kept, or of frequencies [N, h, w, 1] that are."""
    kinds = get_args(Mask)
    require(settings.mask in kinds, "mask", f"one of {', '.join(kinds)}", repr(settings.mask), "choose one of them")
    count, *shape, _ = z0.shape
    if settings.mask == "blocks":
        seed = int(jax.random.bits(jax.random.fold_in(key, MASKS)))
        return jnp.asarray(cgi_dm.blocks(seed, count, *shape, block=settings.tile))
    if settings.mask == "checkerboard":
        mask = cgi_dm.checkerboard(*shape, settings.tile)
    elif settings.mask == "half":
        mask = cgi_dm.half(*shape)
    else:
        mask = cgi_dm.low_pass(*shape)
    return jnp.broadcast_to(mask, (count, *mask.shape[1:]))


def _pair(subject: Subject) -> tuple[Callable, Params]:
    networks = _networks(subject)
    return pipeline.pair(subject.base, *((networks[n]["unet"], networks[n]["context"]) for n in ("base", "tuned")))


def _networks(subject: Subject) -> dict[str, dict[str, Params]]:
    """Each model with its own text encoder's context, and the fine-tuned one without a prompt."""
    base, tuned = subject.base, subject.tuned
    empty, prompt = pipeline.contexts(base, ["", subject.prompt], tuned)[:, None]
    return {
        "base": {"unet": base.params["unet"], "context": pipeline.contexts(base, [subject.prompt])},
        "tuned": {"unet": tuned["unet"], "context": prompt},
        "unconditional": {"unet": tuned["unet"], "context": empty},
    }


def _rows(subject: Subject, images: np.ndarray) -> dict[str, jax.Array]:
    return {"z0": latents(subject, images), "index": jnp.arange(len(images))}


def _drawn(key, name: str, rows, networks, subject: Subject, settings: Settings) -> np.ndarray:
    """Losses [N, K] of one of those that `losses` names."""
    own = membership.apart(key) if name == "tuned-apart" else key
    network, options = networks[name.removesuffix("-apart")], {"settings": settings, **_static(subject)}
    return _whole(lambda part: _losses(own, part, network, **options), rows, settings)


def _static(subject: Subject) -> dict:
    """What is compiled in."""
    return {"schedule": subject.base.schedule, "predict_fn": subject.base.functions.predict_fn}


def _whole(run: Callable, rows, settings: Settings) -> np.ndarray:
    """`run` over batches, joined, float64."""
    found = pipeline.batched(lambda part: (run(part),), rows, settings.batch_size)
    return np.concatenate([np.asarray(out, np.float64) for (out,) in found])


def _bound(predict_fn, network):
    rows = lambda z_t: jnp.broadcast_to(network["context"], (z_t.shape[0], *network["context"].shape[1:]))
    return lambda z_t, t: predict_fn(network["unet"], z_t, t, rows(z_t))


@functools.partial(jax.jit, static_argnames=("settings", "schedule", "predict_fn"))
def _losses(key, part, network, *, settings: Settings, schedule: ScheduleConfig, predict_fn):
    options = {"num_draws": settings.num_draws, "window": settings.window, "draw": draws.stratified_draw}
    part = spread.even(part)
    options |= {"index": part["index"], "chunk": settings.chunk}
    return spread.whole(membership.losses(key, _bound(predict_fn, network), part["z0"], schedule, **options))


@functools.partial(jax.jit, static_argnames=("name", "settings", "schedule", "predict_fn"))
def _statistic(key, part, network, *, name: str, settings: Settings, schedule: ScheduleConfig, predict_fn):
    part = spread.even(part)
    z0, index, model_fn = part["z0"], part["index"], _bound(predict_fn, network)
    if name == "secmi":
        found = membership.secmi(model_fn, z0, schedule, t=settings.secmi_timestep, interval=settings.secmi_interval)
    elif name in ("pia", "pian"):
        options = {"timesteps": settings.pia_timesteps, "normalised": name == "pian"}
        found = membership.pia(model_fn, z0, schedule, **options)
    elif name == "pfami":
        neighbours = jnp.moveaxis(part["neighbours"], 1, 0)
        options = {"timesteps": settings.pfami_timesteps, "index": index}
        found = membership.pfami(key, model_fn, z0, neighbours, schedule, **options)
    else:
        predict = lambda params, z_t, t: _bound(predict_fn, network | {"unet": params})(z_t, t)
        options = {"timesteps": settings.gradient_timesteps, "index": index}
        norms = membership.gradient_norms(key, predict, network["unet"], z0, schedule, **options)
        found = jnp.linalg.norm(norms, axis=1)
    return spread.whole(membership.SIGN[name] * found)


def _cropped(images: np.ndarray, share: float) -> np.ndarray:
    """The central part of each picture [N, H, W, C], stretched to its old size."""
    sides = jnp.asarray(images.shape[1:3])
    margin = (1 - share) * sides / 2
    stretched = jax.image.scale_and_translate(
        jnp.asarray(images), images.shape, (1, 2), jnp.full(2, 1 / share), -margin / share, "linear", antialias=False
    )
    return np.asarray(jnp.clip(stretched, -1, 1))
