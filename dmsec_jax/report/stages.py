"""The report of one fine-tuning done twice, plainly and with a posterior over the weights: the stages of both, side by side."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dmsec_jax.core.checks import image_batch, require
from dmsec_jax.core.types import AnyArray
from dmsec_jax.finetune import monitor
from dmsec_jax.report import page as html
from dmsec_jax.report import result, training
from dmsec_jax.report.result import Result, Row
from dmsec_jax.report.training_data import Course

UNITS = {
    "fidelity": "cosine of features, samples and training pictures",
    "diversity": "LPIPS, pairs of samples",
    "copied": "share of samples",
    "noise": "deviation of white noise in samples",
    "drift": "mean squared difference of noise predictions",
}
"""Measures that become rows."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """Fine-tunings of one base model on the same pictures, batches and noise.

    Attributes:
        base, prompt, pictures, names: as in `training.Training`.
        courses: method ("plain", "bayes") -> course with measures.
        labels: the same methods for people.
        notes, command, config, seeds, seconds, inputs: as in `result.Result`.

    Raises:
        ValueError: on no course, or one that nothing was measured in.
    """

    base: str
    prompt: str
    pictures: Float[AnyArray, "N H W 3"]
    names: tuple[str, ...]
    courses: dict[str, Course]
    labels: dict[str, str]
    notes: tuple[str, ...] = ()
    command: str
    config: dict
    seeds: dict
    seconds: dict
    inputs: dict

    def __post_init__(self):
        image_batch("pictures", self.pictures)
        measured = [bool(course.measures) for course in self.courses.values()]
        require(bool(measured) and all(measured), "courses", "measured", measured, "let the monitor look")


def headline(run: Stages) -> str:
    """What the monitor found in each, with its advice; it compares nothing that one run could not show."""
    return " ".join(f"{run.labels[name]}: {monitor.advice(course.measures)}" for name, course in run.courses.items())


CAUTION = (
    "One run each, with few samples: a stage is a test at 1 % at each look and a difference between the two runs may be chance. "
    "The benchmark python -m benchmarks.corruption compares them over seeds."
)


def rows(run: Stages, case: Mapping[str, Any]) -> tuple[Row, ...]:
    """Tidy rows of every measurement; `stage` is 1 for the stage in its case."""
    found = []
    for method, course in run.courses.items():
        for one in course.measures:
            names = {"bench": "corruption", "method": method, "n": 1}
            at = {**case, "steps": one.step}
            values = {metric: getattr(one, metric) for metric in UNITS}
            found += [Row(metric=key, value=value, unit=UNITS[key], case=at, **names) for key, value in values.items()]
            found.append(Row(metric="stage", value=1.0, unit="share", case=at | {"stage": one.stage}, **names))
    return tuple(found)


def page(run: Stages, written: Result | None = None) -> str:
    """The whole report as one HTML page; `written` adds versions, device and date."""
    pictures = [
        (name, html.picture(image, f"training picture {name}"))
        for image, name in zip(np.asarray(run.pictures), run.names, strict=True)
    ]
    parts = [(run.labels[name], training.section(course, name)) for name, course in run.courses.items()]
    return html.render(
        "stages", run=run, headline=headline(run), caution=CAUTION, pictures=pictures, parts=parts, written=written
    )


def write(folder: str | Path, run: Stages, case: Mapping[str, Any]) -> Result:
    """Writes `report.html` and, last, `result.json` into `folder`; raises OSError if one cannot be written."""
    folder = Path(folder)
    written = Result(
        method=next(iter(run.courses)),
        command=run.command,
        config=run.config,
        seeds=run.seeds,
        inputs=run.inputs,
        seconds=run.seconds,
        rows=rows(run, case),
        details={
            "prompt": run.prompt,
            "stages": {name: training.stages(course) for name, course in run.courses.items()},
            "advice": {name: monitor.advice(course.measures) for name, course in run.courses.items()},
        },
        notes=run.notes,
    )
    html.write(folder / "report.html", page(run, written))
    result.write(folder / "result.json", written)
    return written
