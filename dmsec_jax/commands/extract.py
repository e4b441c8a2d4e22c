"""`dmsec extract`: which training pictures does a fine-tuned model give away?"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from dmsec_jax import audit, pipeline
from dmsec_jax.audit import Subject
from dmsec_jax.checkpoints import single_file
from dmsec_jax.checkpoints.unfinished import Store
from dmsec_jax.commands.places import require_apart, require_free
from dmsec_jax.core import config, spread
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import remove
from dmsec_jax.data import images
from dmsec_jax.data.images import ImageSet
from dmsec_jax.embedding import Features, features_of
from dmsec_jax.methods import finextract
from dmsec_jax.report import extraction as report
from dmsec_jax.report import page
from dmsec_jax.report.extraction_data import Extraction, Method
from dmsec_jax.report.training_data import Course

DrawFn = Callable[[str, Subject, int, str], tuple[audit.Generated, ...]]
"""(method, subject, evaluations, label) -> pictures at each of the method's `guidances`."""
UNFINISHED = "unfinished"
"""How files begin that an interrupted run leaves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the audit is done; shared by `extract` and `demo`."""

    methods: tuple[str, ...] = ("finextract", "cfg", "lora-scale", "plain", "carlini")
    """The method in question first, then the baselines."""
    evaluations: int = 200
    """Network evaluations per denoising step and method: FineXtract draws half as many pictures, plain sampling as many."""
    num_steps: int = 25
    """Denoising steps."""
    sampler: str = "ddim"
    """Of all methods: ddim, or public, the uneven steps of FineXtract's public code."""
    w: tuple[float, ...] = (audit.METHODS["finextract"].w,)
    """Guidance weight of FineXtract; several are compared, each as a method of its own."""
    k: tuple[float, ...] = (audit.METHODS["finextract"].k,)
    """Its correction of the text condition; several are tried with every weight. The first pair is the one in question."""
    cfg_weight: float = audit.METHODS["cfg"].w
    """Weight of classifier-free guidance, the baseline."""
    scale: float = audit.METHODS["lora-scale"].w
    """Scale of the weight extrapolation, the baseline."""
    batch_size: int = 50
    """Pictures sampled at once; does not change the result."""
    features: str = "hog"
    """What decides that two pictures are the same: hog (oriented gradients), or a network in your own files: sscd (made for copies), clip, dino,
    dino-last-4 (its last four layers)."""
    sscd_file: Path | None = None
    """SSCD's weights, a TorchScript file such as sscd_disc_mixup.torchscript.pt; none comes with this package."""
    preprocessing: str = "sscd-288-imagenet"
    """Of SSCD: sscd-288-imagenet, what its authors recommend, or dcr-256-224-half, what FineXtract's public code does."""
    feature_weights: Path | None = None
    """Of clip or dino: the folder of a transformers model; for DINO also its authors' file."""
    clustering: str = "cliques"
    """Of the pictures: cliques, agglomerative (fast for thousands), or public (FineXtract's public code: perhaps more groups than pictures)."""
    false_match_rate: float = 0.01
    """Share of pairs of different pictures that may count as the same one; sets the threshold."""
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Extract training pictures from a fine-tuned diffusion model (FineXtract) and show which ones leaked."""

    model: Path
    """The fine-tuned model: a diffusers folder, a hub id, a single file, or a LoRA (or LoCon, LoHa, LoKr, DoRA) for `base`."""
    prompt: str
    """The prompt it was fine-tuned with."""
    images: Path
    """Folder of the training pictures to compare with."""
    base: Path = pipeline.EMBEDDED
    """The model that it was made from: a diffusers folder, a hub id or a single file."""
    reading: tyro.conf.OmitArgPrefixes[pipeline.Reading] = pipeline.Reading()
    adapter_strength: float = 1.0
    """Of a LoRA or its relatives: 0 is the base model, 1 as trained."""
    embeddings: tuple[Path, ...] = ()
    """Files of textual inversion, whose words the prompt may use."""
    holdout: Path | None = None
    """Folder of pictures like them that were not trained on: the null that the scores are compared with."""
    number: int | None = None
    """How many training pictures there were; default: as many as are in `images`; 0: pretend not to know."""
    out: Path = Path("out/extract")
    settings: Settings = Settings()


def run(cfg: Config) -> int:
    """Writes `out/result.json`, `out/report.html` and `out/pictures`; prints the summary."""
    console = Console()
    began = time.monotonic()
    check(cfg.settings, number_known=cfg.number != 0)
    natural = cfg.number is None or cfg.number >= 0
    require(natural, "number", "0 (unknown) or more", cfg.number, "leave it out to count the pictures in images")
    require_free(cfg.out, "pictures")
    require_apart([cfg.out / "pictures"], images=cfg.images, holdout=cfg.holdout)
    base, tuned = both(cfg.base, cfg.model, cfg.reading, cfg.images, cfg.adapter_strength, cfg.embeddings)
    pictures = images.read_folder(cfg.images, base.pixels)
    holdout = images.read_folder(cfg.holdout, base.pixels) if cfg.holdout else None
    number = len(pictures) if cfg.number is None else cfg.number or None
    found = extract(
        Subject(base, tuned.params, cfg.prompt),
        pictures,
        holdout,
        cfg.settings,
        number=number,
        console=console,
        tuned_label=str(cfg.model),
        seconds={"loading": time.monotonic() - began},
        config=config.to_dict(cfg),
        inputs=base.inputs("base") | tuned.inputs("model"),
        origin=[base.origin, tuned.origin],
        notes=same_model(base, tuned),
        folder=cfg.out,
    )
    report.write(cfg.out, found, {"set": cfg.images.name, "tuner": "unknown"})
    forget(cfg.out)
    console.print(report.summary(found), markup=False, highlight=False)
    console.print(f"\nReport: {cfg.out / 'report.html'}", markup=False)
    return 0


def extract(
    subject: Subject,
    pictures: ImageSet,
    holdout: ImageSet | None,
    settings: Settings,
    *,
    number: int | None,
    console: Console,
    tuned_label: str,
    seconds: dict[str, float],
    config: dict,
    inputs: dict[str, str],
    origin: Sequence[Mapping[str, str]] = (),
    course: Course | None = None,
    notes: Sequence[str] = (),
    draw_fn: DrawFn | None = None,
    folder: Path | None = None,
) -> Extraction:
    """Runs all methods on the same noise and gathers what the report shows.

    Args:
        number: of training pictures, None if unknown.
        seconds, config, inputs: of the whole command so far; the wall time of every method is added.
        origin: of the two models, see `Pipeline.origin`, where batches are kept.
        notes: sentences on what deserves attention, known so far.
        draw_fn: draws the pictures, or brings those of an earlier run; default: `audit.sweep` with a progress bar.
        folder: where batches of pictures are kept until all is written (`forget`); the same call goes on from there.
    """
    features = check(settings, number_known=number is not None)
    holdout, overlap = images.unseen(pictures, holdout, "hold-outs")
    seen, digests = pictures.notes, pictures.inputs("picture")
    if holdout is not None:
        seen, digests = (*seen, *holdout.notes), digests | holdout.inputs("hold-out")
    seconds = dict(seconds)
    with Progress(console=console, transient=True) as progress:
        decisive = [subject.prompt, sorted(inputs.items()), *origin]
        draw = draw_fn or _drawer(progress, settings, jax.random.key(settings.seed), seconds, folder, decisive)
        base_subject = subject._replace(tuned=subject.base.params)
        (base,) = draw("plain", base_subject, settings.evaluations // 2, "base model")
        judge = audit.calibrated(pictures, holdout, base.images, settings.false_match_rate, features.embed)
        methods, broken = _methods(draw, subject, judge, settings, number)
    return Extraction(
        prompt=subject.prompt,
        base=str(subject.base.folder.name),
        tuned=tuned_label,
        pictures=pictures.images,
        names=pictures.names,
        holdouts=None if holdout is None else holdout.images,
        holdout_names=() if holdout is None else holdout.names,
        methods=methods,
        count_known=number is not None,
        threshold=judge.threshold,
        similarity=features.label,
        base_scores=judge.base_scores(judge.members),
        holdout_base_scores=judge.base_scores(judge.holdouts),
        course=course,
        notes=(*notes, *seen, *overlap, *broken, *_remarks(settings, methods[0])),
        command=page.command_line(sys.argv[1:]),
        config=config,
        seeds={"seed": settings.seed},
        seconds=seconds,
        inputs=inputs | features.inputs | digests,
    )


def both(
    base: Path, model: Path, reading: pipeline.Reading, pictures: Path, strength: float, words: Sequence[Path]
) -> tuple[pipeline.Pipeline, pipeline.Pipeline]:
    """The base model and the one that was made from it; what a single file predicts is judged by the pictures in a folder.

    A variant is the base's alone, and so is an average of weights where only the base holds one.
    """
    look = lambda side: images.read_folder(pictures, side).images
    first = pipeline.load(base, **vars(reading), pictures=look)
    of_base_alone = first.folder.is_file() and not single_file.has_average(model)
    weights = "model" if of_base_alone else reading.weights
    second = pipeline.load_tuned(model, first, strength=strength, weights=weights, allow_partial=reading.allow_partial)
    return pipeline.with_words(first, words), pipeline.with_words(second, words)


def same_model(base: pipeline.Pipeline, tuned: pipeline.Pipeline) -> list[str]:
    """Notes on parts of the two models that are equal or differ where they should not."""
    equal = lambda name: jax.tree.all(jax.tree.map(jnp.array_equal, base.params[name], tuned.params[name]))
    notes = []
    if equal("unet") and equal("text_encoder"):
        notes.append("The two models are the same: nothing was learnt, so nothing can be found.")
    if not equal("vae"):
        notes.append("The fine-tuned model has another autoencoder; pictures are decoded by that of the base model.")
    for name, loaded in (("base", base), ("fine-tuned", tuned)):
        notes += pipeline.misfits(name, loaded)
    return notes


def check(settings: Settings, *, number_known: bool = True) -> Features:
    """Refuses, before anything is computed, what cannot be done; returns the features.

    Raises:
        ValueError: on numbers out of range, unknown, repeated or missing methods or guidances, or what `audit` and `embedding` refuse.
        OSError: if the network's file cannot be opened.
    """
    least = max((audit.method_of(name).evaluations for name in settings.methods), default=1)
    counts = {"evaluations": max(least, 2), "num_steps": 1, "batch_size": 1}
    for name, low in counts.items():
        value = getattr(settings, name)
        require(value >= low, name, f"at least {low}", value, "raise it")
    rate = settings.false_match_rate
    require(0 < rate < 1, "false_match_rate", "a share between 0 and 1", rate, "for example 0.01")
    require(0 <= settings.seed < 2**32, "seed", f"from 0 to {2**32 - 1}", settings.seed, "choose another")
    some = bool(settings.methods and settings.w and settings.k)
    require(some, "methods, w and k", "at least one of each", "none", "leave the empty option out")
    for name, values in {"w": settings.w, "cfg_weight": [settings.cfg_weight], "scale": [settings.scale]}.items():
        odd = [value for value in values if not 0 < value < np.inf]
        require(not odd, name, "above 0 (1 is the fine-tuned model itself)", odd[:1], "for example 1.5")
    odd = [value for value in settings.k if not np.isfinite(value)]
    require(not odd, "k", "a finite number", odd[:1], "for example 0")
    names = [called for name in settings.methods for called in method_names(settings, name)]
    require(len(set(names)) == len(names), "methods, w and k", "different ones", ", ".join(names), "name each once")
    audit.sampler_of(settings.sampler)
    audit.require_clustering(settings.clustering, number_known=number_known)
    return features_of(settings.features, settings.sscd_file, settings.preprocessing, settings.feature_weights)


def guidances(settings: Settings, name: str) -> list[tuple[float, float]]:
    """The guidance (w, k) of a method; several where it is swept."""
    if name == "finextract":
        return list(itertools.product(settings.w, settings.k))
    method = audit.METHODS[name]
    return [({"cfg": settings.cfg_weight, "lora-scale": settings.scale}.get(name, method.w), method.k)]


def method_names(settings: Settings, name: str) -> list[str]:
    """What a method is called in the result at each of its guidances: "finextract-w1p5-km0p02" is w = 1.5, k = -0.02 of a sweep."""
    pairs = guidances(settings, name)
    spelt = lambda number: f"{number:g}".translate({ord("."): "p", ord("-"): "m", ord("+"): None})
    return [name] if len(pairs) == 1 else [f"{name}-w{spelt(w)}-k{spelt(k)}" for w, k in pairs]


def _methods(
    draw: DrawFn, subject: Subject, judge: audit.Judge, settings: Settings, number: int | None
) -> tuple[tuple[Method, ...], list[str]]:
    """Draws and judges all methods; also a sentence for each whose pictures were not all finite."""
    methods, drawn = [], {}
    for name in settings.methods:
        source = "plain" if name == "carlini" else name  # the same pictures, clustered in another way
        if source not in drawn:
            drawn[source] = draw(source, subject, settings.evaluations, name)
        settled = zip(method_names(settings, name), guidances(settings, name), drawn[source], strict=True)
        for called, (w, k), part in settled:
            options = {"count": number, "seed": settings.seed, "clustering": settings.clustering}
            found = audit.judge(name, part, judge, **options)
            if called != name:
                found = dataclasses.replace(found, name=called, label=f"{found.label}, w = {w:g}, k = {k:g}")
            methods.append(found)
    broken = [
        f"{called}: {part.broken} of {part.drawn} pictures were not finite and left out"
        for source, parts in drawn.items()
        for called, part in zip(method_names(settings, source), parts, strict=True)
        if part.broken
    ]
    return tuple(methods), broken


def _remarks(settings: Settings, main: Method) -> list[str]:
    """What a reader of the figures must know about the choices made."""
    remarks = []
    count = len(guidances(settings, "finextract"))
    if count > 1 and "finextract" in settings.methods:
        remarks.append(
            f"FineXtract was tried at {count} guidances; the verdict rests on {main.label} alone. To pick the best of them by these training "
            "pictures would overstate it: choose the weight on pictures that the verdict does not use."
        )
    if settings.features == "sscd":
        remarks.append(
            "Scores are cosines of SSCD centred on the style. The paper's are not centred, so compare none with its figures."
        )
    if settings.clustering == "public":
        remarks.append(
            "Every clique counts, as in the public code: perhaps more than there were training pictures, which raises AS and A-ESR; none if "
            "fewer pictures were drawn than there were."
        )
    return remarks


def forget(folder: Path) -> None:
    """Deletes what `extract` kept for an interrupted run, once all processes have read it."""
    spread.meet()
    for path in folder.glob(f"{UNFINISHED}.*.npz"):
        remove(path)


def _stored(folder: Path, name: str, made_from: list, numbers: range) -> finextract.Extraction | None:
    """What an earlier run kept of the pictures of these numbers, None unless all of them: its batches may have been others."""
    parts, reached = [], numbers.start
    of = lambda path: range(*map(int, path.stem.rpartition(".")[2].split("-")))
    for path in sorted(folder.glob(f"{name}.*-*.npz"), key=lambda path: of(path).start):
        there = of(path)
        stored = Store(path, made_from).read() if reached in there and reached in numbers else None
        if stored is not None:
            rows = slice(reached - there.start, numbers.stop - there.start)
            parts.append(finextract.Extraction(**{field: array[rows] for field, array in stored.items()}))
            reached += len(parts[-1].images)
    return finextract.Extraction(*map(np.concatenate, zip(*parts, strict=True))) if reached == numbers.stop else None


def _drawer(
    progress: Progress, settings: Settings, key, seconds: dict[str, float], folder: Path | None, origin: list
) -> DrawFn:
    """A `DrawFn` with a progress bar; its wall time is kept in `seconds`, its batches in `folder`."""
    decided = [settings.num_steps, settings.sampler, settings.seed, *origin]

    def kept(label: str, pairs: list, evaluations: int, numbers: range, compute) -> finextract.Extraction:
        if folder is None:
            return compute()
        name, made_from = f"{UNFINISHED}.{label.replace(' ', '-')}", [label, pairs, evaluations, *decided]
        found = _stored(folder, name, made_from, numbers)
        if found is None:
            found = compute()
            Store(folder / f"{name}.{numbers.start}-{numbers.stop}.npz", made_from).write(**found._asdict())
        return found

    def draw(name: str, subject: Subject, evaluations: int, label: str) -> tuple[audit.Generated, ...]:
        task = progress.add_task(f"sampling: {label}", total=None)
        began = time.monotonic()
        pairs = guidances(settings, name)
        try:
            generated = audit.sweep(
                key,
                subject,
                name,
                pairs,
                evaluations=evaluations,
                num_steps=settings.num_steps,
                sampler=settings.sampler,
                batch_size=settings.batch_size,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
                kept_fn=functools.partial(kept, label, pairs, evaluations),
            )
        except finextract.NoneFinite:
            if label in ("base model", settings.methods[0]):
                raise
            # a baseline that explodes is reported as such and costs the others nothing
            count = evaluations // audit.METHODS[name].evaluations
            generated = (audit.Generated(np.zeros((0, 1, 1, 3), np.float32), count, count),) * len(pairs)
        seconds[f"sampling: {label}"] = time.monotonic() - began
        return generated

    return draw
