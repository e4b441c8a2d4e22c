"""`dmsec protect`: pictures that look the same and are harder to learn from, and what that is worth."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from dmsec_jax import imitation, pipeline, protection, robustness, surrogates, tuning
from dmsec_jax.commands.masks import mask_of, shape_of
from dmsec_jax.commands.places import require_apart, require_free
from dmsec_jax.core import config, spread
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import read_json, sha256, write_json
from dmsec_jax.core.pgd import Budget
from dmsec_jax.data import images, originals
from dmsec_jax.data.originals import Original
from dmsec_jax.finetune import driver
from dmsec_jax.protection import Settings
from dmsec_jax.report import page
from dmsec_jax.report import protection as report
from dmsec_jax.report.protection import Protected, Protection

STRENGTHS = {"slight": 4.0, "medium": 8.0, "strong": 16.0}
"""Levels of 0..255; medium is the paper's."""
PROGRESS = "progress.json"
PICTURES, IMITATION = "pictures", "imitation"
"""Folders in `out`."""
JUDGING = (
    "out",
    "images",
    "purifiers",
    "imitation_steps",
    "imitation_recipe",
    "imitated_after",
    "holdouts",
    "batch_size",
)
"""Options that do not change the protected pictures."""
SAMPLES = 32
"""Drawn of each imitator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Change pictures slightly so that diffusion models learn less from them (AdvDM and its family)."""

    images: Path
    """Folder of pictures: PNG, JPEG, TIFF, WebP and others, of any size."""
    out: Path = Path("out/protect")
    """Where the protected pictures (`pictures`), result.json and report.html go."""
    model: Path = pipeline.EMBEDDED
    """The model to protect against: a diffusers folder, a hub id or a single file."""
    reading: tyro.conf.OmitArgPrefixes[pipeline.Reading] = pipeline.Reading()
    embeddings: tuple[Path, ...] = ()
    """Files of textual inversion, whose words the prompt may use."""
    prompt: str = "a painting"
    """What somebody would call the pictures in training."""
    strength: Literal["slight", "medium", "strong"] = "medium"
    """How much a picture may change: slight is hard to see, strong shows on smooth ground."""
    budget: float | None = None
    """The same as a number, in levels of 0..255; wins over strength."""
    norm: Literal["linf", "l2"] = "linf"
    """What the budget bounds: the change of every sample (linf), or their root mean square (l2)."""
    method: str = "advdm"
    """advdm, advdm-, sds, sds-, sdst, mist, textural, photoguard, ace, or noise (no protection: the control)."""
    scale: Literal["model", "source"] = "model"
    """Attack the picture as the model sees it, or at its own resolution; see `protection.Settings`."""
    steps: int | None = None
    """Steps of the attack; default: the method's."""
    draws: int = 1
    """Random draws averaged in a step."""
    mask: Path | None = None
    """A picture, or a folder of pictures of the same names: white where the picture may change."""
    target: Path | None = None
    """Picture that mist, textural, sdst and ace pull to; default: a checkerboard."""
    surrogate: Literal["none", "fsmg", "aspl"] = "none"
    """What is attacked: the model as it is; or the model fine-tuned on the pictures for `surrogate_steps` steps of four (fsmg); or the model as it
    learns, in alternation with the attack (aspl), which adds to every six steps of the attack six training steps of four pictures, and holds all
    pictures of one number of channels in memory at once."""
    surrogate_steps: int = 400
    """Of the fine-tuning with fsmg."""
    purifiers: tuple[str, ...] = tuple(robustness.PURIFIERS)
    """Which purifiers to try on the result."""
    imitation_steps: int = 0
    """Fine-tune the model for so many steps on the clean, the noised and the protected pictures each, and compare what they draw; a few hundred
    tell, 0 leaves it out."""
    imitation_recipe: Path | None = None
    """YAML file as `configs/finetune/*.yaml`: how the imitator fine-tunes; default: all weights of the UNet."""
    imitated_after: tuple[str, ...] = ()
    """Purifiers after which the protected pictures are fine-tuned on too."""
    holdouts: Path | None = None
    """Folder of other pictures by the same artist, which imitations are compared with; default: the pictures as they were."""
    batch_size: int = 16
    """Tiles at once; does not change the result."""
    seed: int = 0


def run(cfg: Config) -> int:
    """Protects every picture, or those that an interrupted run left, and writes the report."""
    console = Console()
    check(cfg)
    files = _files(cfg.images)
    for path in files:  # a link may lead to where its protected picture goes
        require_apart([cfg.out / PICTURES], images=path)
    sizes = {path: shape_of(path, cfg.mask) for path in files}
    for path in _files(cfg.holdouts) if cfg.holdouts else ():
        shape_of(path)
    model = pipeline.with_words(pipeline.load(cfg.model, **vars(cfg.reading)), cfg.embeddings)
    protected = protect(cfg, sizes, model, console)
    report.write(cfg.out, protected)
    console.print(report.summary(protected), markup=False, highlight=False)
    console.print(f"\nReport: {cfg.out / 'report.html'}", markup=False)
    return 0


def check(cfg: Config) -> None:
    """Raises ValueError on options that name nothing or are out of range, before anything is read."""
    settings_of(cfg)
    changes = cfg.norm == "l2" or cfg.budget is None or cfg.budget >= 1
    require(changes, "budget", "at least 1 level of the largest change", cfg.budget, "less is rounded away")
    attacks = cfg.surrogate == "none" or cfg.method != "noise"
    require(attacks, "surrogate", "none with the control", cfg.surrogate, "choose a method that attacks")
    require(cfg.surrogate_steps >= 1, "surrogate_steps", "at least 1", cfg.surrogate_steps, "raise it")
    known = ", ".join(robustness.PURIFIERS)
    for option in ("purifiers", "imitated_after"):
        for name in getattr(cfg, option):
            require(name in robustness.PURIFIERS, option, f"of {known}", repr(name), "choose some of them")
    targeted = ", ".join(name for name, method in protection.METHODS.items() if method.targeted)
    pulls = cfg.target is None or protection.METHODS[cfg.method].targeted
    require(pulls, "method", f"of {targeted} with a target", cfg.method, "leave the target out")
    for option in ("imitation_recipe", "imitated_after", "holdouts"):
        used = cfg.imitation_steps > 0 or not getattr(cfg, option)
        require(used, option, "left out where nobody imitates", getattr(cfg, option), "give --imitation-steps")
    _recipe(cfg)
    require_free(cfg.out, PICTURES, IMITATION)
    given = {"images": cfg.images, "mask": cfg.mask, "target": cfg.target, "holdouts": cfg.holdouts}
    require_apart([cfg.out / PICTURES, cfg.out / IMITATION], **given)


def protect(
    cfg: Config, sizes: dict[Path, tuple[int, int, int]], base: pipeline.Pipeline, console: Console
) -> Protection:
    """Protects the pictures whose files and shapes are given into `cfg.out`, and judges the result.

    Raises:
        ValueError: if two files would have one name, and as `protection.protect`.
    """
    stems = [path.stem for path in sizes]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    require(not twice, str(cfg.images), "free of pictures that differ in suffix only", ", ".join(twice), "rename them")
    if cfg.imitation_steps:
        tuning.check(_recipe(cfg), base.params["unet"], base.schedule)
    began, settings, files = time.monotonic(), settings_of(cfg), list(sizes)
    model = protection.model_of(base, cfg.prompt, _target(cfg.target, base.pixels))
    attacked = _fine_tuned(cfg, files, base, model, console) if cfg.surrogate == "fsmg" else model
    _protect_all(cfg, files, sizes, base, attacked, settings, console)
    spread.meet()  # process 0 writes what all read
    seconds = {"protection": time.monotonic() - began}
    began = time.monotonic()
    found = _judged(cfg, files, base, model, settings, console)
    seconds["judgement"] = time.monotonic() - began
    inputs = {**base.inputs("model"), **_inputs(cfg, files)}
    account = {"command": page.command_line(sys.argv[1:]), "config": config.to_dict(cfg), "seeds": {"seed": cfg.seed}}
    notes = (*pipeline.misfits("attacked", base), *found.notes)
    return dataclasses.replace(found, **account, seconds=seconds, inputs=inputs, notes=notes)


def _inputs(cfg: Config, files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of what the result rests on besides the model."""
    given = {"mask": cfg.mask, "target": cfg.target, **{f"picture {path.name}": path for path in files}}
    if cfg.holdouts is not None:
        given |= {f"hold-out {path.name}": path for path in _files(cfg.holdouts)}
    return {name: sha256(path) for name, path in given.items() if path is not None}


def settings_of(cfg: Config) -> Settings:
    """The settings of a command line; raises ValueError on numbers out of range."""
    levels = STRENGTHS[cfg.strength] if cfg.budget is None else cfg.budget
    require(0 <= cfg.seed < 2**32, "seed", f"from 0 to {2**32 - 1}", cfg.seed, "choose another")
    return Settings(
        method=cfg.method,
        budget=Budget(levels, "8bit"),
        norm=cfg.norm,
        num_steps=cfg.steps,
        num_draws=cfg.draws,
        scale=cfg.scale,
        batch_size=cfg.batch_size,
    )


def _recipe(cfg: Config) -> tuning.Recipe:
    """How the imitator fine-tunes."""
    require(cfg.imitation_steps >= 0, "imitation_steps", "at least 0", cfg.imitation_steps, "0 leaves it out")
    recipe = tuning.read(cfg.imitation_recipe, ())
    driver.require_chunks(recipe.chunk_steps, recipe.save_every)
    fits = cfg.imitation_steps % recipe.chunk_steps == 0
    require(fits, "imitation_steps", f"a multiple of {recipe.chunk_steps}", cfg.imitation_steps, "round it")
    return tuning.read(cfg.imitation_recipe, (f"tune.num_steps={max(1, cfg.imitation_steps)}",))


def _files(folder: Path) -> list[Path]:
    """The picture files of a folder, by name."""
    require(folder.is_dir(), str(folder), "a folder of pictures", "something else", "correct the path")
    names = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    found = [path for path in names if not images.is_document(path)]
    require(bool(found), str(folder), "a folder with at least one picture", "none", "put pictures in it")
    return found


def _target(path: Path | None, side: int) -> np.ndarray | None:
    return None if path is None else robustness.view(originals.read(path).shown, side)


def _origin(cfg: Config, base: pipeline.Pipeline, files: Sequence[Path]) -> str:
    """Digest of all that decides the pixels besides the picture itself: all of them, if the attacked model learns them."""
    chosen = {name: value for name, value in config.to_dict(cfg).items() if name not in JUDGING}
    parts = {name: path and sha256(path) for name, path in (("mask", cfg.mask), ("target", cfg.target))}
    parts["learnt"] = None if cfg.surrogate == "none" else sorted(map(sha256, files))
    return hashlib.sha256(json.dumps([chosen, base.origin, parts], sort_keys=True).encode()).hexdigest()


def output_of(out: Path, path: Path, original: Original) -> Path:
    """Where the protected picture goes: its name, with the suffix of a lossless format."""
    short = original.format == "TIFF" and path.suffix.lower() == ".tif"
    return out / PICTURES / f"{path.stem}{path.suffix if short else original.suffix}"


def _fine_tuned(cfg: Config, files, base, model: protection.Model, console: Console) -> protection.Model:
    """The model after an imitator's training on the pictures as they are."""
    views = np.stack([robustness.view(originals.read(path).shown, base.pixels) for path in files])
    with console.status(f"fine-tuning the model to attack for {cfg.surrogate_steps} steps"):
        network = surrogates.fsmg(jax.random.key(cfg.seed), base, views, _surrogate(cfg))
    return model._replace(params={**model.params, "unet": network})


def _surrogate(cfg: Config) -> surrogates.Surrogate:
    return surrogates.Surrogate(prompt=cfg.prompt, steps=cfg.surrogate_steps)


def _protect_all(cfg, files, sizes, base, model, settings: Settings, console: Console) -> None:
    """Protects what is not there yet, in groups that fill a batch; after each group the pictures and the progress file are on disk."""
    place, origin = cfg.out / PROGRESS, _origin(cfg, base, files)
    done = _done(cfg.out, origin, files)
    left = [path for path in files if path.name not in done]
    if len(left) < len(files):
        console.print(f"{len(files) - len(left)} of {len(files)} pictures are there already.", markup=False)
    counts = {
        path: len(protection.job(*_blank(sizes[path]), None, model.pixels, settings).where.corners) for path in files
    }
    batch, attack_fn = min(settings.batch_size, sum(counts.values())), None
    if cfg.surrogate == "aspl" and left:  # what one picture becomes depends on all: they are done together, or again
        left, batch = files, sum(counts.values())
        steps = {"begin_fn": protection.begin, "advance_fn": protection.advance}
        attack_fn = surrogates.aspl(base, _surrogate(cfg), **steps)
    if left:  # from here on pictures are overwritten: those of other settings must not pass for made
        write_json(place, {"origin": origin, "pictures": done})
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("protecting", total=sum(counts[path] for path in left))
        for group in groups(left, counts, sizes, batch):
            opened = [originals.read(path) for path in group]
            jobs = [
                protection.job(one.pixels, one.shown, mask_of(cfg.mask, path, one), model.pixels, settings)
                for path, one in zip(group, opened, strict=True)
            ]
            tell = lambda tiles: progress.advance(task, tiles)
            size = batch if attack_fn is None else sum(counts[path] for path in group)
            options = {"batch_size": size, "progress": tell, "attack_fn": attack_fn}
            pixels = protection.protect(jax.random.key(cfg.seed), model, jobs, settings, **options)
            for path, one, changed in zip(group, opened, pixels, strict=True):
                originals.save(output_of(cfg.out, path, one), one, changed)
                done[path.name] = sha256(path)
            write_json(place, {"origin": origin, "pictures": done})


def _done(out: Path, origin: str, files: Sequence[Path]) -> dict[str, str]:
    """Name -> SHA-256 of the pictures whose protected ones were made by an earlier run and are there."""
    place, folder = out / PROGRESS, out / PICTURES
    earlier = read_json(place) if place.exists() else {}
    if earlier.get("origin") != origin or not folder.is_dir():
        return {}
    there = {path.stem for path in folder.iterdir()}
    made = {path.name: sha256(path) for path in files if path.stem in there}
    return {name: digest for name, digest in earlier.get("pictures", {}).items() if made.get(name) == digest}


def _blank(shape) -> tuple[np.ndarray, np.ndarray]:
    empty = np.broadcast_to(np.uint8(0), shape)
    return empty, empty


def groups(files: Sequence[Path], counts, sizes, batch: int) -> list[list[Path]]:
    """Pictures of one number of channels that fill a batch of tiles together; a large one is on its own."""
    found, room = [], 0
    for path in sorted(files, key=lambda path: (sizes[path][2], path.name)):
        if found and counts[path] <= room and sizes[found[-1][-1]][2] == sizes[path][2]:
            found[-1].append(path)
        else:
            found.append([path])
            room = batch
        room -= counts[path]
    return found


def _judged(cfg: Config, files, base, model, settings: Settings, console: Console) -> Protection:
    """Reads what was written, and compares it with the originals and with random noise of the same size."""
    noise_settings = dataclasses.replace(settings, method="noise")
    key_noise, key_loss, key_purify = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), 2**31), 3)
    views, pictures, notes = {"clean": [], "protected": [], "noise": []}, [], []
    with Progress(console=console, transient=True) as progress:
        for path in progress.track(files, description="comparing"):
            original = originals.read(path)
            after = originals.read(output_of(cfg.out, path, original))
            shape = original.pixels.shape
            job = protection.job(
                original.pixels, original.shown, mask_of(cfg.mask, path, original), base.pixels, settings
            )
            (noise,) = protection.protect(key_noise, model, [job], noise_settings, batch_size=1)
            seen = {
                "clean": original.shown,
                "protected": after.shown,
                "noise": dataclasses.replace(original, pixels=noise).shown,
            }
            for name, pixels in seen.items():
                views[name].append(robustness.view(pixels, base.pixels))
            pictures.append(Protected(
                name=path.name, size=shape, file=output_of(cfg.out, path, original).name,
                change=robustness.change(original.pixels, after.pixels[..., : shape[2]]),
            ))  # fmt: skip
            notes += [f"{path.name} {note}" for note in original.notes]
        stacked = {name: np.stack(part) for name, part in views.items()}
        measure = lambda part: robustness.held_out_loss(key_loss, base, cfg.prompt, part)
        losses = {"": {name: measure(part) for name, part in stacked.items()}}
        for name in progress.track(cfg.purifiers, description="purifying"):
            purify = robustness.PURIFIERS[name].apply
            losses[name] = {kind: measure(purify(key_purify, part, base, cfg.prompt)) for kind, part in stacked.items()}
    imitations, likened = _imitated(cfg, base, stacked, key_purify, console) if cfg.imitation_steps else ({}, "")
    return Protection(
        method=cfg.method,
        budget=float(settings.budget.to("8bit")),
        norm=cfg.norm,
        scale=cfg.scale,
        model=str(base.folder.name),
        prompt=cfg.prompt,
        pictures=tuple(pictures),
        clean=stacked["clean"],
        protected=stacked["protected"],
        losses=losses,
        imitations=imitations,
        likened=likened,
        notes=(*notes, *_remarks(cfg)),
    )


def _imitated(
    cfg: Config, base: pipeline.Pipeline, views: dict[str, np.ndarray], key, console: Console
) -> tuple[dict[str, report.Imitation], str]:
    """What models draw after a fine-tuning on each kind of pictures, kept in `cfg.out` one by one; and what they are compared with."""
    kinds = {name: views[name] for name in ("clean", "noise", "protected")}
    for name in cfg.imitated_after:
        kinds[f"protected, then {name}"] = robustness.PURIFIERS[name].apply(key, views["protected"], base, cfg.prompt)
    artist, likened = views["clean"], "the pictures as they were"
    if cfg.holdouts is not None:
        shown = [originals.read(path).shown for path in _files(cfg.holdouts)]
        artist, likened = np.stack([robustness.view(one, base.pixels) for one in shown]), "other pictures by the artist"
    with console.status("fine-tuning imitators"):
        found = imitation.compare(
            cfg.seed, base, kinds, artist, cfg.prompt, _recipe(cfg), SAMPLES, folder=cfg.out / IMITATION
        )
    return {name: report.Imitation(*one) for name, one in found.items()}, likened


def _remarks(cfg: Config) -> list[str]:
    """What a reader of the losses must know of the model that was attacked."""
    if cfg.surrogate == "none":
        return []
    return [
        f"The attacked model had been fine-tuned ({cfg.surrogate}); the losses are those of the model as it was before."
    ]
