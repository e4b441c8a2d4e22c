"""`python -m benchmarks.spot`: how right is the posterior over skeletons, what does it add to the search, and how do other programs fare?

Parts
    calibration   probabilities against frequencies on data sets of the posterior's own prior, never seen in training
    generator     the paper's generator, raw and standardised
    networks      four gene and plant networks with their coefficients, a tenth of the vertices hidden
    sachs         11 proteins of 7466 cells
    structures    four medical and other networks with drawn mechanisms, linear and not, a tenth of the vertices hidden
    dag           no hidden causes: NOTEARS with a smooth L0, with and without the posterior as its guide
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.causal import methods, networks, peers
from benchmarks.causal.networks import Case
from dmsec_jax import discovery
from dmsec_jax.causal import graphs, pag, rows, sem
from dmsec_jax.checkpoints import skeleton as stored
from dmsec_jax.checkpoints.skeleton import Posterior
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import sha256
from dmsec_jax.metrics import graph as metrics
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.pretrain import skeleton as training
from dmsec_jax.report.result import Row, row_over

Answers = dict[str, np.ndarray]
"""Method -> marks [V, V], and `true`; of the posterior, 3 on both ends of likely edges."""
UNCONFOUNDED = dataclasses.replace(sem.SPOT, confounded=(0.0, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Causal discovery benchmark."""

    parts: tuple[str, ...] = ("calibration", "generator", "networks", "sachs", "structures", "dag")
    sizes: tuple[int, ...] = (30, 100)
    """Of the parts `generator` and `dag`."""
    graphs: int = 20
    """Data sets of each seed in `generator` and `dag`."""
    seeds: int = 3
    hidden_sets: int = 10
    """Of each network and seed."""
    rows: int = 1000
    restarts: int = 2
    """Starts of each search."""
    search_at_most: int = 110
    """Of larger graphs only the posterior and other programs are asked."""
    held_out: int = 256
    """Data sets of each size of `calibration`."""
    posterior: Path = discovery.SHIPPED
    work: Path = Path("out/bench-spot")
    """Answers are kept here; an interrupted benchmark goes on."""


def main(cfg: Config) -> None:
    """Computes the answers that are not yet in `cfg.work`; one result file per part."""
    unknown = set(cfg.parts) - {"calibration", *PARTS}
    require(not unknown, "parts", f"of {', '.join(('calibration', *PARTS))}", ", ".join(unknown), "correct them")
    posterior = stored.read(cfg.posterior)
    for part in cfg.parts:
        began = time.monotonic()
        if part == "calibration":
            found, notes = _calibration(cfg, posterior), ["pairs of one data set are not independent: no intervals"]
        else:
            found = _judged(part, PARTS[part](cfg, posterior))
            notes = ["Student intervals over data sets; differences are paired by data set"]
        _print(found)
        settings = config.to_dict(cfg) | {"work": "", "posterior": cfg.posterior.name, "parts": [part]}
        harness.write("spot", found, settings, {"all": time.monotonic() - began}, notes)


def _calibration(cfg: Config, posterior: Posterior) -> list[Row]:
    recipe = config.from_dict(training.Recipe, posterior.card["recipe"], "card.recipe")
    found = []
    for size in recipe.check_sizes:
        key = jax.random.key(recipe.seed + 2)  # neither training's nor that of the card
        probability, adjacent = training.held_out(key, posterior.params, recipe, size, cfg.held_out)
        figures = {
            "ECE": (metrics.expected_calibration_error(probability, adjacent), "share"),
            "expected over true edges": (metrics.sum_ratio(probability, adjacent), "ratio"),
            "log loss": (metrics.log_loss(probability, adjacent), "nats"),
            "AUPRC": (metrics.auprc(probability, adjacent), "share"),
        }
        for metric, (value, unit) in figures.items():
            case = {"part": "calibration", "variables": size}
            names = {"bench": "spot", "method": "posterior", "case": case}
            found.append(Row(metric=metric, value=value, unit=unit, n=cfg.held_out, **names))
    return found


def _generator(cfg: Config, posterior: Posterior) -> Iterator[tuple[dict, int, Answers]]:
    """(case, number of the data set, answers)."""
    guides, scales = ("off", "spot", "prob", "log-odds"), ("raw", "standardised")
    for size, number in _numbers(cfg):
        ask = functools.partial(_all, cfg, posterior, number, guides=guides, scales=scales)
        draw = functools.partial(_drawn, number, size, cfg.rows, sem.SPOT)
        yield {"variables": size}, number, _kept(cfg, f"generator-{size}-{number}", draw, ask)


def _networks(cfg: Config, posterior: Posterior) -> Iterator[tuple[dict, int, Answers]]:
    for name, number in itertools.product(networks.GAUSSIAN, range(cfg.hidden_sets * cfg.seeds)):
        draw = functools.partial(networks.linear_case, number, networks.gaussian(name), cfg.rows)
        ask = functools.partial(_all, cfg, posterior, number)
        yield {"network": name}, number, _kept(cfg, f"networks-{name}-{number}", draw, ask)


def _sachs(cfg: Config, posterior: Posterior) -> Iterator[tuple[dict, int, Answers]]:
    yield {"network": "sachs"}, 0, _kept(cfg, "sachs", networks.sachs, functools.partial(_all, cfg, posterior, 0))


def _structures(cfg: Config, posterior: Posterior) -> Iterator[tuple[dict, int, Answers]]:
    choices = itertools.product(networks.STRUCTURES, ("linear", "mlp"), range(cfg.hidden_sets))
    for name, mechanism, number in choices:
        draw = functools.partial(networks.drawn_case, number, networks.structure(name), cfg.rows, mechanism)
        ask = functools.partial(_all, cfg, posterior, number)
        case = {"network": name, "mechanism": mechanism}
        yield case, number, _kept(cfg, f"structures-{name}-{mechanism}-{number}", draw, ask)


def _dag(cfg: Config, posterior: Posterior) -> Iterator[tuple[dict, int, Answers]]:
    options = {"guides": ("off", "log-odds"), "scales": ("raw", "standardised"), "family": "dag"}
    for size, number in _numbers(cfg):
        ask = functools.partial(_searches, cfg, posterior, number, **options)
        draw = functools.partial(_drawn, number, size, cfg.rows, UNCONFOUNDED)
        yield {"variables": size}, number, _kept(cfg, f"dag-{size}-{number}", draw, ask)


PARTS: dict[str, Callable[[Config, Posterior], Iterator[tuple[dict, int, Answers]]]] = {
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


def _all(cfg, posterior, number, case: Case, guides=("off", "log-odds"), scales=("standardised",)) -> Answers:
    """The posterior, other programs, and the search; by default with the guide that users get, and without."""
    likely = methods.probabilities(posterior, case.data) > 0.5
    answers = {"posterior": (3 * likely).astype(np.int8)}
    answers |= {name: peer(case.data).pag for name, peer in peers.PEERS.items()}
    return answers | _searches(cfg, posterior, number, case, guides, scales)


def _searches(cfg, posterior, number, case: Case, guides, scales, family: discovery.Family = "ancestral") -> Answers:
    if case.data.shape[1] > cfg.search_at_most:
        return {}
    key, probability = jax.random.key(number), methods.probabilities(posterior, case.data)
    return {
        f"search-{guide}-{scale}": methods.search(key, probability, case.data, guide, scale, family, cfg.restarts)
        for guide, scale in itertools.product(guides, scales)
    }


def _kept(cfg: Config, name: str, draw: Callable[[], Case], ask: Callable[[Case], Answers]) -> Answers:
    def compute() -> Answers:
        case = draw()
        return ask(case) | {"true": case.mag}

    settings = json.dumps([cfg.rows, cfg.restarts, cfg.search_at_most, sha256(cfg.posterior)])
    return harness.kept(cfg.work / f"{name}.npz", settings, compute)


def _judged(part: str, answers: Iterator[tuple[dict, int, Answers]]) -> list[Row]:
    """Means over data sets, and differences to the posterior, the first of the other programs and the search without a guide."""
    console = Console(stderr=True)
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for case, number, found in answers:
        console.print(f"{part} {case} {number}", markup=False, highlight=False)
        for method, metric, value in _scores(found):
            values.setdefault((json.dumps({"part": part} | case), method, metric), {})[number] = value
    rows_found = []
    for (case, method, metric), by_number in values.items():
        names = {"bench": "spot", "unit": "ends" if metric == "distance" else "share"}
        case = json.loads(case)
        interval = seed_interval(list(by_number.values()))
        rows_found.append(row_over(interval, metric=metric, method=method, case=case, **names))
        for other in _others(method):
            theirs = values.get((json.dumps(case), other, metric))
            if theirs is not None:
                gaps = seed_interval([by_number[i] - theirs[i] for i in by_number])
                against = case | {"against": other}
                rows_found.append(row_over(gaps, metric=f"{metric} difference", method=method, case=against, **names))
    return rows_found


def _others(method: str) -> tuple[str, ...]:
    """With what a method is compared."""
    if method == "posterior":
        return tuple(peers.PEERS)
    guide, scale = method.removeprefix("search-").rsplit("-", 1) if method.startswith("search-") else ("", "")
    return (f"search-off-{scale}", *peers.PEERS) if guide not in ("", "off") else ()


def _scores(found: Answers) -> Iterator[tuple[str, str, float]]:
    """(method, metric, value): of graphs, as partial ancestral graphs; of the posterior, the skeleton."""
    true = found["true"]
    acyclic = bool(graphs.is_acyclic(graphs.to_edges(true)[0]))  # the consensus of Sachs et al. is not
    true_pag = pag.of_mag(true) if acyclic else None
    for method, marks in found.items():
        if method == "true":
            continue
        yield method, "skeleton F1", metrics.skeleton_scores(marks, true).f1
        if method == "posterior" or true_pag is None:
            continue
        partial = pag.of_mag(marks) if method.startswith("search-") else marks
        yield method, "endpoint F1", metrics.endpoint_scores(partial, true_pag).f1
        yield method, "arrowhead F1", metrics.arrowhead_scores(partial, true_pag).f1
        yield method, "distance", float(metrics.distance(partial, true_pag))


def _print(found: list[Row]) -> None:
    lines = [
        [" ".join(str(v) for v in row.case.values()), row.method, row.metric, harness.figure(row), row.n]
        for row in found
    ]
    print(harness.table(["case", "method", "metric", "value [95 %]", "n"], lines))


if __name__ == "__main__":
    main(tyro.cli(Config))
