"""`python -m benchmarks.corruption`: does fine-tuning on a few pictures corrupt before it copies, and does a posterior over the weights help?

Every run fine-tunes the embedded model on N0 pictures drawn at random from a set, with and without a posterior, and lets the monitor look at it
after several numbers of steps. All methods of a seed see the same pictures, batches, and noise of samples, so differences are paired by seed.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.trained import Training
from dmsec_jax import monitoring, pipeline
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import write_atomically
from dmsec_jax.finetune.monitor import STAGES, Measures, reached
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.report.result import Row, row_over

SELECTIONS = {"full": ("norm", "linear"), "lora": ("lora-up",), "oft": ("oft",)}
"""Tuner -> what its posteriors are over; each also runs without one."""
UNITS = {
    "fidelity": "cosine of features, samples and training pictures",
    "quality": "noise level of the base model's samples over that of samples",
    "diversity": "1 - cosine of features, pairs of samples",
    "copied": "share",
    "width@0.1": "s1 in latents",
    "width@0.5": "s1 in latents",
    "drift": "mean squared difference of noise predictions",
    "dip": "largest later fall of quality",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Corruption benchmark."""

    sets: tuple[str, ...] = ("openmoji",)
    """`openmoji` (shipped), or folders of pictures, or of subjects, one of which is taken for each seed."""
    tuners: tuple[str, ...] = ("full", "lora", "oft")
    n0: tuple[int, ...] = (1, 4, 10)
    steps: tuple[int, ...] = (25, 50, 100, 200, 400, 800)
    seeds: int = 5
    samples: int = 32
    """Of each model."""
    work: Path = Path("out/bench-corruption")
    """Measures are kept here; an interrupted benchmark goes on."""
    set: tuple[str, ...] = ()
    """Overrides of the fine-tuning recipe, for example tune.learning_rate=5e-4 bayes.sigma0=0.02 (the latter for posteriors alone)."""


def main(cfg: Config) -> None:
    """Computes the measures that are not yet in `cfg.work`, then writes rows, table and JSON, one file per set, tuner and N0."""
    console = Console(stderr=True)
    base = pipeline.load()
    began = time.monotonic()
    for name, tuner, n0 in itertools.product(cfg.sets, cfg.tuners, cfg.n0):
        results = []
        for seed in range(cfg.seeds):
            for method, own in _methods(cfg, tuner).items():
                training = Training(base, name, tuner, n0, seed, cfg.steps, own)
                found = _measures(cfg, training, method, own)
                results += [row | {"seed": seed} for row in _rows(training, method, found)]
                seconds = time.monotonic() - began
                stages = ", ".join(f"{one.step} {one.stage}" for one in found)
                console.print(f"{training.folder} {method}: {stages}; {seconds:.0f} s", markup=False, highlight=False)
        rows = harness.over_seeds(results) + _differences(results)
        _print(rows)
        names = [Path(one).name for one in cfg.sets]
        settings = config.to_dict(cfg) | {"work": "", "sets": names}  # no paths of a machine
        harness.write("corruption", rows, settings, {"all": time.monotonic() - began}, NOTES)


NOTES = [
    "intervals over seeds (Student t); differences are posterior minus plain, paired by seed; one seed gives no interval",
    "features are oriented gradients of 64-pixel pictures, not CLIP or DINO; quality is a noise level, not CLIP-IQA",
    "dip takes the largest of several noisy falls, which is positive without any corruption; only its differences mean something",
]


def _methods(cfg: Config, tuner: str) -> dict[str, tuple[str, ...]]:
    """Method -> overrides of the recipe."""
    plain = tuple(one for one in cfg.set if not one.startswith("bayes."))
    return {"plain": plain} | {f"bayes-{name}": (f"bayes.selection={name}", *cfg.set) for name in SELECTIONS[tuner]}


def _measures(cfg: Config, training: Training, method: str, own: tuple[str, ...]) -> list[Measures]:
    """Those of the base model, as step 0, and of each number of steps."""
    path = cfg.work / training.folder / f"{method}.json"
    settings = [training.base.sha256, list(own), list(cfg.steps), cfg.samples]
    if path.is_file():
        stored = json.loads(path.read_text())
        require(stored["settings"] == settings, str(path), "of these settings", "others", "remove it or change --work")
        return [Measures(**one | {"widths": tuple(one["widths"])}) for one in stored["measures"]]
    key_samples, key_watch = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), 1))
    base, prompt = training.base, training.prompt
    before = pipeline.sample(key_samples, base, prompt, cfg.samples)
    watched = monitoring.watch(key_watch, base, training.pictures.images, prompt, before)
    found = [monitoring.look(watched, 0, base.params, before)]
    for step, params in sorted(training.models.items()):
        params = jax.device_put(params)
        samples = pipeline.sample(key_samples, base, prompt, cfg.samples, params=params)
        found.append(monitoring.look(watched, step, params, samples))
    stored = {"settings": settings, "measures": [one._asdict() for one in found]}
    write_atomically(path, json.dumps(stored).encode())
    return found


def _rows(training: Training, method: str, found: list[Measures]) -> list[dict]:
    """Figures of one training: those of each step, and over all steps."""
    before = found[0].noise  # of the base model's samples, the unit of quality
    rows = []

    def add(metric: str, value: float | None, unit: str, case: dict) -> None:
        names = {"bench": "corruption", "metric": metric, "unit": unit, "method": method, "case": case}
        rows.append({**names, "value": value})

    quality = []
    for one in found:
        case = training.case(one.step)
        quality.append(before / one.noise)
        values = {"fidelity": one.fidelity, "quality": quality[-1], "diversity": one.diversity, "copied": one.copied}
        values |= {"width@0.1": one.widths[0], "width@0.5": one.widths[1], "drift": one.drift}
        for metric, value in values.items():
            add(metric, value, UNITS[metric], case)
        for stage in STAGES:
            add("stage", float(one.stage == stage), "share of seeds", case | {"stage": stage})
    whole = {name: value for name, value in training.case(0).items() if name != "steps"}
    falls = np.maximum.accumulate(quality) - quality
    add("dip", float(falls.max()), UNITS["dip"], whole)
    for stage in STAGES[1:]:
        start = reached(found, stage)
        add("onset", None if start is None else float(start), "steps", whole | {"stage": stage})
    return rows


def _differences(results: list[dict]) -> list[Row]:
    """Posterior minus plain at the same seed and step."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in results:
        if row["metric"] in UNITS:
            identity = json.dumps([row["metric"], row["case"]], sort_keys=True)
            values.setdefault(identity, {}).setdefault(row["method"], {})[row["seed"]] = row["value"]
    rows = []
    for identity, methods in values.items():
        metric, case = json.loads(identity)
        plain = methods.pop("plain")
        for method, own in methods.items():
            gaps = [own[seed] - plain[seed] for seed in plain]
            names = {"bench": "corruption", "metric": f"{metric} difference", "unit": UNITS[metric], "method": method}
            rows.append(row_over(seed_interval(gaps), **names, case=case))
    return rows


def _print(rows: list[Row]) -> None:
    """Curves as a table, one line per method and number of steps."""
    shown = ("fidelity", "quality", "diversity", "copied", "width@0.1")
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row.metric in shown:
            place = (*(str(row.case[name]) for name in ("set", "tuner", "n0", "steps")), row.method)
            lines.setdefault(place, {})[row.metric] = harness.figure(row)
    print(harness.table(["set", "tuner", "n0", "steps", "method", *shown], [
        [*place, *(figures[name] for name in shown)] for place, figures in lines.items()
    ]))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
