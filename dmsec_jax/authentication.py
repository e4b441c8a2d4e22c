"""Floor 6, the membership audit: CGI-DM and the statistics of the literature on one pair of models, all as evidence that is higher for members.

Costs are network evaluations per picture; a gradient with respect to the latent counts as two (the pass there, and the pass back).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax import pipeline
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
    num_steps: int = 200
    """Steps of CGI-DM."""
    cgi_draws: int = 4
    """Draws per step of CGI-DM."""
    eps: float = 70.0
    """Radius of CGI-DM's ball in the units of the public code: for 64 x 64 x 4 latents, scaled to others."""
    alpha: float = 2.0
    """Its step, in the same units."""
    tile: int = 4
    """Side of the mask's tiles, in latent entries."""
    batch_size: int = 10
    """Pictures at once; does not change the result."""


class Method(NamedTuple):
    """A membership test."""

    label: str
    description: str
    evaluations: Callable[[Settings], int]
    """Network evaluations per picture."""


METHODS = {
    "loss-difference": Method("loss difference", "how much better than the base model it denoises the picture", lambda s: 2 * s.num_draws),
    "loss-difference-independent": Method("loss difference, noise apart", "the same, with noise apart for each model", lambda s: 2 * s.num_draws),
    "loss": Method("loss", "how well the fine-tuned model denoises the picture", lambda s: s.num_draws),
    "secmi": Method("SecMI", "error of one deterministic step back and forth", lambda s: s.secmi_timestep // s.secmi_interval + 2),
    "pia": Method("PIA", "whether the noise predicted for the clean picture is predicted again", lambda s: 1 + len(s.pia_timesteps)),
    "pian": Method("PIAN", "PIA with normalised noise", lambda s: 1 + len(s.pia_timesteps)),
    "pfami": Method("PFAMI", "whether the loss rises for slightly cropped pictures", lambda s: (1 + len(CROPS)) * len(s.pfami_timesteps)),
    "clid": Method("CLiD", "how much the prompt helps the fine-tuned model to denoise the picture", lambda s: 2 * s.num_draws),
    "gradient-norm": Method("gradient norm", "size of the weight gradient of the loss", lambda s: 3 * len(s.gradient_timesteps)),
}  # fmt: skip


class Recovery(NamedTuple):
    """What CGI-DM made of each picture."""

    images: np.ndarray
    """[N, H, W, 3]: the hidden half filled in."""
    partial: np.ndarray
    """[N, H, W, 3]: where it began."""
    error: np.ndarray
    """[N] distance of the recovered latent from the true one, over the distance it began with; NaN where a gradient was not finite."""
    evaluations: int


def statistics(key, subject: Subject, images: np.ndarray, name: str, settings: Settings = Settings()) -> np.ndarray:
    """[N] evidence that each picture [N, H, W, 3] in [-1, 1] was trained on, by the test `name` of `METHODS`; higher for members.

    Raises:
        ValueError: on an unknown name, pictures of another form, and what the tests of `methods.membership` refuse.
    """
    require(name in METHODS, "method", f"one of {', '.join(METHODS)}", repr(name), "choose one of them")
    image_batch("images", images)
    rows = {"z0": latents(subject, images), "index": jnp.arange(len(images))}
    if name == "pfami":
        crops = [latents(subject, _cropped(images, share)) for share in CROPS]
        rows["neighbours"] = jnp.stack(crops, axis=1)  # [N, M, h, w, c]
    networks = _networks(subject)
    options = {"name": name, "settings": settings, "schedule": subject.base.schedule}

    def run(part):
        return (_statistic(key, part, networks, predict_fn=subject.base.functions.predict_fn, **options),)

    found = [np.asarray(out) for (out,) in pipeline.batched(run, rows, settings.batch_size)]
    return np.concatenate(found).astype(np.float64)


def latents(subject: Subject, images: np.ndarray) -> Latent:
    """Mean latents under the base model's autoencoder, which fine-tuning leaves alone."""
    return pipeline.encode(subject.base, images)[0]


def recover(
    key,
    subject: Subject,
    images: np.ndarray,
    settings: Settings = Settings(),
    *,
    faithful: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """CGI-DM on each picture [N, H, W, 3] in [-1, 1].

    Args:
        faithful: the public code's choices: noise drawn for each model apart, one draw per step, and a start that was rounded to eight bits and
            encoded again by a random draw.
        progress: called as progress(steps done, total).

    Raises:
        ValueError: on pictures of another form, or a tile that does not divide the latent.
    """
    image_batch("images", images)
    base = subject.base
    z0 = latents(subject, images)
    cfg, mask = _config(settings, z0, faithful), jnp.asarray(cgi_dm.checkerboard(*z0.shape[1:3], settings.tile))
    pair_fn, params = _pair(subject)
    key_start, key_steps = jax.random.split(key)
    start = cgi_dm.initial(
        z0,
        mask,
        cfg,
        encode_fn=lambda images: pipeline.encode(base, images),
        decode_fn=lambda z: pipeline.decode(base, z),
        quantise=faithful,
        key=key_start if faithful else None,
    )
    chunk = min(CHUNK, cfg.num_steps)
    run = functools.partial(_advance, num_steps=chunk, pair_fn=pair_fn, schedule=base.schedule)
    rows = {"known": z0, "start": start, "index": jnp.arange(len(images))}
    done, total = 0, cfg.num_steps * -(-len(images) // settings.batch_size)

    def one(part):
        nonlocal done
        state, finite = cgi_dm.init(part["start"], part["index"], cfg), True
        for _ in range(0, cfg.num_steps, chunk):
            state, info = run(key_steps, state, part["known"], part["start"], mask, params, cfg)
            finite = finite & info.finite.all(axis=0)
            done += chunk
            if progress is not None:
                progress(done, total)
        return cgi_dm.completed(state, part["known"], part["start"], mask, cfg), finite

    completed, finite = map(jnp.concatenate, zip(*pipeline.batched(one, rows, settings.batch_size), strict=True))
    distance = lambda z: np.asarray(jnp.sqrt(jnp.square(z - z0).sum(axis=(1, 2, 3))), np.float64)
    partial = cgi_dm.completed(cgi_dm.init(start, rows["index"], cfg), z0, start, mask, cfg)
    error = distance(completed) / distance(partial)
    return Recovery(
        images=pipeline.decode(base, completed),
        partial=pipeline.decode(base, partial),
        error=np.where(np.asarray(finite), error, np.nan),
        evaluations=4 * cfg.num_steps * cfg.num_draws,
    )


CHUNK = 25
"""Steps of CGI-DM in one compiled call; the number of steps is a multiple of it, or less."""

_advance = jax.jit(cgi_dm.advance, static_argnames=("num_steps", "pair_fn", "schedule"), donate_argnums=1)


def _config(settings: Settings, z0: Latent, faithful: bool) -> cgi_dm.Config:
    count = settings.num_steps
    fits = count >= 1 and (count <= CHUNK or count % CHUNK == 0)
    require(fits, "num_steps", f"at most {CHUNK} or a multiple of {CHUNK}", count, "round it")
    share = float(np.sqrt(np.prod(z0.shape[1:]) / PUBLIC_ENTRIES))
    return cgi_dm.Config(
        eps=settings.eps * share,
        alpha=settings.alpha * share,
        num_steps=count,
        num_draws=1 if faithful else settings.cgi_draws,
        noise="independent" if faithful else "common",
    )


def _pair(subject: Subject) -> tuple[Callable, Params]:
    base, tuned = subject.base, subject.tuned
    first = (base.params["unet"], pipeline.contexts(base, [subject.prompt]))
    return pipeline.pair(base, first, (tuned["unet"], pipeline.contexts(base, [subject.prompt], tuned)))


def _networks(subject: Subject) -> dict[str, dict[str, Params]]:
    """Each model with its own text encoder's context, and the fine-tuned one without a prompt."""
    base, tuned = subject.base, subject.tuned
    empty, prompt = pipeline.contexts(base, ["", subject.prompt], tuned)[:, None]
    return {
        "base": {"unet": base.params["unet"], "context": pipeline.contexts(base, [subject.prompt])},
        "tuned": {"unet": tuned["unet"], "context": prompt},
        "unconditional": {"unet": tuned["unet"], "context": empty},
    }


@functools.partial(jax.jit, static_argnames=("name", "settings", "schedule", "predict_fn"))
def _statistic(key, part, networks, *, name: str, settings: Settings, schedule: ScheduleConfig, predict_fn):
    z0, index = part["z0"], part["index"]
    rows = lambda context, z: jnp.broadcast_to(context, (z.shape[0], *context.shape[1:]))

    def fn(which):
        part = networks[which]
        return lambda z_t, t: predict_fn(part["unet"], z_t, t, rows(part["context"], z_t))

    drawn = {"num_draws": settings.num_draws, "window": settings.window, "draw": draws.stratified_draw, "index": index}
    if name.startswith("loss-difference"):
        common = not name.endswith("independent")
        return membership.loss_difference(key, fn("base"), fn("tuned"), z0, schedule, common=common, **drawn).mean
    if name == "loss":
        found = membership.loss(key, fn("tuned"), z0, schedule, **drawn)
    elif name == "clid":
        found = membership.clid(key, fn("tuned"), fn("unconditional"), z0, schedule, **drawn)
    elif name == "secmi":
        options = {"t": settings.secmi_timestep, "interval": settings.secmi_interval}
        found = membership.secmi(fn("tuned"), z0, schedule, **options)
    elif name in ("pia", "pian"):
        options = {"timesteps": settings.pia_timesteps, "normalised": name == "pian"}
        found = membership.pia(fn("tuned"), z0, schedule, **options)
    elif name == "pfami":
        neighbours = jnp.moveaxis(part["neighbours"], 1, 0)
        options = {"timesteps": settings.pfami_timesteps, "index": index}
        found = membership.pfami(key, fn("tuned"), z0, neighbours, schedule, **options)
    else:
        context = networks["tuned"]["context"]
        options = {"timesteps": settings.gradient_timesteps, "index": index}
        predict = lambda params, z_t, t: predict_fn(params, z_t, t, rows(context, z_t))
        norms = membership.gradient_norms(key, predict, networks["tuned"]["unet"], z0, schedule, **options)
        found = jnp.linalg.norm(norms, axis=1)
    return membership.SIGN[name] * found


def _cropped(images: np.ndarray, share: float) -> np.ndarray:
    """The central part of each picture, stretched to its old size."""
    side = images.shape[1]
    margin = (side - share * side) / 2
    scale = jnp.full(2, 1 / share)
    return np.asarray(
        jnp.clip(
            jax.image.scale_and_translate(
                jnp.asarray(images), images.shape, (1, 2), scale, -margin * scale, "linear", antialias=False
            ),
            -1,
            1,
        )
    )
