"""`python -m benchmarks.extraction`: FineXtract against its baselines over picture sets, tuners, sizes, training lengths and seeds.

Every run fine-tunes the embedded model on N0 pictures drawn at random from a set (the others are its hold-outs), then all methods sample
from the same noise with the same number of network evaluations. Guidance weights are chosen on tuning seeds that the test does not use.
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
from dmsec_jax import audit, pipeline
from dmsec_jax.audit import Subject
from dmsec_jax.commands import extract
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.data import images
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.report import extraction as report
from dmsec_jax.report.result import Row, row_over

TUNING_SEED = 1000
METHODS = extract.Settings().methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Extraction benchmark."""

    sets: tuple[str, ...] = ("openmoji",)
    """`openmoji` (shipped), or folders of pictures; all pictures below a folder are one set."""
    tuners: tuple[str, ...] = ("full", "lora")
    n0: tuple[int, ...] = (10,)
    steps: tuple[int, ...] = (200, 400, 600, 800)
    seeds: int = 5
    weights: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
    """Guidance weights tried on the tuning seed, for FineXtract and for classifier-free guidance alike."""
    scales: tuple[float, ...] = (1.1, 1.25, 1.5)
    """The same for weight extrapolation."""
    clusterings: tuple[str, ...] = ("cliques", "agglomerative")
    """Ways to group the same pictures; each has weights tuned for it."""
    evaluations: int = 200
    num_steps: int = 25
    work: Path = Path("out/bench-extraction")
    """Finished runs are kept here; an interrupted benchmark goes on."""
    set: tuple[str, ...] = ()
    """Overrides of the fine-tuning recipe."""


def main(cfg: Config) -> None:
    """Draws what is not yet in `cfg.work`, judges all of it, then writes rows, table and JSON."""
    console = Console(stderr=True)
    base = pipeline.load()
    began = time.monotonic()
    for name, tuner, n0 in itertools.product(cfg.sets, cfg.tuners, cfg.n0):
        tuning = _Training(cfg, base, name, tuner, n0, TUNING_SEED)
        cases = list(itertools.product(cfg.steps, cfg.clusterings))
        chosen = {case: _tuned_weights(cfg, tuning, *case) for case in cases}
        results = []
        for seed in range(cfg.seeds):
            training = _Training(cfg, base, name, tuner, n0, seed)
            for steps, clustering in cases:
                weights = {method: value["weight"] for method, value in chosen[steps, clustering].items()}
                found = _extract(cfg, training, steps, clustering, METHODS, weights)
                case = training.case(steps) | {"clustering": clustering}
                results += [{**dataclasses.asdict(row), "seed": seed} for row in report.rows(found, case)]
                console.print(f"{case} seed {seed}: {time.monotonic() - began:.0f} s", markup=False, highlight=False)
        notes = [
            f"{tuner}, {case[0]} steps, {case[1]}: weights tried {_shown(value)}" for case, value in chosen.items()
        ]
        console.print("\n".join(notes), markup=False, highlight=False)
        _write(cfg, results, notes, time.monotonic() - began)


def _shown(chosen: dict) -> str:
    """AS after clustering at each weight, `*` at the one taken."""
    lines = []
    for method, value in chosen.items():
        scores = (f"{w}{'*' if float(w) == value['weight'] else ''} {s:.3f}" for w, s in value["scores"].items())
        lines.append(f"{method}: {', '.join(scores)}")
    return "; ".join(lines)


def _write(cfg: Config, results: list[dict], notes: list[str], seconds: float) -> None:
    """One file per set, tuner and number of pictures, as soon as it is done."""
    rows = harness.over_seeds(results) + _differences(results)
    _print(rows)
    notes = ["intervals over seeds (Student t); differences are paired by seed", *notes]
    names = [Path(name).name for name in cfg.sets]
    settings = config.to_dict(cfg) | {"work": "", "sets": names}  # no paths of a machine
    harness.write("extraction", rows, settings, {"all": seconds}, notes)


class _Training(Training):
    """A training whose pictures are kept in `work`."""

    def __init__(self, cfg: Config, base: pipeline.Pipeline, name: str, tuner: str, n0: int, seed: int):
        super().__init__(base, name, tuner, n0, seed, cfg.steps, cfg.set)
        self.cfg = cfg

    def draw(self, steps: int, method: str, weight: float | None, evaluations: int) -> audit.Generated:
        """Pictures of one method in eight bits, as a user would keep them; drawn once, then read from `cfg.work`.

        `steps` 0 is the base model.
        """
        path = self.cfg.work / self.folder / f"{steps}_{method}_{weight or 0:g}_{evaluations}.npz"
        settings = json.dumps([self.identity(0), self.cfg.num_steps])
        if path.is_file():
            with np.load(path) as stored:
                same = str(stored["settings"]) == settings
                require(same, str(path), "of these settings", "others", "remove it or change --work")
                return audit.Generated(images.from_uint8(stored["images"]), int(stored["drawn"]), int(stored["broken"]))
        tuned = self.models[steps] if steps else self.base.params
        key = jax.random.key(self.seed)
        subject = Subject(self.base, tuned, self.prompt)
        drawn = audit.generate(key, subject, method, evaluations=evaluations, num_steps=self.cfg.num_steps, w=weight)
        eight = images.to_uint8(drawn.images)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, images=eight, drawn=drawn.drawn, broken=drawn.broken, settings=settings)
        path.with_suffix(".part").rename(path)
        return drawn._replace(images=images.from_uint8(eight))


def _tuned_weights(cfg: Config, training: _Training, steps: int, clustering: str) -> dict:
    """The guidance weights with the best AS after clustering on the tuning seed."""
    grids = {"finextract": cfg.weights, "cfg": cfg.weights, "lora-scale": cfg.scales}
    best = {}
    for method, grid in grids.items():
        scores = {}
        for weight in grid:
            found = _extract(cfg, training, steps, clustering, (method,), {method: weight})
            scores[weight] = found.main.clustered.average.value if found.main.clustered else -1.0
        best[method] = {"weight": max(scores, key=scores.get), "scores": {str(w): s for w, s in scores.items()}}
    return best


def _extract(
    cfg: Config,
    training: _Training,
    steps: int,
    clustering: str,
    methods: tuple[str, ...],
    weights: dict[str, float],
):
    """What `dmsec extract` finds in one model."""
    settings = extract.Settings(
        methods=methods,
        evaluations=cfg.evaluations,
        num_steps=cfg.num_steps,
        clustering=clustering,
        seed=training.seed,
    )

    def draw(name: str, subject: Subject, evaluations: int, label: str) -> tuple[audit.Generated, ...]:
        at = 0 if label == "base model" else steps
        return (training.draw(at, name, weights.get(name), evaluations),)

    return extract.extract(
        Subject(training.base, {}, training.prompt),  # `draw` knows the fine-tuned parameters
        training.pictures,
        training.holdout,
        settings,
        number=training.n0,
        console=Console(quiet=True),
        tuned_label=str(training.case(steps)),
        seconds={},
        config={},
        inputs={},
        draw_fn=draw,
    )


def _differences(results: list[dict]) -> list[Row]:
    """FineXtract minus each baseline in AS, paired by seed."""
    values = {}
    for row in results:
        if row["metric"] == "AS" and row["value"] is not None:
            case = json.dumps(row["case"], sort_keys=True)
            values.setdefault(case, {}).setdefault(row["method"], {})[row["seed"]] = row["value"]
    rows = []
    for case, methods in values.items():
        main = methods.get("finextract", {})
        for other in sorted(methods.keys() - {"finextract"}):
            pairs = [main[seed] - methods[other][seed] for seed in main.keys() & methods[other].keys()]
            names = {"bench": "extraction", "metric": "AS difference", "unit": "cosine", "method": "finextract"}
            if pairs:
                rows.append(row_over(seed_interval(pairs), **names, case=json.loads(case) | {"against": other}))
    return rows


def _print(rows: list[Row]) -> None:
    """AS after clustering, members beside hold-outs."""
    shown = [row for row in rows if row.metric == "AS" and row.case["stage"] == "clustered"]
    lines = [
        [
            *(str(row.case[name]) for name in ("set", "tuner", "n0", "steps", "clustering", "pictures")),
            row.method,
            harness.figure(row),
        ]
        for row in shown
    ]
    print(harness.table(["set", "tuner", "n0", "steps", "clustering", "pictures", "method", "AS [95 %]"], lines))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
