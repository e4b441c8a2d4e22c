"""Floor 6, protection: AdvDM and its family on pictures of any size, as pixels that keep the budget exactly.

A picture is cut into overlapping tiles of the model's size, either at its own resolution or after it was reduced so that its shorter side is the
model's; all tiles are attacked together; their changes are blended, brought to the picture's size, added to the original pixels, rounded and
brought back into the budget.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from dmsec_jax import pipeline
from dmsec_jax.core import pgd, spread
from dmsec_jax.core.checks import require
from dmsec_jax.core.pgd import Budget
from dmsec_jax.core.types import Latent, Params
from dmsec_jax.data import rounding, tiles
from dmsec_jax.data.images import from_uint8
from dmsec_jax.diffusion import draws
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.methods import advdm
from dmsec_jax.pipeline import Pipeline

PUBLIC_ENTRIES = 64 * 64 * 4
"""Latent entries of the model that Mist's rate was chosen for: it weighs a mean against a sum over entries."""
CHUNK = 10
"""Steps in one compiled call, between which progress is told."""
Rows = dict[str, np.ndarray | jax.Array]
"""Tiles, "image" [N, side, side, C] in [-1, 1], and what belongs to each: "mask", "radius", "index"."""
AttackFn = Callable[..., tuple[jax.Array]]


class Method(NamedTuple):
    """A way to protect."""

    label: str
    description: str
    objective_fn: advdm.ObjectiveFn | None
    """None changes pictures at random: the control."""
    cfg: advdm.Config
    targeted: bool = False
    """Whether the objective pulls to the latent of a target picture; others get zeros."""


METHODS = {
    "advdm": Method("AdvDM", "raises the denoising loss, through network and encoder", advdm.denoising, advdm.ADVDM),
    "advdm-": Method("AdvDM(-)", "lowers the denoising loss", advdm.denoising_descent, advdm.ADVDM),
    "sds": Method("SDS(+)", "AdvDM without the pass back through the network", advdm.distillation, advdm.SDS),
    "sds-": Method("SDS(-)", "the same, descending", advdm.distillation_descent, advdm.SDS),
    "sdst": Method("SDST(-)", "SDS(-) and a pull to a target", advdm.distillation_targeted, advdm.SDS, True),
    "mist": Method("Mist", "AdvDM and a pull of the latent to a target", advdm.fused, advdm.MIST, True),
    "textural": Method("Mist, textural", "a pull of the latent to a target", advdm.textural, advdm.MIST, True),
    "photoguard": Method("PhotoGuard, encoder", "a pull of the latent to zero", advdm.encoder, advdm.PHOTOGUARD),
    "ace": Method("ACE", "a pull of the predicted noise to a target", advdm.score, advdm.ACE, True),
    "noise": Method("random noise", "no attack: a random change of the same size, the control", None, advdm.ADVDM),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are protected.

    Attributes:
        method: one of `METHODS`.
        budget: largest change of a sample (linf), or root mean square of the changes of a picture (l2).
        num_steps: None takes the method's.
        num_draws: of (timestep, noise) per step.
        scale: "model" attacks the picture as a model sees it and enlarges the change, which then survives that a trainer reduces the picture;
            "source" attacks it at its own resolution.
        overlap: share of a tile's side that neighbours have in common.
        batch_size: tiles at once; does not change the result.
    """

    method: str = "advdm"
    budget: Budget = Budget(8.0, "8bit")
    norm: pgd.Norm = "linf"
    num_steps: int | None = None
    num_draws: int = 1
    scale: Literal["model", "source"] = "model"
    overlap: float | int = 0.25
    batch_size: int = 16

    def __post_init__(self):
        require(
            self.method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(self.method), "choose one of them"
        )
        levels = self.budget.to("8bit")
        require(0 < levels <= 255, "budget", "more than 0 and at most 255 levels", levels, "take for example 8")
        counts = {"num_draws": self.num_draws, "batch_size": self.batch_size, "num_steps": self.steps}
        for name, count in counts.items():
            require(count >= 1, name, "at least 1", count, "raise it")
        require(0 <= self.overlap < 1, "overlap", "in [0, 1)", self.overlap, "take for example 0.25")

    @property
    def steps(self) -> int:
        """Of the attack."""
        return METHODS[self.method].cfg.attack.num_steps if self.num_steps is None else self.num_steps


class Model(NamedTuple):
    """The model that pictures are protected against, as functions; `params` holds its prompt's context too."""

    encode_fn: advdm.EncodeFn
    eps_fn: advdm.EpsFn
    params: Params
    schedule: ScheduleConfig
    pixels: int
    target: Latent
    """Of the target picture [1, h, w, c]."""


class Job(NamedTuple):
    """A picture and how it is cut."""

    pixels: UInt8[np.ndarray, "H W C"]
    """To be changed."""
    shown: UInt8[np.ndarray, "H W C"]
    """The same as models see it: on white."""
    mask: Bool[np.ndarray, "H W 1"]
    size: tuple[int, int]
    """Height and width at which it is attacked."""
    where: tiles.Layout


def model_of(base: Pipeline, prompt: str, target: Float[np.ndarray, "H W 3"] | None = None) -> Model:
    """The functions of a pipeline with one prompt; text and target are encoded here, once.

    Args:
        target: picture of the model's size in [-1, 1] that targeted methods pull to; default: a black-and-white checkerboard.
    """
    eps_fn, params = pipeline.single(base, base.params["unet"], pipeline.contexts(base, [prompt]))
    picture = checks(base.pixels) if target is None else target
    mean, _ = pipeline.encode(base, picture[None])
    encode_fn = _encoder(base.functions.encode_fn)
    return Model(encode_fn, eps_fn, {**params, "vae": base.params["vae"]}, base.schedule, base.pixels, mean)


def checks(side: int, count: int = 8) -> Float[np.ndarray, "side side 3"]:
    """A checkerboard of `count` fields a side, in [-1, 1]."""
    field = np.arange(side) * count // side
    board = (field[:, None] + field[None]) % 2 * 2 - 1
    return np.repeat(board[..., None], 3, axis=-1).astype(np.float32)


def job(pixels: np.ndarray, shown: np.ndarray, mask: np.ndarray | None, side: int, settings: Settings) -> Job:
    """Lays tiles of `side` pixels over a picture; without a mask all of it may change."""
    height, width = pixels.shape[:2]
    size = (height, width)
    if settings.scale == "model":
        factor = side / min(size)
        size = tuple(max(side, round(length * factor)) for length in size)
    where = tiles.layout(*size, side, min(round(settings.overlap * side), side - 1))
    return Job(pixels, shown, np.ones((height, width, 1), bool) if mask is None else mask, size, where)


def protect(
    key,
    model: Model,
    jobs: Sequence[Job],
    settings: Settings,
    *,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda tiles: None,
    attack_fn: AttackFn | None = None,
) -> list[UInt8[np.ndarray, "H W C"]]:
    """The protected pixels of each picture; results do not depend on what else is in the batch.

    Args:
        jobs: pictures of one number of channels.
        batch_size: tiles at once, `settings.batch_size` by default; a batch is always as large, filled up, so that one program serves all.
        progress: called with the number of tiles that were finished since, as a fraction while a batch is under way.
        attack_fn: in place of `attack`, with its arguments and result.

    Raises:
        ValueError: if the attack diverged.
    """
    parts = [_rows(one, settings) for one in jobs]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    size, count = batch_size or settings.batch_size, len(rows["index"])
    filled = np.minimum(
        np.arange(max(size, count)), count - 1
    )  # `pipeline.batched` fills up all batches but a short first one
    rows = {name: part[filled] for name, part in rows.items()}
    share = count / (-(-len(filled) // size) * size)
    run = functools.partial(attack_fn or attack, key, model, settings, lambda tiles: progress(tiles * share))
    found = np.concatenate([np.asarray(delta) for (delta,) in pipeline.batched(run, rows, size)])[:count]
    ends = np.cumsum([len(part["index"]) for part in parts])
    changes = np.split(found, ends[:-1])
    return [_apply(one, delta, settings) for one, delta in zip(jobs, changes, strict=True)]


def _rows(one: Job, settings: Settings) -> Rows:
    """Tiles with all that belongs to them; `radius` in [-1, 1] units, `index` names a tile whatever batch it is in."""
    shown = from_uint8(_resized(one.shown, one.size, Image.Resampling.LANCZOS))
    inside = _resized(one.mask.astype(np.float32), one.size, Image.Resampling.BOX) > 0
    cut, masks = tiles.cut(shown, one.where), tiles.cut(inside.astype(np.float32), one.where)
    radius = np.full(len(cut), settings.budget.to("pm1"), np.float32)
    if settings.norm == "l2":
        radius = radius * np.sqrt(masks.sum(axis=(1, 2, 3)) * cut.shape[-1]).astype(np.float32)
    index = (zlib.crc32(one.pixels.tobytes()) + np.arange(len(cut), dtype=np.int64) * 104729) % 2**31
    return {"image": cut, "mask": masks, "radius": radius, "index": index.astype(np.int32)}


def attack(key, model: Model, settings: Settings, progress, rows: Rows) -> tuple[jax.Array]:
    """delta of a batch of tiles; the control where the method has no objective."""
    count = len(rows["index"])
    if METHODS[settings.method].objective_fn is None:
        progress(count)
        cfg = _config(settings, model, rows["radius"])
        return (_control(key, rows["image"], rows["mask"], rows["index"], cfg),)
    state = begin(key, model, settings, rows)
    for done in range(0, settings.steps, CHUNK):
        steps = min(CHUNK, settings.steps - done)
        state = advance(key, model, settings, rows, state, steps)
        progress(count * steps / settings.steps)
    return (state.attack.delta,)


def begin(key, model: Model, settings: Settings, rows: Rows) -> advdm.State:
    """The attack on a batch of tiles before its first step."""
    key_start = jax.random.fold_in(key, settings.steps)
    return _init(key_start, rows["image"], rows["mask"], rows["index"], _config(settings, model, rows["radius"]))


def advance(key, model: Model, settings: Settings, rows: Rows, state: advdm.State, num_steps: int) -> advdm.State:
    """`num_steps` on from a state, whose buffers are reused.

    Raises:
        ValueError: if a gradient is not finite.
    """
    method, cfg = METHODS[settings.method], _config(settings, model, rows["radius"])
    target = model.target if method.targeted else jnp.float32(0)
    options = {"encode_fn": model.encode_fn, "eps_fn": model.eps_fn, "schedule": model.schedule}
    options |= {"objective_fn": method.objective_fn, "draw_fn": draws.stratified_draw, "num_steps": num_steps}
    state, info = _advance(key, state, rows["image"], rows["mask"], target, model.params, cfg, **options)
    finite = bool(jax.device_get(info.finite).all())
    done = int(state.attack.i)
    require(finite, "gradient", "finite", f"NaN at step {done}", "check the model and the picture")
    return state


def _config(settings: Settings, model: Model, radius) -> advdm.Config:
    """The method's settings at another budget: steps are the same share of it."""
    method = METHODS[settings.method]
    public = method.cfg.attack
    share = public.step_size.to("pm1") / public.budget.to("pm1")
    attack = dataclasses.replace(
        public,
        budget=Budget(radius, "pm1"),
        step_size=Budget(radius * share, "pm1"),
        num_steps=settings.steps,
        norm=settings.norm,
    )
    rate = method.cfg.rate
    if method.objective_fn is advdm.fused:
        rate *= float(np.prod(model.target.shape[1:])) / PUBLIC_ENTRIES
    steps = model.schedule.num_train_timesteps
    return dataclasses.replace(method.cfg, attack=attack, num_draws=settings.num_draws, t_max=steps, rate=rate)


def _apply(one: Job, deltas: np.ndarray, settings: Settings) -> np.ndarray:
    """The original pixels with the blended change, in 8 bit and within the budget."""
    blended = tiles.blend(deltas * np.float32(127.5), one.where)
    change = _resized(blended, one.pixels.shape[:2], Image.Resampling.BILINEAR)
    budget = settings.budget
    if settings.norm == "l2":
        samples = int(one.mask.sum()) * one.pixels.shape[-1]
        budget = Budget(budget.to("8bit") * float(np.sqrt(samples)), "8bit")
    return rounding.apply_change(one.pixels, change, budget, settings.norm, one.mask)


def _resized(image: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    """[H, W, C] of uint8 or float32 at another size, channel by channel."""
    if image.shape[:2] == tuple(size):
        return image
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
    return np.stack([np.asarray(channel.resize(size[::-1], how)) for channel in channels], axis=-1)


@functools.cache
def _encoder(encode_fn):
    """One object per architecture, so that compiled programs are shared; grey is shown to the encoder as three equal channels."""
    return lambda params, image: encode_fn(params["vae"], jnp.broadcast_to(image, (*image.shape[:3], 3)))


@jax.jit
def _init(key, image, mask, index, cfg):
    return spread.whole(advdm.init(key, *spread.even((image, mask, index, cfg))))


@jax.jit
def _control(key, image, mask, index, cfg):
    return spread.whole(advdm.control(key, *spread.even((image, mask, index, cfg))))


@functools.partial(
    jax.jit,
    static_argnames=("num_steps", "objective_fn", "encode_fn", "eps_fn", "schedule", "draw_fn"),
    donate_argnames="state",
)
def _advance(key, state, image, mask, target, params, cfg, **options):
    state, image, mask, cfg = spread.even((state, image, mask, cfg))
    return spread.whole(advdm.advance(key, state, image, mask, target, params, cfg, **options))
