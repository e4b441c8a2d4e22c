"""`python -m benchmarks.extraction`: FineXtract against its baselines over picture sets, tuners, sizes, training lengths and seeds.

Every run fine-tunes the embedded model on N0 pictures drawn at random from a set (the others are its hold-outs), then all methods sample
from the same noise with the same number of network evaluations. Guidance weights are chosen on tuning seeds that the test does not use.
"""

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from dmsec_jax import pipeline
from dmsec_jax.audit import Subject
from dmsec_jax.commands import extract, finetune
from dmsec_jax.commands.demo import PICTURES
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.data import images
from dmsec_jax.data.images import ImageSet
from dmsec_jax.finetune import dreambooth
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.report import extraction as report
from dmsec_jax.report.result import Row, row_over

TUNING_SEED = 1000
LORA = ("lora.rank=64", "lora.alpha=64", "lora.targets=attention+ff+conv", "tune.learning_rate=0.001")


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
    evaluations: int = 200
    num_steps: int = 25
    work: Path = Path("out/bench-extraction")
    """Finished runs are kept here; an interrupted benchmark goes on."""
    set: tuple[str, ...] = ()
    """Overrides of the fine-tuning recipe."""


def main(cfg: Config) -> None:
    """Runs what is not yet in `cfg.work`, then writes rows, table and JSON."""
    console = Console(stderr=True)
    base = pipeline.load()
    began = time.monotonic()
    training = functools.lru_cache(maxsize=1)(functools.partial(_training, cfg, base))
    results = []
    for name, tuner, n0 in itertools.product(cfg.sets, cfg.tuners, cfg.n0):
        cases = [{"set": Path(name).name, "tuner": tuner, "n0": n0, "steps": steps} for steps in cfg.steps]
        tune = lambda case, name=name: functools.partial(_tune_weights, cfg, base, training, name, case)
        chosen = [_cached(cfg, case, TUNING_SEED, base.sha256, tune(case)) for case in cases]
        for seed, (case, weights) in itertools.product(range(cfg.seeds), zip(cases, chosen, strict=True)):
            run = functools.partial(_run, cfg, base, training, name, case, seed, weights)
            rows = _cached(cfg, case, seed, base.sha256, run)["rows"]
            results += [{**row, "seed": seed} for row in rows]
            console.print(f"{case} seed {seed}: {time.monotonic() - began:.0f} s", highlight=False)
    rows = _over_seeds(results)
    _print(rows)
    seconds = {"all": time.monotonic() - began}
    harness.write("extraction", rows, config.to_dict(cfg) | {"work": ""}, seconds, ["intervals over seeds (Student t)"])


def _cached(cfg: Config, case: dict, seed: int, model: str, run) -> dict:
    """The stored result of a run, or that of running it now."""
    settings = json.dumps([model, case, seed, cfg.evaluations, cfg.num_steps, cfg.set, cfg.weights, cfg.scales])
    name = "_".join(f"{value}" for value in case.values())
    path = cfg.work / f"{name}_seed{seed}.json"
    if path.is_file():
        stored = json.loads(path.read_text())
        require(stored["settings"] == settings, str(path), "of these settings", "others", "remove it or change --work")
        return stored["result"]
    result = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps({"settings": settings, "result": result}))
    path.with_suffix(".part").rename(path)
    return result


def read_set(name: str, pixels: int) -> ImageSet:
    """All pictures of a set: the shipped OpenMoji animals, or every picture of a folder and of the folders in it."""
    root = PICTURES if name == "openmoji" else Path(name)
    require(root.is_dir(), "set", "openmoji or a folder of pictures", name, "correct the path")
    inside = sorted(path for path in root.iterdir() if path.is_dir())
    parts = [images.read_folder(folder, pixels) for folder in inside or [root]]
    fields = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(ImageSet)}
    joined = {name: tuple(itertools.chain(*values)) for name, values in fields.items() if name != "images"}
    return ImageSet(images=np.concatenate(fields["images"]), **joined)


def _subject(base, training, name: str, case: dict, seed: int):
    """(subject, training pictures, hold-outs) of one run; the models of the other `steps` of its training are kept for the next."""
    pictures, holdout, prompt, models = training(name, case["tuner"], case["n0"], seed)
    return Subject(base, models[case["steps"]], prompt), pictures, holdout


def _training(cfg: Config, base, name: str, tuner: str, n0: int, seed: int):
    """Training pictures and hold-outs drawn by `seed`, the prompt, and the parameters after each of `cfg.steps` of one training."""
    everything = read_set(name, base.pixels)
    short = f"{len(everything)} pictures"
    require(len(everything) > n0, name, f"a set of more than {n0} pictures", short, "lower n0")
    order = np.random.default_rng(seed).permutation(len(everything))
    pictures, holdout = images.split(images.reorder(everything, order), n0)
    prompt = "an openmoji icon of an animal" if name == "openmoji" else "a picture in sks style"
    return pictures, holdout, prompt, _models(base, pictures, prompt, tuner, seed, cfg.steps, cfg.set)


def _models(base, pictures: ImageSet, prompt: str, tuner: str, seed: int, steps: tuple[int, ...], overrides) -> dict:
    """Parameters after each of `steps` of one training."""
    recipe = finetune.read_recipe(
        None, (*(LORA if tuner == "lora" else ()), f"tune.num_steps={max(steps)}", *overrides)
    )
    odd = [count for count in steps if count % recipe.chunk_steps]
    require(not odd, "steps", f"multiples of {recipe.chunk_steps}", odd, "round them")
    kept = {}

    def keep(done, info, state):
        if done in steps:
            kept[done] = jax.device_get(finetune.merged(base, recipe, dreambooth.averaged(state)))

    key = jax.random.key(seed)
    finetune.tune(key, base, pictures.images, [prompt] * len(pictures), recipe, on_chunk=keep)
    return kept


def _tune_weights(cfg: Config, base, training, name: str, case: dict) -> dict:
    """The guidance weights with the best AS after clustering on the tuning seed."""
    subject, pictures, holdout = _subject(base, training, name, case, TUNING_SEED)
    grids = {"finextract": cfg.weights, "cfg": cfg.weights, "lora-scale": cfg.scales}
    best = {}
    for method, grid in grids.items():
        scores = {}
        for weight in grid:
            settings = _settings(cfg, TUNING_SEED, (method,), {method: weight})
            found = _extract(subject, pictures, holdout, settings, case)
            scores[weight] = found.main.clustered.average.value if found.main.clustered else -1.0
        best[method] = {"weight": max(scores, key=scores.get), "scores": {str(w): s for w, s in scores.items()}}
    return best


def _run(cfg: Config, base, training, name: str, case: dict, seed: int, chosen: dict) -> dict:
    """All methods of one seed, as rows."""
    subject, pictures, holdout = _subject(base, training, name, case, seed)
    weights = {method: value["weight"] for method, value in chosen.items()}
    settings = _settings(cfg, seed, ("finextract", "cfg", "lora-scale", "plain", "carlini"), weights)
    found = _extract(subject, pictures, holdout, settings, case)
    return {"rows": [dataclasses.asdict(row) for row in report.rows(found, case)], "weights": weights}


def _settings(cfg: Config, seed: int, methods: tuple[str, ...], weights: dict[str, float]) -> extract.Settings:
    names = {"finextract": "w", "cfg": "cfg_weight", "lora-scale": "scale"}
    given = {names[method]: weight for method, weight in weights.items()}
    return extract.Settings(methods=methods, evaluations=cfg.evaluations, num_steps=cfg.num_steps, seed=seed, **given)


def _extract(subject, pictures, holdout, settings, case):
    return extract.extract(
        subject,
        pictures,
        holdout,
        settings,
        number=case["n0"],
        console=Console(quiet=True),
        tuned_label=str(case),
        seconds={},
        config={},
        inputs={},
    )


def _over_seeds(results: list[dict]) -> list[Row]:
    """One row per case and method: the mean over seeds with its interval."""
    groups: dict[str, list[dict]] = {}
    for row in results:
        identity = {name: row[name] for name in ("bench", "metric", "unit", "method", "case")}
        groups.setdefault(json.dumps(identity, sort_keys=True), []).append(row)
    rows = []
    for identity, members in groups.items():
        values = [row["value"] for row in members]
        names = json.loads(identity)
        if any(value is None for value in values):  # a method that found no cluster in some run has no AS there
            rows.append(Row(value=None, n=len(values), **names))
        else:
            rows.append(row_over(seed_interval(values), **names))
    return rows


def _print(rows: list[Row]) -> None:
    """AS after clustering, members beside hold-outs."""
    shown = [row for row in rows if row.metric == "AS" and row.case["stage"] == "clustered"]
    lines = [
        [*(str(row.case[name]) for name in ("set", "tuner", "n0", "steps", "pictures")), row.method, _figure(row)]
        for row in shown
    ]
    print(harness.table(["set", "tuner", "n0", "steps", "pictures", "method", "AS [95 %]"], lines))


def _figure(row: Row) -> str:
    if row.value is None:
        return "-"
    return f"{row.value:.3f}" if row.low is None else f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
