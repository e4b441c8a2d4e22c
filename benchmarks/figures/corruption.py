"""The course of fine-tunings on a few pictures, plain and with a posterior over the weights: what improves, what is lost, what is copied."""

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
    """Writes the plot and puts the tables into the README."""
    studies = common.read(FOLDER, _rows)
    text = f"![Courses of fine-tunings]({plot(studies)})\n\n{table(studies)}"
    common.into_readme("corruption", text)


def _rows(rows: list[dict]) -> list[dict]:
    """Courses with the usual recipe; neither costs of a step nor other learning rates."""
    return [row for row in rows if "n0" in row["case"] and "recipe" not in row["case"]]


def plot(studies: list[Study]) -> str:
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
    return common.save(figure, FOLDER / "corruption.svg")


def table(studies: list[Study]) -> str:
    """Markdown: when copying sets in, how deep the dips are, and what changes at equal fidelity against plain."""
    head = ["set", "N0", "tuner", "method", "copying from step", "dip of quality", "dip of fidelity"]
    head += [
        "largest s1 over the base model's",
        *(f"{title} at equal fidelity, against plain" for title in EQUAL.values()),
    ]
    lines = [head]
    for study in studies:
        for method, (name, *_) in METHODS.items():
            if study.first("fidelity", method) is None:
                continue
            cells = [number(study.first("onset", method, stage="copying"))]
            cells += [number(study.first(f"{metric} dip", method)) for metric in ("quality", "fidelity")]
            cells.append(number(study.first("width_rise@0.1", method)))
            cells += [number(study.first(f"{metric} at equal fidelity", method), signed=True) for metric in EQUAL]
            lines.append([study.name, str(study.n0), TUNERS[study.tuner], name, *cells])
    return common.table(lines)
