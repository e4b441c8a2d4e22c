"""`python -m benchmarks.corruption`: does fine-tuning on a few pictures corrupt before it copies, and does a posterior over the weights help?

Every training starts from the embedded model and N0 pictures drawn at random from a set; the monitor looks at it after several numbers of steps, and
at some of them FineXtract and a membership test attack it. All methods of a seed see the same pictures, batches, and noise of samples, so
differences are paired by seed.

The whole, five seeds each, with its cost on two cores that do nothing else, as expected from small runs:

    python -m benchmarks.corruption --sets openmoji                             30 minutes
    python -m benchmarks.corruption --sets DATA/wikiart-van-gogh                30 minutes
    python -m benchmarks.corruption --sets DATA/dreambooth --n0 3               20 minutes: too few hold-outs to attack
    python -m benchmarks.corruption --tuners full --n0 1 2 10 --arms plain bayes-linear                                 25 minutes
    python -m benchmarks.corruption --tuners full --arms plain bayes-linear --set tune.learning_rate=3e-5 --work W      10 minutes
    python -m benchmarks.corruption --tuners full --arms plain fixed-linear dropout-linear swa                          10 minutes
"""

import collections
import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.courses import Courses, Effort, Look
from benchmarks.trained import Training
from dmsec_jax import monitoring, pipeline
from dmsec_jax.core import config
from dmsec_jax.diffusion.schedule import ScheduleConfig, alpha_bars
from dmsec_jax.finetune import response
from dmsec_jax.finetune.monitor import STAGES, reached
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.report.result import Row, row_over

UNITS = {
    "fidelity": "cosine of features, samples and training pictures",
    "quality": "log of the noise that base model or pictures have over that of samples, at most 0",
    "noise": "deviation of white noise in samples",
    "diversity": "LPIPS, pairs of samples",
    "copied": "share of samples",
    "width@0.1": "s1 in latents",
    "width@0.5": "s1 in latents",
    "passed@0.1": "share of what x_t has beyond the picture that comes through, by s1",
    "drift": "mean squared difference of noise predictions",
    "AS": "cosine",
    "A-ESR@cal": "share of training pictures",
    "AUC": "share",
}
"""Figures of one model."""
CURVES = ("AS", "A-ESR@cal", "AUC", "quality", "diversity")
"""Compared at equal fidelity too."""
DEFAULT = {
    "full": ("plain", "bayes-norm", "bayes-linear"),
    "lora": ("plain", "bayes-lora-up"),
    "oft": ("plain", "bayes-oft"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Corruption benchmark."""

    sets: tuple[str, ...] = ("openmoji",)
    """`openmoji` (shipped), or folders of pictures, or of subjects, one of which is taken for each seed."""
    tuners: tuple[str, ...] = ("full", "lora", "oft")
    n0: tuple[int, ...] = (4,)
    steps: tuple[int, ...] = (25, 50, 75, 100, 150, 200)
    seeds: int = 5
    arms: tuple[str, ...] = ()
    """Of `benchmarks.courses.ARMS`; default: plain with its moving average, and the posteriors that suit the tuner."""
    effort: Effort = Effort()
    work: Path = Path("out/bench-corruption")
    """What was asked of each training is kept here; an interrupted benchmark goes on."""
    set: tuple[str, ...] = ()
    """Overrides of the fine-tuning recipe, for example tune.learning_rate=5e-4 bayes.sigma0=0.02 (the latter for posteriors alone)."""


NOTES = [
    "intervals over seeds (Student t), whose pictures can overlap; differences are posterior minus plain, paired by seed; one seed gives no interval",
    "features are oriented gradients of 64-pixel pictures, not CLIP or DINO; quality is a noise level, not CLIP-IQA",
    "dip: the pair of steps with the largest fall is found on half of the samples and the fall measured on the other half, both ways round, so that "
    "it is 0 in the mean where nothing falls",
    "at equal fidelity: mean difference of two curves over the range of fidelity that both reach, steps in between by linear interpolation",
]


def main(cfg: Config) -> None:
    """Trains what is not yet in `cfg.work`, then writes rows, table and JSON, one file per set, tuner and N0."""
    console = Console(stderr=True)
    base = pipeline.load()
    for name, tuner, n0 in itertools.product(cfg.sets, cfg.tuners, cfg.n0):
        began, results, cpu = time.monotonic(), [], collections.Counter()
        for seed in range(cfg.seeds):
            kept = tuple(one for one in cfg.set if not one.startswith("bayes."))
            training = Training(base, name, tuner, n0, seed, cfg.steps, kept)
            courses, looks = Courses(cfg.work, cfg.effort, training, cfg.set), {}
            for arm in cfg.arms or DEFAULT[tuner]:
                looks |= courses.of(arm)
                stages = ", ".join(f"{one.measures.step} {one.measures.stage}" for one in looks[arm])
                seconds = time.monotonic() - began
                console.print(f"{training.folder} {arm}: {stages}; {seconds:.0f} s", markup=False, highlight=False)
            results += [row | {"seed": seed} for row in _rows(training, looks, cfg.set)]
            cpu.update(courses.cpu)
        rows = harness.over_seeds(results) + _differences(results)
        _print(rows)
        names = [Path(one).name for one in cfg.sets]
        settings = config.to_dict(cfg) | {"work": "", "sets": names}  # no paths of a machine
        spent = "processor seconds: " + ", ".join(f"{kind} {value:.0f}" for kind, value in cpu.items())
        harness.write("corruption", rows, settings, {"all": time.monotonic() - began}, [*NOTES, spent])


def figures_of(look: Look, schedule: ScheduleConfig) -> dict[str, float | None]:
    """Figures of one model, by the names of `UNITS`."""
    found, attacked = look.measures, look.extracted or {}
    early = alpha_bars(schedule)[round(monitoring.WIDTH_TIMES[0] * (schedule.num_train_timesteps - 1))]
    return {
        "fidelity": found.fidelity,
        "quality": float(look.quality.mean()),
        "noise": found.noise,
        "diversity": found.diversity,
        "copied": found.copied,
        "width@0.1": found.widths[0],
        "width@0.5": found.widths[1],
        "passed@0.1": float(response.slope_of(found.widths[0], early)),
        "drift": found.drift,
        "AS": attacked.get("AS"),
        "A-ESR@cal": attacked.get("A-ESR@cal"),
        "AUC": look.auc,
    }


def dip(values: np.ndarray) -> float:
    """How far a curve falls from a peak to a later trough, without the bias of having looked for the deepest.

    Args:
        values: [S, K], of K samples at each of S numbers of steps.
    """
    falls = []
    for first in (0, 1):
        chosen, judged = values[:, first::2].mean(1), values[:, 1 - first :: 2].mean(1)
        gaps = np.triu(chosen[:, None] - chosen[None], 1)  # from step i to a later step j
        i, j = np.unravel_index(np.argmax(np.where(np.triu(np.ones_like(gaps), 1) > 0, gaps, -np.inf)), gaps.shape)
        falls.append(judged[i] - judged[j])
    return float(np.mean(falls))


def at_equal(fidelity: dict[str, list[float]], value: dict[str, list[float]], method: str) -> float | None:
    """Mean difference of a method's curve and plain's over the fidelities that both reach; None where they share no range.

    Args:
        fidelity, value: method -> one figure at each step.
    """
    curves = {}
    for name in (method, "plain"):
        order = np.argsort(fidelity[name])
        curves[name] = (np.array(fidelity[name])[order], np.array(value[name])[order])
    low, high = (pick(curves[n][0][end] for n in curves) for pick, end in ((max, 0), (min, -1)))
    if low >= high:
        return None
    grid = np.linspace(low, high, 21)
    ours, plain = (np.interp(grid, *curves[name]) for name in (method, "plain"))
    return float((ours - plain).mean())


def _rows(training: Training, looks: dict[str, list[Look]], overrides: tuple[str, ...]) -> list[dict]:
    """Figures of one seed: those of each step, and over all steps."""
    more = {"recipe": " ".join(overrides)} if overrides else {}
    whole = {name: value for name, value in training.case(0).items() if name != "steps"} | more
    rows, curves = [], {}

    def add(method: str, metric: str, value: float | None, unit: str, case: dict) -> None:
        names = {"bench": "corruption", "metric": metric, "unit": unit, "method": method, "case": case}
        rows.append({**names, "value": value})

    for method, course in looks.items():
        curves[method] = [figures_of(one, training.base.schedule) for one in course]
        for one, figures in zip(course, curves[method], strict=True):
            case = training.case(one.measures.step) | more
            for metric, value in figures.items():
                if value is not None:
                    add(method, metric, value, UNITS[metric], case)
            for stage in STAGES:
                add(method, "stage", float(one.measures.stage == stage), "share of seeds", case | {"stage": stage})
        for name, kind in (("quality", "quality"), ("fidelity", "likeness")):
            values = np.stack([getattr(one, kind) for one in course])
            add(method, f"{name} dip", dip(values), UNITS[name], whole)
        for figure, what in (("width", "largest s1"), ("passed", "largest share of noise that comes through")):
            first, *later = (found[f"{figure}@0.1"] for found in curves[method])
            unit = f"{what} over the base model's: at most 1 predicts no corruption"
            add(method, f"{figure}_rise@0.1", max(later) / first, unit, whole)
        for stage in STAGES[1:]:
            start = reached([one.measures for one in course[1:]], stage)  # what the base model does is no onset
            add(method, "onset", None if start is None else float(start), "steps", whole | {"stage": stage})
    for method, metric in itertools.product(curves.keys() - {"plain"}, CURVES if "plain" in curves else ()):
        both = [method, "plain"]
        known = [i for i in range(len(curves[method])) if all(curves[one][i][metric] is not None for one in both)]
        series = lambda figure, known=known, both=both: {one: [curves[one][i][figure] for i in known] for one in both}
        if len(known) > 1:
            gap = at_equal(series("fidelity"), series(metric), method)
            add(method, f"{metric} at equal fidelity", gap, UNITS[metric], whole)
    return rows


def _differences(results: list[dict]) -> list[Row]:
    """Posterior minus plain at the same seed and step."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in results:
        if row["metric"] in UNITS or row["metric"].endswith("dip"):
            identity = json.dumps([row["metric"], row["unit"], row["case"]], sort_keys=True)
            values.setdefault(identity, {}).setdefault(row["method"], {})[row["seed"]] = row["value"]
    rows = []
    for identity, methods in values.items():
        metric, unit, case = json.loads(identity)
        plain = methods.pop("plain", {})
        for method, own in methods.items():
            gaps = [own[seed] - plain[seed] for seed in plain.keys() & own.keys()]
            names = {"bench": "corruption", "metric": f"{metric} difference", "unit": unit, "method": method}
            if gaps:
                rows.append(row_over(seed_interval(gaps), **names, case=case))
    return rows


def _print(rows: list[Row]) -> None:
    """Curves as a table, one line per method and number of steps; then what goes over all steps."""
    shown = ("fidelity", "quality", "diversity", "copied", "width@0.1", "AS", "AUC")
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row.metric in shown:
            place = (*(str(row.case[name]) for name in ("set", "tuner", "n0", "steps")), row.method)
            lines.setdefault(place, {})[row.metric] = harness.figure(row)
    print(harness.table(["set", "tuner", "n0", "steps", "method", *shown], [
        [*place, *(figures.get(name, "") for name in shown)] for place, figures in lines.items()
    ]))  # fmt: skip
    over = [row for row in rows if "steps" not in row.case]
    print(harness.table(["method", "over all steps", "stage", "value"], [
        [row.method, row.metric, str(row.case.get("stage", "")), harness.figure(row)] for row in over
    ]))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
