"""Which models a run of the matrix trains, and what decides the result of each."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmsec_jax.core import config
from dmsec_jax.core.checks import require

VERSION = 1
"""Raised by hand when a change of the code changes results: those of before are then computed again."""
CHUNK = 10
"""Training steps in one compiled call, between which a model can be looked at."""
TUNERS = ("full", "lora", "oft")
RATES = {"full": 1e-4, "lora": 1e-3, "oft": 3e-3}
"""Learning rates, as `benchmarks.trained.TUNERS` has them."""
OBJECTIVES = {"plain": (), "bayes": ("bayes",), "prior": ("prior",), "bayes+prior": ("bayes", "prior")}
"""Training objective -> its parts: a posterior over the weights, prior preservation."""
SELECTION = {"full": "norm", "lora": "lora-up", "oft": "oft"}
"""Leaves that the posterior is over: the paper's best for full weights, and the adapter's own."""
TREATMENTS = {
    "clean": ("clean", ""),
    "noise": ("noise", ""),
    "advdm": ("advdm", ""),
    "sds": ("sds", ""),
    "mist": ("mist", ""),
    "purified": ("advdm", "noisy-upscaling"),
}
"""What was done to the training pictures: by whom they were protected, and how somebody then purified them."""
FOLDER = Path(__file__).parents[2] / "configs" / "matrix"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model. What does not apply is 0, so that the same model is never described in two ways."""

    set: str
    seed: int
    """Draws the pictures, the batches and all noise."""
    n0: int
    steps: int
    tuner: str
    objective: str
    treatment: str
    rank: int
    rate: float
    sigma0: float
    prior_weight: float
    budget: float
    """Levels of 0..255."""

    def overrides(self) -> tuple[str, ...]:
        """Of the default recipe (`tuning.DEFAULT`); no average of the weights is kept, so that all objectives give their last."""
        adapter = {
            "full": (),
            "lora": (f"lora.rank={self.rank}", f"lora.alpha={self.rank}", "lora.targets=attention+ff+conv"),
            "oft": ("oft.blocks=4", "oft.targets=attention"),
        }
        numbers = (f"tune.num_steps={self.steps}", f"tune.learning_rate={self.rate!r}")
        own = (f"chunk_steps={CHUNK}", "tune.ema_decay=null", *numbers)
        parts = OBJECTIVES[self.objective]
        bayes = (f"bayes.selection={SELECTION[self.tuner]}", f"bayes.sigma0={self.sigma0!r}")
        prior = (f"tune.prior_weight={self.prior_weight!r}",)
        return (
            *adapter[self.tuner],
            *own,
            *(bayes if "bayes" in parts else ()),
            *(prior if "prior" in parts else ()),
        )


IDENTITY = tuple(field.name for field in dataclasses.fields(Cell))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """All combinations."""

    sets: tuple[str, ...]
    """`openmoji`, or names of folders of pictures (or of subjects) below `--data`."""
    seeds: int
    n0: tuple[int, ...]
    steps: tuple[int, ...]
    tuners: tuple[str, ...] = TUNERS
    objectives: tuple[str, ...] = ("plain", "bayes", "prior")
    treatments: tuple[str, ...] = tuple(TREATMENTS)
    rank: int = 64
    sigma0: float = 0.01
    prior_weight: float = 1.0
    budget: float = 8.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """LoRA models whose knobs are drawn at random, each of the others: what they do to the outcomes is then an effect.

    The pictures are protected by AdvDM, the objective has both parts, so that every knob always does something.
    """

    sets: tuple[str, ...]
    count: int
    """Models of each set."""
    n0: tuple[int, ...] = (3, 5, 8)
    steps: tuple[int, ...] = (50, 100, 150, 200, 300)
    rank: tuple[int, ...] = (4, 16, 64)
    rate: tuple[float, float] = (3e-4, 3e-3)
    """Log-uniform."""
    sigma0: tuple[float, float] = (1e-3, 3e-2)
    """Log-uniform."""
    prior_weight: tuple[float, float] = (0.0, 2.0)
    budget: tuple[float, float] = (1.0, 16.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is asked of each model."""

    evaluations: int = 48
    """Network evaluations per denoising step of each extraction; as many plain samples are drawn, which all other figures of samples are of."""
    sampling_steps: int = 25
    draws: int = 16
    """Of (timestep, noise) per picture, for losses."""
    cgi_steps: int = 50
    holdouts: int = 10
    """At most."""
    early: int = 10
    """Training steps after which membership is asked for the first time, since later every test is certain; no more than any model has."""
    attack_steps: int = 40
    """Of every protection."""
    class_pictures: int = 32
    """That the base model draws for prior preservation."""
    shown: int = 8
    """Samples kept for the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A preset."""

    grids: tuple[Grid, ...] = ()
    draws: tuple[Draws, ...] = ()
    effort: Effort = Effort()


def read(preset: str, overrides: tuple[str, ...] = ()) -> Plan:
    """`configs/matrix/<preset>.yaml`, checked; raises as `core.config.load`, and on a model that cannot be."""
    plan = config.load(Plan, FOLDER / f"{preset}.yaml", overrides)
    for cell in cells(plan):
        for name, known in (("tuner", TUNERS), ("objective", OBJECTIVES), ("treatment", TREATMENTS)):
            got = getattr(cell, name)
            require(got in known, name, f"one of {', '.join(known)}", repr(got), "choose one of them")
        early = plan.effort.early
        whole = cell.steps % CHUNK == early % CHUNK == 0 and 0 < early <= cell.steps
        require(
            whole, "steps and early", f"multiples of {CHUNK}, steps no less", f"{cell.steps}, {early}", "round them"
        )
    return plan


def cells(plan: Plan) -> tuple[Cell, ...]:
    """All models, each once, seed by seed: a run that is cut short has whole seeds."""
    found = dict.fromkeys(itertools.chain(*map(_grid, plan.grids), *map(_drawn, plan.draws)))
    return tuple(sorted(found, key=lambda cell: cell.seed))


def drawn(plan: Plan) -> frozenset[Cell]:
    """The models whose knobs were drawn at random."""
    return frozenset(itertools.chain(*map(_drawn, plan.draws)))


def cell(
    *,
    tuner: str,
    objective: str,
    treatment: str,
    rank: int,
    sigma0: float,
    prior_weight: float,
    budget: float,
    rate: float | None = None,
    **names: Any,
) -> Cell:
    """A cell, with 0 for what does not apply to it."""
    parts = OBJECTIVES.get(objective, ())
    return Cell(
        tuner=tuner,
        objective=objective,
        treatment=treatment,
        rank=rank if tuner == "lora" else 0,
        rate=RATES.get(tuner, 0.0) if rate is None else rate,
        sigma0=sigma0 if "bayes" in parts else 0.0,
        prior_weight=prior_weight if "prior" in parts else 0.0,
        budget=0.0 if treatment == "clean" else budget,
        **names,
    )


def digest(content: Mapping[str, Any]) -> str:
    """Short SHA-256 of JSON values, for a file's name."""
    text = json.dumps({"version": VERSION, **content}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _grid(grid: Grid) -> Iterator[Cell]:
    axes = (grid.n0, grid.steps, range(grid.seeds), grid.sets, grid.treatments, grid.tuners, grid.objectives)
    fixed = {name: getattr(grid, name) for name in ("rank", "sigma0", "prior_weight", "budget")}
    for n0, steps, seed, name, treatment, tuner, objective in itertools.product(*axes):
        names = {"set": name, "seed": seed, "n0": n0, "steps": steps}
        yield cell(tuner=tuner, objective=objective, treatment=treatment, **names, **fixed)


def _drawn(draws: Draws) -> Iterator[Cell]:
    for place, name in enumerate(draws.sets):
        for seed in range(draws.count):
            rng = np.random.default_rng([place, seed])
            rate, sigma0 = np.log(draws.rate), np.log(draws.sigma0)
            knobs = {
                "n0": int(rng.choice(draws.n0)),
                "steps": int(rng.choice(draws.steps)),
                "rank": int(rng.choice(draws.rank)),
                "rate": _rounded(np.exp(rng.uniform(*rate))),
                "sigma0": _rounded(np.exp(rng.uniform(*sigma0))),
                "prior_weight": _rounded(rng.uniform(*draws.prior_weight)),
                "budget": _rounded(rng.uniform(*draws.budget)),
            }
            yield cell(tuner="lora", objective="bayes+prior", treatment="advdm", set=name, seed=seed, **knobs)


def _rounded(value: float) -> float:
    """Few digits, so that it reads and hashes the same everywhere."""
    return float(f"{value:.4g}")
