"""`dmsec extract`: which training pictures does a fine-tuned model give away?"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress

from dmsec_jax import audit, pipeline
from dmsec_jax.audit import Subject
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.data import images
from dmsec_jax.data.images import ImageSet
from dmsec_jax.metrics import similarity
from dmsec_jax.report import extraction as report
from dmsec_jax.report import page
from dmsec_jax.report.extraction_data import Extraction
from dmsec_jax.report.training_data import Course

DrawFn = Callable[[str, Subject, int, str], audit.Generated]
"""(method, subject, evaluations, label) -> pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the audit is done; shared by `extract` and `demo`."""

    methods: tuple[str, ...] = ("finextract", "cfg", "lora-scale", "plain", "carlini")
    """The method in question first, then the baselines."""
    evaluations: int = 200
    """Network evaluations per denoising step and method: FineXtract draws half as many pictures, plain sampling as many."""
    num_steps: int = 25
    """Denoising steps (DDIM)."""
    w: float = audit.METHODS["finextract"].w
    """Guidance weight of FineXtract."""
    k: float = 0.0
    """Its correction of the text condition."""
    cfg_weight: float = audit.METHODS["cfg"].w
    """Weight of classifier-free guidance, the baseline."""
    scale: float = audit.METHODS["lora-scale"].w
    """Scale of the weight extrapolation, the baseline."""
    batch_size: int = 50
    """Pictures sampled at once; does not change the result."""
    false_match_rate: float = 0.01
    """Share of pairs of different pictures that may count as the same one; sets the threshold."""
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Extract training pictures from a fine-tuned diffusion model (FineXtract) and show which ones leaked."""

    model: Path
    """The fine-tuned model, a diffusers folder."""
    prompt: str
    """The prompt it was fine-tuned with."""
    images: Path
    """Folder of the training pictures to compare with."""
    base: Path = pipeline.EMBEDDED
    """The model that it was made from."""
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
    base, tuned = pipeline.load(cfg.base), pipeline.load(cfg.model)
    pipeline.require_same_architecture(base, tuned)
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
        inputs={"base": base.sha256, "model": tuned.sha256},
    )
    report.write(cfg.out, found, {"set": cfg.images.name, "tuner": "unknown"})
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
    course: Course | None = None,
    draw_fn: DrawFn | None = None,
) -> Extraction:
    """Runs all methods on the same noise and gathers what the report shows.

    Args:
        number: of training pictures, None if unknown.
        seconds, config, inputs: of the whole command so far; the wall time of every method is added.
        draw_fn: draws the pictures, or brings those of an earlier run; default: `audit.generate` with a progress bar.
    """
    for name in settings.methods:
        require(name in audit.METHODS, "methods", f"of {', '.join(audit.METHODS)}", repr(name), "correct the name")
    key = jax.random.key(settings.seed)
    seconds = dict(seconds)
    with Progress(console=console, transient=True) as progress:
        draw = draw_fn or _drawer(progress, settings, key, seconds)
        half = settings.evaluations // 2
        base_subject = subject._replace(tuned=subject.base.params)
        base_pictures = draw("plain", base_subject, half, "base model").images
        judge = audit.calibrated(pictures, holdout, base_pictures, settings.false_match_rate)
        methods, drawn = [], {}
        for name in settings.methods:
            source = "plain" if name == "carlini" else name  # the same pictures, clustered in another way
            if source not in drawn:
                drawn[source] = draw(source, subject, settings.evaluations, name)
            methods.append(audit.judge(name, drawn[source], judge, count=number, seed=settings.seed))
    broken = [
        f"{name}: {d.broken} of {d.drawn} pictures were not finite and left out"
        for name, d in drawn.items()
        if d.broken
    ]
    return Extraction(
        prompt=subject.prompt,
        base=str(subject.base.folder.name),
        tuned=tuned_label,
        pictures=pictures.images,
        names=pictures.names,
        holdouts=None if holdout is None else holdout.images,
        holdout_names=() if holdout is None else holdout.names,
        methods=tuple(methods),
        count_known=number is not None,
        threshold=judge.threshold,
        similarity=similarity.HOG,
        base_scores=judge.base_scores(judge.members),
        holdout_base_scores=judge.base_scores(judge.holdouts),
        course=course,
        notes=(*pictures.notes, *(() if holdout is None else holdout.notes), *broken),
        command=page.command_line(sys.argv[1:]),
        config=config,
        seeds={"seed": settings.seed},
        seconds=seconds,
        inputs={**inputs, **dict(zip((f"picture {name}" for name in pictures.names), pictures.sha256, strict=True))},
    )


def weights(settings: Settings) -> dict[str, float]:
    """Guidance weight (or scale) of the methods that have one."""
    return {"finextract": settings.w, "cfg": settings.cfg_weight, "lora-scale": settings.scale}


def _drawer(progress: Progress, settings: Settings, key, seconds: dict[str, float]) -> DrawFn:
    """A `DrawFn` with a progress bar; its wall time is kept in `seconds`."""

    def draw(name: str, subject: Subject, evaluations: int, label: str) -> audit.Generated:
        task = progress.add_task(f"sampling: {label}", total=None)
        began = time.monotonic()
        generated = audit.generate(
            key,
            subject,
            name,
            evaluations=evaluations,
            num_steps=settings.num_steps,
            w=weights(settings).get(name),
            k=settings.k if name == "finextract" else None,
            batch_size=settings.batch_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
        seconds[f"sampling: {label}"] = time.monotonic() - began
        return generated

    return draw
