"""`dmsec demo`: the whole story. Fine-tune the embedded model on ten pictures, extract them again, tell that they were used, see what
protecting them is worth, and watch the stages of the fine-tuning with and without a posterior over the weights: one page for each."""

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path

import jax
from rich.console import Console

from dmsec_jax import pipeline, tuning
from dmsec_jax.audit import Subject
from dmsec_jax.commands import authenticate, extract, finetune, masks, protect, stages
from dmsec_jax.commands.extract import Settings
from dmsec_jax.commands.places import require_apart
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import sha256
from dmsec_jax.data import images
from dmsec_jax.data.images import ImageSet
from dmsec_jax.finetune.progress import progress_bar
from dmsec_jax.report import authentication as authentication_report
from dmsec_jax.report import extraction as report
from dmsec_jax.report import protection as protection_report
from dmsec_jax.report import stages as stages_report
from dmsec_jax.report.authentication_verdict import verdict
from dmsec_jax.tuning import Recipe

PICTURES = pipeline.EMBEDDED.parent / "openmoji-animals"
TRAINED = 10
"""Pictures trained on, by default."""
PURIFIERS = ("jpeg", "blur", "autoencoder", "noisy-upscaling")
"""Tried on the protected pictures: two for everybody, two that take the model."""
FOLDERS = ("model", "pictures", "authentication", "protection", "stages")
"""What `out` holds."""
IMITATION_STEPS = 200
"""Of each fine-tuning on clean, noised and protected pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a model on a few pictures by an artist it has never seen, extract them from it, test whether they were used, protect them, and
    watch the stages of the fine-tuning, with a posterior over the weights too (about five minutes on two cores)."""

    images: Path | None = None
    """Your own pictures; default: animals by OpenMoji, which the embedded model has never seen."""
    holdout: Path | None = None
    """Pictures like yours that are not to be trained on; default: further OpenMoji animals if `images` is not given."""
    prompt: str | None = None
    """Prompt to fine-tune and sample with; default: one that fits the pictures."""
    number: int | None = None
    """How many pictures of the folder are trained on, the first by name; the others become hold-outs if no folder of such is given. Default: at
    most ten, and two thirds of the folder if there are no other hold-outs: without any, nothing can be concluded."""
    model: Path = pipeline.EMBEDDED
    """Model to start from."""
    recipe: Path | None = None
    """YAML of `configs/finetune`; default: full fine-tuning."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe, for example tune.num_steps=400."""
    out: Path = Path("out/demo")
    settings: Settings = Settings()
    """Of the extraction."""
    compared: int = 20
    """How many hold-outs the authentication compares with, at most; 0 leaves it out."""
    membership: authenticate.Settings = authenticate.Settings()
    """Settings of the authentication."""
    protected: int = 6
    """How many of the pictures are protected, at most; 0 leaves it out."""
    looks: int = 6
    """How often the monitor looks at the fine-tuning, and at a second one with a posterior over the weights; 0 leaves both out."""


def run(cfg: Config) -> int:
    """Writes `out/model`, `out/result.json`, `out/report.html`, pictures, and results and reports in `out/authentication` and `out/protection`;
    prints a one-screen summary."""
    console = Console()
    began = time.monotonic()
    extract.check(cfg.settings)
    authenticate.check(authenticate.DEFAULT, cfg.membership)
    finetune.check_out(cfg.out, FOLDERS, cfg.model)
    chosen = tuning.read(cfg.recipe, cfg.set)
    written = [cfg.out / name / "pictures" for name in ("", "authentication", "protection")]
    require_apart(written, images=cfg.images, holdout=cfg.holdout)
    base = pipeline.load(cfg.model)
    tuning.check(chosen, base.params["unet"], base.schedule)
    pictures, holdout = _pictures(cfg, base.pixels)
    prompt = cfg.prompt or ("an openmoji icon of an animal" if cfg.images is None else "a picture in sks style")
    console.print(f"Fine-tuning on {len(pictures)} pictures: {prompt!r}", markup=False)
    key_tune, key_sample = jax.random.split(jax.random.key(cfg.settings.seed))
    seconds = {"loading": time.monotonic() - began}
    watched = stages.watch(key_sample, base, pictures, prompt, max(cfg.looks, 1))
    tuned, course = _tune(key_tune, watched, pictures, chosen, console)
    if not tuned.finished:
        console.print("Interrupted before the fine-tuning ended; nothing was written.")
        return 130
    pipeline.save(cfg.out / "model", dataclasses.replace(base, params=tuned.params), "float16")
    found = extract.extract(
        Subject(base, tuned.params, prompt),
        pictures,
        holdout,
        cfg.settings,
        number=len(pictures),
        console=console,
        tuned_label=f"{base.folder.name}, fine-tuned on {len(pictures)} pictures for {chosen.tune.num_steps} steps",
        seconds={**seconds, "fine-tuning": tuned.seconds},
        config=config.to_dict(cfg) | {"recipe": config.to_dict(chosen)},
        inputs={**base.inputs("base"), "model": sha256(cfg.out / "model")},
        course=course,
    )
    name = PICTURES.name if cfg.images is None else cfg.images.name
    case = {"set": name, "tuner": tuning.tuner_of(chosen), "steps": chosen.tune.num_steps}
    compared = holdout is not None and cfg.compared > 0
    wanted = {"authentication": compared, "protection": cfg.protected > 0, "stages": cfg.looks > 0}
    others = [name for name, is_wanted in wanted.items() if is_wanted]
    links = tuple(f"The {name} of these pictures: {name}/report.html, {name}/result.json." for name in others)
    report.write(cfg.out, dataclasses.replace(found, notes=(*found.notes, *links)), case)
    headlines = []
    if compared:
        some = images.split(holdout, cfg.compared)[0]
        subject = Subject(base, tuned.params, prompt)
        headlines.append(_authenticate(cfg, subject, pictures, some, found, case, console))
    if cfg.protected > 0:
        headlines.append(_protect(cfg, base, prompt, pictures, console))
    if cfg.looks > 0:
        headline = _stages(cfg, key_tune, watched, pictures, chosen, course, found, case, console)
        if headline is None:
            console.print("Interrupted before the fine-tuning with a posterior ended; its page was not written.")
            return 130
        headlines.append(headline)
    console.print(report.summary(found), *headlines, sep="\n\n", markup=False, highlight=False)
    pages = [cfg.out / name / "report.html" for name in ("", *others)]
    console.print(f"\n{time.monotonic() - began:.0f} s in all. Open {' and '.join(map(str, pages))}", markup=False)
    return 0


def _tune(key, watched: stages.Watch, pictures: ImageSet, recipe: Recipe, console: Console):
    """`stages.tune` with a progress bar."""
    per_step = recipe.tune.batch_size * recipe.tune.accumulation
    with progress_bar(recipe.tune.num_steps, per_step, console) as bar:
        return stages.tune(key, watched, pictures, recipe, bar)


def _stages(cfg: Config, key, watched, pictures, chosen: Recipe, course, extracted, case, console) -> str | None:
    """Fine-tunes once more with a posterior, unless there was one, writes the page on both and returns its headline; None if interrupted."""
    first, began = "plain" if chosen.bayes is None else "bayes", time.monotonic()
    courses = {first: course}
    labels = {first: "Plain fine-tuning" if first == "plain" else "Fine-tuning with the recipe's posterior"}
    if chosen.bayes is None:
        recipe = stages.with_posterior(chosen)
        console.print("Fine-tuning once more, with a posterior over the weights")
        tuned, courses["bayes"] = _tune(key, watched, pictures, recipe, console)
        if not tuned.finished:
            return None
        selection = recipe.bayes.selection
        over = selection if isinstance(selection, str) else " ".join(selection)
        labels["bayes"] = f"With a posterior over the weights ({over})"
    run = stages_report.Stages(
        base=extracted.base,
        prompt=extracted.prompt,
        pictures=pictures.images,
        names=pictures.names,
        courses=courses,
        labels=labels,
        notes=watched.monitor.sight.notes,
        command=extracted.command,
        config=extracted.config,
        seeds=extracted.seeds,
        seconds={"fine-tuning with a posterior": time.monotonic() - began},
        inputs={"base": extracted.inputs["base"]},
    )
    stages_report.write(cfg.out / "stages", run, {**case, "n0": len(pictures)})
    return stages_report.headline(run)


def _authenticate(cfg: Config, subject, pictures, holdout, extracted, case, console) -> str:
    """Writes the page on membership and returns its headline."""
    folder = cfg.out / "authentication"
    found = authenticate.authenticate(
        subject,
        pictures,
        holdout,
        authenticate.DEFAULT,
        cfg.membership,
        seed=cfg.settings.seed,
        console=console,
        folder=folder,
        tuned_label=extracted.tuned,
        seconds={},
        config=extracted.config,
        inputs={name: extracted.inputs[name] for name in ("base", "model")},
    )
    authentication_report.write(folder, found, {**case, "n0": len(pictures)})
    return verdict(found).headline


def _protect(cfg: Config, base: pipeline.Pipeline, prompt: str, pictures: ImageSet, console: Console) -> str:
    """Protects some of the pictures against the model as it was before the fine-tuning, writes the page and returns its headline."""
    chosen = protect.Config(
        images=cfg.images or PICTURES / "member",
        out=cfg.out / "protection",
        model=cfg.model,
        prompt=prompt,
        purifiers=PURIFIERS,
        imitation_steps=IMITATION_STEPS,
        seed=cfg.settings.seed,
    )
    sizes = {}
    for path in {Path(name).stem: chosen.images / name for name in pictures.names}.values():
        with contextlib.suppress(ValueError):  # an animation can be trained on but not protected
            sizes[path] = masks.shape_of(path)
    sizes = dict(itertools.islice(sizes.items(), cfg.protected))
    require(bool(sizes), str(chosen.images), "a folder of pictures to protect", "none", "set protected to 0")
    found = protect.protect(chosen, sizes, base, console)
    protection_report.write(chosen.out, found)
    return f"{protection_report.headline(found)} {protection_report.imitation_headline(found)}"


def _pictures(cfg: Config, pixels: int) -> tuple[ImageSet, ImageSet | None]:
    """Training pictures and hold-outs."""
    folder = cfg.images or PICTURES / "member"
    everything = images.read_folder(folder, pixels)
    apart = cfg.holdout or (PICTURES / "holdout" if cfg.images is None else None)
    number = cfg.number
    if number is None:
        number = TRAINED if apart else min(TRAINED, -(-2 * len(everything) // 3))
    require(number >= 1, "number", "at least 1", number, "train on one picture or more")
    pictures, rest = images.split(everything, number)
    return pictures, images.read_folder(apart, pixels) if apart else rest
