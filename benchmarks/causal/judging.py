"""Answers to rows: means over data sets with intervals, and differences that are paired by data set."""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.causal import methods, peers
from dmsec_jax.causal import graphs, pag
from dmsec_jax.core.marks import CIRCLE
from dmsec_jax.metrics import graph as metrics
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.report.result import Row, row_over


class Answer(NamedTuple):
    """One method's graph, or its skeleton, of one data set."""

    case: dict
    """Of the rows: without method and scale."""
    number: int
    method: str
    scale: str
    marks: methods.Marks
    true: methods.Marks


def rows(answers: Iterator[Answer]) -> list[Row]:
    values: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for answer in answers:
        for metric, value in _scores(answer):
            key = json.dumps(answer.case), answer.method, answer.scale, metric
            values.setdefault(key, {})[answer.number] = value
    found = []
    for (case, method, scale, metric), mine in values.items():
        names = {"bench": "spot", "method": method, "unit": "ends" if metric == "SHD" else "share"}
        whole = json.loads(case) | {"scale": scale}
        found.append(row_over(seed_interval(list(mine.values())), metric=metric, case=whole, **names))
        for other in _others(method):
            theirs = values.get((case, other, scale, metric)) or values.get((case, other, "either", metric), {})
            both = sorted(mine.keys() & theirs.keys())
            if both:
                gaps = seed_interval([mine[i] - theirs[i] for i in both])
                against = whole | {"against": other}
                found.append(row_over(gaps, metric=f"{metric} difference", case=against, **names))
    return found


def _others(method: str) -> tuple[str, ...]:
    """With what a method is compared."""
    return {
        "posterior": tuple(peers.PEERS),
        "local": ("posterior", *peers.PEERS),
        "spot": ("unguided", "posterior", *peers.PEERS),
        "spot+local": ("unguided", "spot", "local", "posterior", *peers.PEERS),
    }.get(method, ("unguided",) if method in methods.GUIDES and method != "unguided" else ())


def _scores(answer: Answer) -> Iterator[tuple[str, float]]:
    """(metric, value): of graphs, as partial ancestral graphs; of the posterior, the skeleton."""
    true, marks = answer.true, answer.marks
    yield "skeleton_F1", metrics.skeleton_scores(marks, true).f1
    acyclic = bool(graphs.is_acyclic(graphs.to_edges(true)[0]))  # the consensus of Sachs et al. is not
    if answer.method == "posterior" or not acyclic:
        return
    partial = marks if answer.method in peers.PEERS or (marks == CIRCLE).any() else pag.of_mag(marks)
    true_pag = pag.of_mag(true)
    yield "endpoint_F1", metrics.endpoint_scores(partial, true_pag).f1
    yield "arrowhead_F1", metrics.arrowhead_scores(partial, true_pag).f1
    yield "SHD", float(metrics.distance(partial, true_pag))


def calibration(seeds: Mapping[int, tuple[np.ndarray, np.ndarray]], size: int) -> list[Row]:
    """Of (probabilities, adjacent) of each seed; intervals are over seeds."""
    measures = {
        "ECE": (metrics.expected_calibration_error, "share"),
        "sum_ratio": (metrics.sum_ratio, "ratio"),
        "log_loss": (metrics.log_loss, "nats"),
        "AUPRC": (metrics.auprc, "share"),
    }
    case = {"part": "calibration", "data": "held-out draws of the posterior's prior", "variables": size}
    case |= {"data_sets": sum(len(probability) for probability, _ in seeds.values())}
    names = {"bench": "spot", "method": "posterior", "case": case}
    return [
        row_over(seed_interval([measure(*draws) for draws in seeds.values()]), metric=metric, unit=unit, **names)
        for metric, (measure, unit) in measures.items()
    ]
