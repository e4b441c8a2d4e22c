"""The course of fine-tunings on a few pictures, plain and with a posterior over the weights: what improves, what is lost, what is copied."""

import collections

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.common import TUNERS, Study, number
from benchmarks.harness import RESULTS

FOLDER = RESULTS / "corruption"
METHODS = {
    "plain": ("plain", "#777777", "o"),
    "ema": ("moving average", "#2c6fbb", "s"),
    "swa": ("average of weights", "#17a589", "P"),
    "bayes-norm": ("posterior, norms", "#e59866", "^"),
    "bayes-linear": ("posterior, linear", "#c0392b", "v"),
    "bayes-lora-up": ("posterior, LoRA up", "#c0392b", ">"),
    "bayes-oft": ("posterior, OFT", "#c0392b", "<"),
    "fixed-linear": ("fixed sigma, linear", "#b07aa1", "D"),
    "dropout-linear": ("dropout, linear", "#7d8a2e", "*"),
}
CURVES = {
    "fidelity": "fidelity",
    "quality": "quality",
    "diversity": "diversity",
    "copied": "copied",
    "width@0.1": "s1 at t = 0.1 T",
}
EQUAL = {
    "AS": "AS",
    "AUC": "AUC",
    "diversity": "diversity",
}
"""Compared at equal fidelity: metric -> its title."""


def main() -> None:
    """Writes the plots and puts the tables into the README."""
    studies = common.read(FOLDER, _rows, ("set", "tuner", "n0", "recipe"))
    usual = [study for study in studies if not _recipe(study)]
    kinds = collections.Counter((study.name, study.n0) for study in usual)
    tuners = [study for study in usual if kinds[study.name, study.n0] > 1]
    most = {study.name for study in usual if kinds[study.name, study.n0] == 1}
    counts = [study for study in usual if study.name in most and study.tuner == "full"]
    text = f"![Courses of fine-tunings]({plot(tuners, 'corruption')})\n\n"
    if counts:
        text += f"![Courses on fewer and more pictures]({plot(counts, 'counts')})\n\n"
    common.into_readme("corruption", text + table(studies) + costs(common.newest("corruption")))


def _rows(rows: list[dict]) -> list[dict]:
    """Courses, and no costs of a step."""
    return [row for row in rows if "n0" in row["case"]]


def _recipe(study: Study) -> str:
    """What differs from the usual recipe, as people write it."""
    changed = study.rows[0]["case"].get("recipe", "")
    return changed.replace("tune.learning_rate=", "rate ").replace("bayes.sigma0=", "sigma ")


def plot(studies: list[Study], file: str) -> str:
    """One row per figure, one column per study."""
    figure = Figure(figsize=(2.6 * len(studies), 1.9 * len(CURVES)), layout="constrained")
    axes = figure.subplots(len(CURVES), len(studies), squeeze=False, sharey="row")
    for column, study in enumerate(studies):
        for row, (metric, title) in enumerate(CURVES.items()):
            panel = axes[row, column]
            for shift, (method, (name, colour, mark)) in enumerate(METHODS.items()):
                points = [found for found in study.all(metric, method) if found["low"] is not None]
                if not points:
                    continue
                x = np.array([point["case"]["steps"] for point in points]) + 1.2 * (shift - len(METHODS) // 2)
                y = np.array([point["value"] for point in points])
                error = np.abs(np.array([[point[end] for point in points] for end in ("low", "high")]) - y)
                panel.errorbar(x, y, error, marker=mark, ms=3, lw=1.0, elinewidth=0.6, color=colour, label=name)
            panel.grid(axis="y", linewidth=0.3)
            panel.tick_params(labelsize=7)
            if row == 0:
                panel.set_title(study.title, fontsize=8)
                panel.legend(fontsize=5, frameon=False)
            if column == 0:
                panel.set_ylabel(title, fontsize=8)
            if row == len(CURVES) - 1:
                panel.set_xlabel("fine-tuning steps (batch 4)", fontsize=8)
    return common.save(figure, FOLDER / f"{file}.svg")


def table(studies: list[Study]) -> str:
    """Markdown: when copying sets in, how deep the dips are, and what changes at equal fidelity against plain."""
    head = [
        "set",
        "N0",
        "tuner",
        "recipe",
        "method",
        "seeds that copy at the end",
        "before the first step",
        "dip of quality",
        "dip of fidelity",
    ]
    head += [
        "largest s1 over the base model's",
        "noise that comes through by it, over the base model's",
        *(f"{title} at equal fidelity, against plain" for title in EQUAL.values()),
    ]
    lines = [head]
    for study in studies:
        for method, (name, *_) in METHODS.items():
            if study.first("fidelity", method) is None:
                continue
            cells = [_copying(study, method), _copying(study, method, 0)]
            cells += [number(study.first(f"{metric} dip", method)) for metric in ("quality", "fidelity")]
            cells += [number(study.first(f"{figure}_rise@0.1", method)) for figure in ("width", "passed")]
            cells += [number(study.first(f"{metric} at equal fidelity", method), signed=True) for metric in EQUAL]
            lines.append([study.name, str(study.n0), TUNERS[study.tuner], _recipe(study) or "usual", name, *cells])
    return common.table(lines)


def _copying(study: Study, method: str, steps: int | None = None) -> str:
    """How many seeds are at the stage of copying after so many steps; None: at the end."""
    found = {row["case"]["steps"]: row for row in study.all("stage", method, stage="copying")}
    row = found[max(found) if steps is None else steps]
    return f"{round(row['value'] * row['n'])} of {row['n']}"


def costs(rows: list[dict]) -> str:
    """Markdown: what a posterior adds to a training step; nothing where that was not measured."""
    ratios = {"seconds_ratio": "time", "cpu_seconds_ratio": "processor time", "memory_ratio": "compiled memory"}
    found = {(row["case"]["shape"], row["method"], row["metric"]): row for row in rows if row["metric"] in ratios}
    cases = dict.fromkeys((shape, method) for shape, method, _ in found if method != "plain")
    lines = [["network", "posterior, generator or noise in", *ratios.values()]]
    for shape, method in cases:
        cells = [number(found.get((shape, method, metric)), brief=metric == "memory_ratio") for metric in ratios]
        lines.append([shape, method.removeprefix("bayes-"), *cells])
    return f"\n\nA training step over the plain one:\n\n{common.table(lines)}" if cases else ""
