"""`python -m benchmarks.spot`: how right is the posterior over skeletons, what does it add to the search, how do other programs fare, how fast is it?

Suite `accuracy`, in parts
    calibration   probabilities against frequencies on data sets of the posterior's own prior, never seen in training
    generator     the paper's generator, raw and standardised
    networks      four gene and plant networks with their coefficients, a tenth of the vertices hidden
    sachs         11 proteins of 7466 cells
    structures    four medical and other networks with drawn mechanisms, linear and not, a tenth of the vertices hidden
    dag           no hidden causes: NOTEARS with a smooth L0, with and without the posterior as its guide

Suite `speed`: `benchmarks.causal.speed`.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.causal import judging, methods, networks, peers, speed
from benchmarks.causal.judging import Answer
from benchmarks.causal.networks import Case
from dmsec_jax import discovery
from dmsec_jax.causal import climb, features, rows, sem
from dmsec_jax.checkpoints import skeleton as stored
from dmsec_jax.checkpoints.skeleton import Posterior
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import sha256
from dmsec_jax.methods import spot as search
from dmsec_jax.pretrain import skeleton as training
from dmsec_jax.report.result import Row

UNCONFOUNDED = dataclasses.replace(sem.SPOT, confounded=(0.0, 0.0))
USUAL = ("posterior", "unguided", "spot", "spot+local", "local", "fci", "fci-andrey", "gfci")
Draws = Iterator[tuple[dict, int, Callable[[], Case]]]
"""(case, number of the data set, what draws it)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Causal discovery benchmark."""

    suite: Literal["accuracy", "speed"] = "accuracy"
    parts: tuple[str, ...] = ("calibration", "generator", "networks", "sachs", "structures", "dag")
    """Of the suite `accuracy`; of `speed`, names of its measurements (default: all)."""
    methods: tuple[str, ...] = USUAL
    """Which are asked, of `benchmarks.causal.methods`."""
    sizes: tuple[int, ...] = (30, 100)
    """Of the parts `generator` and `dag`."""
    networks: tuple[str, ...] = (*networks.GAUSSIAN, *networks.STRUCTURES)
    graphs: int = 20
    """Data sets of each seed in `generator` and `dag`."""
    seeds: int = 3
    hidden_sets: int = 10
    """Of each network and seed."""
    rows: int = 1000
    restarts: int = 2
    """Starts of each search."""
    search_at_most: int = 110
    """Of larger graphs only the posterior, local searches and other programs are asked."""
    held_out: int = 100_000
    """Pairs of variables of each size and seed of `calibration`."""
    posterior: Path = discovery.SHIPPED
    work: Path = Path("out/bench-spot")
    """Answers are kept here; an interrupted benchmark goes on."""


def main(cfg: Config) -> None:
    """Computes the answers that are not yet in `cfg.work`; one result file per part."""
    if cfg.suite == "speed":
        speed.main(
            cfg.parts if cfg.parts != Config().parts else (), stored.read(cfg.posterior, features.COUNT), _settings(cfg)
        )
        return
    unknown = {*cfg.parts} - {"calibration", *PARTS} | {*cfg.methods} - {*methods.ALL}
    require(not unknown, "parts and methods", f"of {', '.join(PARTS)}", ", ".join(unknown), "correct them")
    after = "spot+local" not in cfg.methods or "spot" in cfg.methods
    require(after, "methods", "with spot before spot+local", ", ".join(cfg.methods), "add spot")
    posterior = stored.read(cfg.posterior, features.COUNT)
    for part in cfg.parts:
        began = time.monotonic()
        if part == "calibration":
            found, notes = _calibration(cfg, posterior), ["intervals over seeds, each of so many data sets"]
        else:
            found = judging.rows(_answers(cfg, posterior, part))
            notes = ["Student intervals over data sets; differences are paired by data set"]
        _print(found)
        harness.write("spot", found, _settings(cfg) | {"parts": [part]}, {"all": time.monotonic() - began}, notes)


def _settings(cfg: Config) -> dict:
    return config.to_dict(cfg) | {"work": "", "posterior": cfg.posterior.name}


def _calibration(cfg: Config, posterior: Posterior) -> list[Row]:
    recipe = config.from_dict(training.Recipe, posterior.card["recipe"], "card.recipe")
    found = []
    for size in recipe.check_sizes:
        count = -(-cfg.held_out // (size * (size - 1) // 2))
        keys = {
            seed: jax.random.key(recipe.seed + 2 + seed) for seed in range(cfg.seeds)
        }  # neither training's nor the card's
        draws = {seed: training.held_out(key, posterior.params, recipe, size, count) for seed, key in keys.items()}
        found += judging.calibration(draws, size)
    return found


def _generator(cfg: Config) -> Draws:
    for size, number in _numbers(cfg):
        yield {"data": "generator", "variables": size}, number, partial(_drawn, number, size, cfg.rows, sem.SPOT)


def _networks(cfg: Config) -> Draws:
    for name, number in itertools.product(networks.GAUSSIAN, range(cfg.hidden_sets * cfg.seeds)):
        if name in cfg.networks:
            network = networks.gaussian(name)
            yield {"data": name}, number, partial(networks.linear_case, number, network, cfg.rows)


def _sachs(cfg: Config) -> Draws:
    yield {"data": "sachs"}, 0, networks.sachs


def _structures(cfg: Config) -> Draws:
    counts = range(cfg.hidden_sets * cfg.seeds)
    for name, mechanism, number in itertools.product(networks.STRUCTURES, ("linear", "mlp"), counts):
        if name in cfg.networks:
            network, case = networks.structure(name), {"data": name, "mechanism": mechanism}
            yield case, number, partial(networks.drawn_case, number, network, cfg.rows, mechanism)


def _dag(cfg: Config) -> Draws:
    for size, number in _numbers(cfg):
        case = {"data": "generator without hidden causes", "variables": size}
        yield case, number, partial(_drawn, number, size, cfg.rows, UNCONFOUNDED)


PARTS: dict[str, Callable[[Config], Draws]] = {
    "generator": _generator,
    "networks": _networks,
    "sachs": _sachs,
    "structures": _structures,
    "dag": _dag,
}


def _numbers(cfg: Config) -> Iterator[tuple[int, int]]:
    """(variables, number) of every data set that is drawn; its number is its key."""
    for size, seed, i in itertools.product(cfg.sizes, range(cfg.seeds), range(cfg.graphs)):
        yield size, seed * 1000 + i


def _drawn(number: int, size: int, num_rows: int, prior: sem.Prior) -> Case:
    drawn = rows.simulate(jax.random.key(number), size, num_rows, prior)
    return Case(np.asarray(drawn.data, np.float64), np.asarray(drawn.marks))


def _answers(cfg: Config, posterior: Posterior, part: str) -> Iterator[Answer]:
    """Of every data set, method and scale; kept as they come."""
    console = Console(stderr=True)
    own = [config.to_dict(search.Config()), config.to_dict(climb.Config()), peers.ALPHA]
    settings = json.dumps([cfg.rows, cfg.restarts, sha256(cfg.posterior), own])
    for case, number, draw in PARTS[part](cfg):
        console.print(f"{part} {case} {number}", markup=False, highlight=False)
        place = cfg.work / part / "-".join(str(value) for value in case.values()).replace(" ", "-")
        drawn = harness.kept(place / f"{number}.npz", settings, partial(_as_dict, draw))
        family = "dag" if part == "dag" else "ancestral"
        question = methods.Question(drawn["data"], number, posterior, family, cfg.restarts)
        if question.data.shape[1] > cfg.search_at_most:
            asked = [name for name in cfg.methods if name not in methods.UNITS]
        else:
            asked = cfg.methods
        whole = {"part": part, **case} | {"variables": question.data.shape[1], "rows": len(question.data)}
        earlier: dict[str, dict[str, methods.Marks]] = {}
        for name in asked:
            for scale in methods.scales(name):
                ask = partial(_marks, name, scale, question, earlier.get(scale, {}))
                marks = harness.kept(place / f"{number}-{name}-{scale}.npz", settings, ask)["marks"]
                earlier.setdefault(scale, {})[name] = marks
                yield Answer(whole, number, name, scale, marks, drawn["mag"])


def _as_dict(draw: Callable[[], Case]) -> dict[str, np.ndarray]:
    return draw()._asdict()


def _marks(*question) -> dict[str, np.ndarray]:
    return {"marks": methods.ask(*question)}


def _print(found: list[Row]) -> None:
    lines = [
        [" ".join(str(v) for v in row.case.values()), row.method, row.metric, harness.figure(row), row.n]
        for row in found
    ]
    print(harness.table(["case", "method", "metric", "value [95 %]", "n"], lines))


if __name__ == "__main__":
    main(tyro.cli(Config))
