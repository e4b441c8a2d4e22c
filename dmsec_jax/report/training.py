"""The report of a fine-tuning: loss and samples along the way, as a page of its own or as a section of another."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from dmsec_jax.core.checks import image_batch, require
from dmsec_jax.core.types import AnyArray
from dmsec_jax.data.images import save_png
from dmsec_jax.finetune import monitor
from dmsec_jax.report import page as html
from dmsec_jax.report import plots, result
from dmsec_jax.report.result import Result, Row
from dmsec_jax.report.training_data import Course, Sheet

__all__ = ["Course", "Sheet", "Training", "page", "result_of", "section", "stages", "write"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A whole fine-tuning.

    Attributes:
        base: label of the model it started from.
        tuner: what was trained, for people, for example "LoRA of rank 64, 1.2 M parameters".
        prompt: the caption of the pictures.
        pictures, names: the training pictures [N, H, W, 3] in [-1, 1].
        course: loss and samples.
        notes, command, config, seeds, seconds, inputs: as in `result.Result`.

    Raises:
        ValueError: on pictures out of range, or names that do not fit them.
    """

    base: str
    tuner: str
    prompt: str
    pictures: Float[AnyArray, "N H W 3"]
    names: tuple[str, ...]
    course: Course
    notes: tuple[str, ...] = ()
    command: str
    config: dict
    seeds: dict
    seconds: dict
    inputs: dict

    def __post_init__(self):
        image_batch("pictures", self.pictures)
        fits = f"{len(self.pictures)} pictures, {len(self.names)} names"
        require(len(self.pictures) == len(self.names), "pictures", "named one by one", fits, "give one name for each")


def stages(course: Course) -> list[dict[str, Any]]:
    """Its measures with the stage that each stands for, as JSON values."""
    return [found._asdict() | {"stage": found.stage} for found in course.measures]


def section(course: Course, prefix: str = "") -> Markup:
    """Loss curve, measures and sample sheets as a fragment for another page; `prefix` keeps several on one page apart."""
    sheets = [
        (sheet.step, html.tiles(sheet.samples, f"sample after {sheet.step} steps"))
        for sheet in course.sheets
        if len(sheet.samples)
    ]
    curve = plots.curve(course.loss, course.first_step, f"{prefix}curve") if len(course.loss) else None
    trends = plots.trends(course.measures, f"{prefix}trend") if len(course.measures) > 1 else []
    advice = monitor.advice(course.measures)
    return Markup(html.render("course", course=course, curve=curve, sheets=sheets, trends=trends, advice=advice))


def page(training: Training, written: Result | None = None) -> str:
    """The whole report as one HTML page; `written` adds versions, device and date."""
    pictures = [
        html.picture(image, f"training picture {name}")
        for image, name in zip(np.asarray(training.pictures), training.names, strict=True)
    ]
    named = list(zip(training.names, pictures, strict=True))
    return html.render("training", run=training, pictures=named, course=section(training.course), written=written)


def result_of(training: Training, method: str, case: Mapping[str, Any], pictures: Mapping[str, str]) -> Result:
    """What goes into `result.json`: the loss at the end as a row, the whole course in `details`.

    Args:
        method: name of the tuner, for example "lora".
        case: settings that identify the run.
        pictures: path -> what it shows.
    """
    course = training.course
    names = {"bench": "finetune", "metric": "loss", "unit": "mean squared error", "method": method, "case": dict(case)}
    return Result(
        method=method,
        command=training.command,
        config=training.config,
        seeds=training.seeds,
        inputs=training.inputs,
        seconds=training.seconds,
        rows=(Row(value=course.last_loss, n=1, **names),),
        pictures=dict(pictures),
        details={
            "prompt": training.prompt,
            "first_step": course.first_step,
            "loss": course.loss,
            "stages": stages(course),
            "advice": monitor.advice(course.measures),
        },
        notes=training.notes,
    )


def write(folder: str | Path, training: Training, method: str, case: Mapping[str, Any]) -> Result:
    """Writes sample sheets, `report.html` and, last, `result.json` into `folder`; each file whole or not at all.

    Raises:
        OSError: if a file cannot be written, for instance because the disk is full.
    """
    folder = Path(folder)
    made = {}
    for sheet in training.course.sheets:
        if len(sheet.samples):
            name = f"pictures/samples-{sheet.step:06d}.png"
            save_png(folder / name, html.contact(sheet.samples, 10))
            made[name] = f"samples after {sheet.step} steps"
    written = result_of(training, method, case, made)
    html.write(folder / "report.html", page(training, written))
    result.replace(folder, written)
    return written
