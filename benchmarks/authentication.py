"""`python -m benchmarks.authentication`: which test tells training pictures from others, at which cost, and does it accuse falsely?

Every run fine-tunes the embedded model on N0 pictures drawn at random from a set, for several numbers of steps, and asks all tests about
those pictures and about hold-outs of the same set. A second part audits models with pictures that they were NOT trained on.
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
from scipy import stats

from benchmarks import harness
from benchmarks.trained import Training
from dmsec_jax import authentication, pipeline
from dmsec_jax.authentication import CHUNK, LOSSES, METHODS, RECOVERING, Settings
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.metrics import evidence, similarity
from dmsec_jax.metrics.extraction import rate_interval, seed_interval
from dmsec_jax.report.result import Row, row_over

SINGLE = tuple(name for name in METHODS if name not in (*RECOVERING, *LOSSES))
PARTS = ("base", "tuned", "tuned-apart", "unconditional")
EARLIER = ("loss", "secmi", "pia", "pfami")
"""Tests from before CGI-DM."""
CONTROL_SEED = 5000
"""Seeds of the models of the second part begin here: none is trained for the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Authentication benchmark."""

    sets: tuple[str, ...] = ("openmoji",)
    """`openmoji` (shipped), or folders of pictures, or of subjects, one of which is taken for each seed."""
    tuners: tuple[str, ...] = ("full", "lora")
    n0: int = 10
    holdouts: int = 20
    """At most; half of them set the threshold that is transferred to the other half."""
    steps: tuple[int, ...] = (10, 25, 50, 125)
    seeds: int = 5
    first_seed: int = 0
    """Where seeds begin: beyond those by which something was chosen."""
    settings: Settings = Settings(num_draws=32, num_steps=100)
    control: int = 0
    """Audits of pictures that were not used, each of a model of its own, with the loss difference; 0 leaves them out."""
    control_steps: int = 50
    work: Path = Path("out/bench-authentication")
    """Scores are kept here; an interrupted benchmark goes on."""
    set: tuple[str, ...] = ("chunk_steps=5",)
    """Overrides of the fine-tuning recipe."""


def main(cfg: Config) -> None:
    """Computes the scores that are not yet in `cfg.work`, then writes rows, table and JSON."""
    console = Console(stderr=True)
    base = pipeline.load()
    began = time.monotonic()
    for name, tuner in itertools.product(cfg.sets, cfg.tuners):
        results = []
        for seed in range(cfg.first_seed, cfg.first_seed + cfg.seeds):
            training = Training(base, name, tuner, cfg.n0, seed, cfg.steps, cfg.set)
            for steps in cfg.steps:
                results += [{**dataclasses.asdict(row), "seed": seed} for row in _rows(cfg, training, steps)]
                console.print(f"{training.case(steps)} seed {seed}: {time.monotonic() - began:.0f} s", markup=False)
        rows = harness.over_seeds(results) + _differences(results)
        _print(rows)
        notes = [
            "intervals over seeds (Student t), whose pictures can overlap; differences are paired by seed",
            "accuracy@transferred: the threshold is that of half of the hold-outs at the level of its case, the least that so few allow",
            "TPR@1%FPR of so few hold-outs is that without a false positive",
        ]
        _write(cfg, rows, time.monotonic() - began, notes)
    if cfg.control:
        _write(cfg, _control(cfg, base, console), time.monotonic() - began, ["models fine-tuned without the pictures"])


def _write(cfg: Config, rows: list[Row], seconds: float, notes: list[str]) -> None:
    """One file per set and tuner, as soon as it is done."""
    names = [Path(name).name for name in cfg.sets]
    settings = config.to_dict(cfg) | {"work": "", "sets": names}  # no paths of a machine
    harness.write("authentication", rows, settings, {"all": seconds}, notes)


def _scores(cfg: Config, training: Training, steps: int) -> dict[str, np.ndarray]:
    """Raw results of all tests, members first: losses [N, K], statistics [N], CGI-DM's error after every chunk [chunks, N]."""
    holdout = training.holdout.images[: cfg.holdouts]
    pictures = np.concatenate([training.pictures.images, holdout])

    def compute() -> dict[str, np.ndarray]:
        subject = pipeline.Subject(training.base, training.models[steps], training.prompt)
        key = jax.random.key(training.seed)
        found = authentication.losses(key, subject, pictures, PARTS, cfg.settings)
        found |= authentication.statistics(key, subject, pictures, SINGLE, cfg.settings)
        for name in RECOVERING:
            found |= _recovered(cfg, key, subject, pictures, name)
        return found

    settings = json.dumps([training.identity(cfg.holdouts), dataclasses.asdict(cfg.settings)])
    return harness.kept(cfg.work / training.folder / f"{steps}.npz", settings, compute)


def _recovered(cfg: Config, key, subject, pictures: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Errors after every chunk, and how alike pictures [N] and final recoveries [N] are, as a matrix [N, N].

    The public code's variant takes one draw per step, so it goes on for as many more steps: both end at the same cost.
    """
    errors, state = [], None
    steps = cfg.settings.num_steps * (cfg.settings.cgi_draws if name == "cgi-dm-faithful" else 1)
    for done in range(CHUNK, steps + 1, CHUNK):
        last: list[authentication.Unfinished] = []
        settings = dataclasses.replace(cfg.settings, num_steps=done)
        found = authentication.recover(key, subject, pictures, settings, name=name, resume=state, on_chunk=last.append)
        state = last[-1]
        errors.append(found.error)
    features = [similarity.embed(part) for part in (pictures, found.images)]
    return {name: np.stack(errors), f"{name}-likeness": features[0] @ features[1].T}


def _evidence(cfg: Config, found: dict[str, np.ndarray], n0: int) -> dict[tuple[str, int], np.ndarray]:
    """(test, evaluations) -> evidence [N]: the losses at several numbers of draws, CGI-DM after every chunk."""
    scores = {(name, METHODS[name].evaluations(cfg.settings)): found[name] for name in SINGLE}
    order = np.random.default_rng(0).permutation(cfg.settings.num_draws)
    for name, (first, second) in LOSSES.items():
        gap = (0 if first is None else found[first]) - found[second]
        for draws in itertools.takewhile(lambda n: n <= len(order), (2**j for j in itertools.count(1))):
            cost = METHODS[name].evaluations(dataclasses.replace(cfg.settings, num_draws=draws))
            scores[name, cost] = gap[:, order[:draws]].mean(axis=1)
    for name in RECOVERING:
        for i, errors in enumerate(found[name], 1):
            cost = METHODS[name].evaluations(dataclasses.replace(cfg.settings, num_steps=CHUNK * i))
            scores[name, cost] = -errors
        likeness = found[f"{name}-likeness"]  # the paper's score, with features of this library
        scores[f"{name}-likeness", cost] = np.diagonal(likeness)
        split = [evidence.best_of_split(likeness[part, part]) for part in (slice(n0), slice(n0, None))]
        scores[f"{name}-likeness-best-of-split", cost] = np.concatenate(split)
    return scores


def _rows(cfg: Config, training: Training, steps: int) -> list[Row]:
    """Figures of one model."""
    n0, rows = training.n0, []
    for (name, evaluations), scores in _evidence(cfg, _scores(cfg, training, steps), n0).items():
        members, others = scores[:n0], scores[n0:]
        calibration, test = others[: len(others) // 2], others[len(others) // 2 :]
        level = max(0.05, 1 / (1 + len(calibration)))  # with fewer than 19 no threshold keeps 0.05
        figures = {
            "AUC": evidence.auc(members, others).value,
            "TPR@1%FPR": evidence.rate_at(members, others, 0.01).value,
            "accuracy@transferred": evidence.transferred_accuracy(members, test, calibration, level=level),
            "accuracy@oracle": evidence.oracle_accuracy(members, test),
        }
        names = {"bench": "authentication", "method": name, "unit": "share"}
        case = training.case(steps) | {"evaluations": evaluations}
        for metric, value in figures.items():
            more = {"level": level} if metric == "accuracy@transferred" else {}
            rows.append(Row(metric=metric, value=value, n=len(scores), case=case | more, **names))
    return rows


def _differences(results: list[dict]) -> list[Row]:
    """AUC minus that of others, paired by seed.

    The loss difference against all tests, each at its highest cost. CGI-DM against the public code's at equal cost, and at a third of its highest
    cost or less against it at that; against earlier tests. Of these last two the case has the other's cost, too (`evaluations_against`).
    """
    values: dict[str, dict] = {}
    for row in results:
        if row["metric"] == "AUC":
            case = {name: row["case"][name] for name in ("set", "tuner", "n0", "steps")}
            own = values.setdefault(json.dumps(case), {}).setdefault(row["method"], {})
            own.setdefault(row["case"]["evaluations"], {})[row["seed"]] = row["value"]
    rows = []

    def add(case: str, first: str, at_first: dict, second: str, at_second: dict, cost: int, **more: int) -> None:
        gaps = [at_first[seed] - at_second[seed] for seed in at_first]
        names = {"bench": "authentication", "metric": "AUC difference", "unit": "share", "method": first}
        names["case"] = json.loads(case) | {"against": second, "evaluations": cost} | more
        rows.append(row_over(seed_interval(gaps), **names))

    for case, methods in values.items():
        last = {name: (max(costs), costs[max(costs)]) for name, costs in methods.items()}
        cost, best = last["loss-difference"]
        for name, (_, own) in last.items():
            if name not in ("loss-difference", "base-loss"):
                add(case, "loss-difference", best, name, own, cost)
        for cost, own in methods["cgi-dm"].items():
            if cost in methods["cgi-dm-faithful"]:
                add(case, "cgi-dm", own, "cgi-dm-faithful", methods["cgi-dm-faithful"][cost], cost)
        whole, faithful = last["cgi-dm-faithful"]
        thirds = [cost for cost in methods["cgi-dm"] if 3 * cost <= whole]
        if thirds:
            cost = max(thirds)
            own = methods["cgi-dm"][cost]
            add(case, "cgi-dm", own, "cgi-dm-faithful", faithful, cost, evaluations_against=whole)
        cost, own = last["cgi-dm"]
        for name in EARLIER:
            other, theirs = last[name]
            add(case, "cgi-dm", own, name, theirs, cost, evaluations_against=other)
    return rows


def _control(cfg: Config, base: pipeline.Pipeline, console: Console) -> list[Row]:
    """How often pictures that were not used are accused: of sets at 5 %, and whether p-values of single pictures are uniform."""
    rejected, single = [], []
    name = cfg.sets[0]
    for i in range(cfg.control):
        training = Training(base, name, "full", cfg.n0, CONTROL_SEED + i, (cfg.control_steps,), cfg.set)
        unused = training.holdout.images[: cfg.n0 + cfg.holdouts]
        full = len(unused) == cfg.n0 + cfg.holdouts
        require(full, name, f"at least {2 * cfg.n0 + cfg.holdouts} pictures", "fewer", "lower n0 or holdouts")

        def compute(training=training, unused=unused) -> dict[str, np.ndarray]:
            subject = pipeline.Subject(base, training.models[cfg.control_steps], training.prompt)
            return authentication.losses(jax.random.key(training.seed), subject, unused, PARTS[:2], cfg.settings)

        settings = json.dumps([training.identity(len(unused)), dataclasses.asdict(cfg.settings)])
        path = cfg.work / training.folder / f"control-{cfg.control_steps}.npz"
        found = harness.kept(path, settings, compute)
        scores = (found["base"] - found["tuned"]).mean(axis=1)
        suspects, null = scores[: cfg.n0], scores[cfg.n0 :]
        rejected.append(evidence.set_evidence(training.seed, suspects, null).p_value <= 0.05)
        # one picture of each model, so that p-values are independent; ties are broken at random, so that they are uniform on [0, 1]
        uniform = np.random.default_rng(training.seed).random()
        single.append(((null > suspects[0]).sum() + uniform * (1 + (null == suspects[0]).sum())) / (1 + len(null)))
        console.print(f"control {i + 1} of {cfg.control}: {sum(rejected)} accused", highlight=False)
    names = {"bench": "authentication", "method": "loss-difference"}
    case = {"set": Path(name).name, "tuner": "full", "n0": cfg.n0, "steps": cfg.control_steps}
    ks = stats.kstest(single, "uniform")
    return [
        row_over(rate_interval(np.array(rejected)), metric="false_positive_rate", unit="share", case=case, **names),
        Row(metric="uniformity_p_value", value=float(ks.pvalue), n=len(single), unit="probability", case=case, **names),
    ]


def _print(rows: list[Row]) -> None:
    """AUC of every test at its highest cost."""
    best: dict[tuple, Row] = {}
    for row in rows:
        if row.metric == "AUC":
            case = tuple(row.case[name] for name in ("set", "tuner", "n0", "steps"))
            key = (*case, row.method)
            if key not in best or row.case["evaluations"] > best[key].case["evaluations"]:
                best[key] = row
    lines = [[*map(str, key), str(row.case["evaluations"]), harness.figure(row)] for key, row in best.items()]
    print(harness.table(["set", "tuner", "n0", "steps", "method", "evaluations", "AUC [95 %]"], lines))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
