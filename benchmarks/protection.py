"""`python -m benchmarks.protection`: what protecting pictures is worth, beyond random noise of the same size, and what undoes it.

For every set and seed N0 pictures are drawn, protected by each method at each budget, and judged: by the held-out denoising loss of the attacked
model, as saved and after every purifier; and by how well the model, fine-tuned on them, imitates hold-out pictures of the same artist. All
methods spend as many floating-point operations as AdvDM does in `steps` steps.
"""

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from scipy import stats

from benchmarks import harness, imitation
from benchmarks.protected import CLEAN, Arm, Run, flops
from benchmarks.trained import Training
from dmsec_jax import pipeline, protection, robustness
from dmsec_jax.core import config
from dmsec_jax.data.images import to_uint8
from dmsec_jax.imitation import FEATURES, embed
from dmsec_jax.metrics import evidence
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.report.result import Row, row_over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Protection benchmark."""

    sets: tuple[str, ...] = ("openmoji",)
    """`openmoji` (shipped), or folders of pictures, or of subjects, one of which is taken for each seed."""
    methods: tuple[str, ...] = ("advdm", "sds", "mist", "textural", "photoguard", "ace")
    budgets: tuple[float, ...] = (4.0, 8.0, 16.0)
    """Largest change of a sample, in levels of 0..255."""
    n0: int = 10
    seeds: int = 5
    steps: int = 40
    """Of AdvDM; the others take as many tens of steps as cost the same, at least ten."""
    purifiers: tuple[str, ...] = tuple(robustness.PURIFIERS)
    purified: tuple[float, ...] = (4.0, 8.0, 16.0)
    """Of the budgets, those at which purifiers are tried."""
    tuners: tuple[str, ...] = ()
    """`full`, `lora`: how the imitator fine-tunes; none leaves the imitation out."""
    imitated: tuple[str, ...] = ("advdm", "photoguard")
    """Methods whose pictures are fine-tuned on, at the largest budget, beside clean pictures and noise."""
    undone: tuple[str, ...] = ("jpeg", "noisy-upscaling")
    """Purifiers before fine-tuning, for the first of `imitated`."""
    partial: int = 1
    """Clean pictures among the protected, for the first of `imitated`; 0 leaves it out."""
    tuning_steps: int = 200
    samples: int = 40
    work: Path = Path("out/bench-protection")
    """Pictures, losses and samples are kept here; an interrupted benchmark goes on."""
    set: tuple[str, ...] = ()
    """Overrides of the fine-tuning recipe."""


def main(cfg: Config) -> None:
    """Computes what is not yet in `cfg.work`, then writes rows, table and JSON, one file per set and part."""
    console = Console(stderr=True)
    base, began = pipeline.load(), time.monotonic()
    for name in cfg.sets:
        train = functools.partial(_training, cfg, base, name)
        model = protection.model_of(base, train(0, "full").prompt)
        costs = {method: flops(model, method, cfg.n0) for method in ("advdm", *cfg.methods)}
        steps = {method: _steps(cfg, costs["advdm"] / cost) for method, cost in costs.items()}
        runs = [Run(functools.partial(train, seed), model, steps, cfg.work) for seed in range(cfg.seeds)]
        results, gains = [], {}
        for run in runs:
            for found in (*_loss_rows(cfg, run, gains), *_detection_rows(cfg, run)):
                results.append({**dataclasses.asdict(found), "seed": run.seed})
            console.print(f"{run.case} seed {run.seed}: {time.monotonic() - began:.0f} s", markup=False)
        rows = harness.over_seeds(results) + _p_values(gains) + _differences(results)
        rows += _cost_rows(cfg, runs, costs, steps)
        _write(cfg, rows, time.monotonic() - began)
        for tuner in cfg.tuners:
            rows = _imitation(cfg, runs, tuner, lambda text: console.print(text, markup=False))
            _write(cfg, rows, time.monotonic() - began)


def _training(cfg: Config, base: pipeline.Pipeline, name: str, seed: int, tuner: str) -> Training:
    return Training(base, name, tuner, cfg.n0, seed, (cfg.tuning_steps,), cfg.set)


def _steps(cfg: Config, share: float) -> int:
    """Of a method whose steps cost 1 / share of AdvDM's; whole chunks, since others compile a program of their own."""
    return protection.CHUNK * max(1, round(cfg.steps * share / protection.CHUNK))


def _loss_rows(cfg: Config, run: Run, gains: dict) -> list[Row]:
    """Rises of the loss and sizes of the change of one seed; `gains` collects (case, method) -> picture -> gains over seeds."""
    rows = []
    for purifier, budget in itertools.product(("", *cfg.purifiers), cfg.budgets):
        if purifier and budget not in cfg.purified:
            continue
        clean = run.losses(Arm("clean", purifier=purifier))
        noise = run.losses(Arm("noise", budget, purifier))
        case = run.case | Arm("", budget, purifier).case
        names = {"bench": "protection", "case": case, "n": cfg.n0}
        rise = lambda losses, clean=clean: float((losses / clean - 1).mean())
        rows.append(Row(metric="loss_rise_noise", value=rise(noise), unit="share", method="noise", **names))
        for method in cfg.methods:
            losses = run.losses(Arm(method, budget, purifier))
            gain = (losses - noise) / clean
            rows.append(Row(metric="loss_rise_protected", value=rise(losses), unit="share", method=method, **names))
            rows.append(
                Row(metric="loss_rise", value=float(gain.mean()), unit="share beyond noise", method=method, **names)
            )
            by_picture = gains.setdefault((json.dumps(case), method), {})
            for digest, value in zip(run.digests, gain, strict=True):
                by_picture.setdefault(digest, []).append(float(value))
    for budget, method in itertools.product(cfg.budgets, (*cfg.methods, "noise")):
        after = run.changed(Arm(method, budget))["images"]
        changes = [robustness.change(a, b) for a, b in zip(to_uint8(run.clean), after, strict=True)]
        for metric, unit in (("psnr", "dB"), ("ssim", "similarity"), ("lpips", "distance")):
            value = float(np.mean([getattr(change, metric) for change in changes]))
            case = run.case | {"budget": budget}
            rows.append(
                Row(bench="protection", metric=metric, value=value, unit=unit, method=method, case=case, n=cfg.n0)
            )
    return rows


def _detection_rows(cfg: Config, run: Run) -> list[Row]:
    """How well each statistic tells protected pictures from clean ones, and from noise of the same size."""
    rows = []
    for budget, method in itertools.product(cfg.budgets, (*cfg.methods, "noise")):
        found = run.suspicion(Arm(method, budget))
        others = {"clean": run.suspicion(CLEAN)} | (
            {} if method == "noise" else {"noise": run.suspicion(Arm("noise", budget))}
        )
        for statistic, (against, null) in itertools.product(found, others.items()):
            case = run.case | {"budget": budget, "statistic": statistic, "against": against}
            names = {"bench": "protection", "metric": "detection_AUC", "unit": "share", "method": method}
            value = evidence.auc(found[statistic], null[statistic]).value
            rows.append(Row(value=value, n=2 * cfg.n0, case=case, **names))
    return rows


def _p_values(gains: dict) -> list[Row]:
    """One-sided paired t-tests that the loss rises more than under noise: the sample are the different pictures, each with its mean over seeds."""
    rows = []
    for (case, method), pictures in gains.items():
        means = [np.mean(values) for values in pictures.values()]
        p_value = float(stats.ttest_1samp(means, 0, alternative="greater").pvalue)
        names = {"bench": "protection", "metric": "loss_rise_p_value", "unit": "probability", "method": method}
        rows.append(Row(value=p_value, n=len(means), case=json.loads(case), **names))
    return rows


def _differences(results: list[dict]) -> list[Row]:
    """AdvDM's rise of the loss minus that of each other method in the same case, paired by seed."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in results:
        if row["metric"] == "loss_rise":
            case = values.setdefault(json.dumps(row["case"]), {})
            case.setdefault(row["method"], {})[row["seed"]] = row["value"]
    names = {"bench": "protection", "metric": "loss_rise difference", "unit": "share", "method": "advdm"}
    rows = []
    for case, methods in values.items():
        own = methods.get("advdm", {})
        for other in methods.keys() - {"advdm"} if own else ():
            gaps = [own[seed] - methods[other][seed] for seed in own]
            rows.append(row_over(seed_interval(gaps), **names, case=json.loads(case) | {"against": other}))
    return rows


def _cost_rows(cfg: Config, runs: list[Run], costs: dict, steps: dict) -> list[Row]:
    """What an attack on all pictures of a run costs: operations counted, and the median processor time of attacks that did not compile."""
    rows = []
    for method in cfg.methods:
        times = [float(run.changed(Arm(method, b))["seconds"]) for run in runs for b in cfg.budgets]
        names = {"bench": "protection", "method": method}
        case = runs[0].case | {"steps": steps[method]}
        gflops = costs[method] * steps[method] / 1e9
        rows.append(Row(metric="gflops", value=gflops, unit="1e9 operations", n=1, case=case, **names))
        median = float(np.median(times))
        rows.append(Row(metric="seconds", value=median, unit="processor seconds", n=len(times), case=case, **names))
    return rows


def _arms(cfg: Config) -> list[Arm]:
    """What is fine-tuned on, the most telling first."""
    budget, first = max(cfg.budgets), cfg.imitated[0]
    arms = [CLEAN, Arm("noise", budget), *(Arm(method, budget) for method in cfg.imitated)]
    arms += [Arm(first, budget, clean=cfg.partial)] if cfg.partial else []
    return arms + [Arm(first, budget, purifier) for purifier in cfg.undone]


def _imitation(cfg: Config, runs: list[Run], tuner: str, tell) -> list[Row]:
    """Fine-tunes on every arm of every seed and judges what the models draw, beside the base model and the artist's own pictures."""
    settings = json.dumps(cfg.set)
    folder = cfg.work / f"{runs[0].case['set']}_base"
    untuned = imitation.samples(folder, runs[0].training_fn(tuner), None, "samples", cfg.samples, "")
    origin, results = embed(untuned), []

    def add(run: Run, method: str, arm: Arm, drawn: np.ndarray) -> None:
        found = imitation.figures(drawn, embed(run.holdout), origin)
        case = run.case | {"tuner": tuner, "steps": cfg.tuning_steps} | arm.case
        case |= {"coverage": 1 - arm.clean / cfg.n0 if arm.budget else 0.0}
        new = imitation.rows(found, method, case, cfg.samples)
        results.extend({**dataclasses.asdict(row), "seed": run.seed} for row in new)

    for run in runs:
        add(run, "untuned", CLEAN, origin)
        add(run, "artist", CLEAN, embed(run.clean))
    for arm, run in itertools.product(_arms(cfg), runs):
        place = run.folder / f"imitation-{tuner}-{cfg.tuning_steps}"
        own = json.dumps([settings, *run.settings, run.steps.get(arm.method)])
        views = run.views(arm)
        drawn = imitation.samples(place, run.training_fn(tuner), views, arm.name, cfg.samples, own)
        add(run, arm.method, arm, embed(drawn))
        tell(f"{tuner} {arm.name} seed {run.seed}")
    return harness.over_seeds(results) + _against(results, "imitation") + _against(results, "frechet")


def _against(results: list[dict], metric: str) -> list[Row]:
    """Each arm minus clean, and each minus noise, paired by seed."""
    chosen = [row for row in results if row["metric"] == metric and row["method"] not in ("untuned", "artist")]
    by_arm: dict[tuple[str, str], dict[int, float]] = {}
    for row in chosen:
        by_arm.setdefault((row["method"], json.dumps(row["case"])), {})[row["seed"]] = row["value"]
    rows = []
    for reference in ("clean", "noise"):
        (own,) = (values for (method, _), values in by_arm.items() if method == reference)
        for (method, case), values in by_arm.items():
            if method not in ("clean", reference):
                gaps = [values[seed] - own[seed] for seed in sorted(values)]
                names = {"bench": "protection", "metric": f"{metric} difference", "method": method}
                more = {"unit": chosen[0]["unit"], "case": json.loads(case) | {"against": reference}}
                rows.append(row_over(seed_interval(gaps), **names, **more))
    return rows


def _write(cfg: Config, rows: list[Row], seconds: float) -> None:
    """Table and JSON."""
    shown = ("loss_rise", "detection_AUC", "imitation", "imitation difference", "frechet difference")
    case = ("set", "tuner", "budget", "purifier", "coverage", "statistic", "against")
    cells = lambda row: [row.metric, row.method, *(str(row.case.get(name, "")) for name in case), harness.figure(row)]
    header, lines = ["metric", "method", *case, "value [95 %]"], [cells(row) for row in rows if row.metric in shown]
    print(harness.table(header, lines))
    names = [Path(name).name for name in cfg.sets]
    settings = config.to_dict(cfg) | {"work": "", "sets": names}  # no paths of a machine
    notes = [
        "intervals over seeds (Student t), whose pictures may overlap; p-values over different pictures",
        "attacker, imitator and judge use one model and one prompt: the best case for the protection",
        f"imitation and Frechet distance: {FEATURES}",
    ]
    harness.write("protection", rows, settings, {"all": seconds}, notes)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
