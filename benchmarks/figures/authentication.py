"""How well members are told from others, over fine-tuning steps and over network evaluations."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.common import TUNERS, Study, number
from benchmarks.harness import RESULTS

FOLDER = RESULTS / "authentication"
METHODS = {
    "loss-difference": ("loss difference", "#c0392b", "o"),
    "loss-difference-independent": ("loss difference, noise apart", "#e59866", "x"),
    "cgi-dm": ("CGI-DM, common noise", "#2c6fbb", "s"),
    "cgi-dm-faithful": ("CGI-DM, public code", "#85b4e0", "P"),
    "loss": ("loss", "#777777", "D"),
    "secmi": ("SecMI", "#7d8a2e", "^"),
    "pia": ("PIA", "#b07aa1", "v"),
    "pfami": ("PFAMI", "#17a589", "<"),
    "clid": ("CLiD", "#b7950b", ">"),
    "gradient-norm": ("gradient norm", "#5d4037", "*"),
}
TABLE = ("loss-difference", "cgi-dm", "cgi-dm-faithful", "loss", "pia", "secmi", "pfami", "clid", "gradient-norm")
GOAL = 0.8
"""Tests are best compared at the number of steps where the mean of their AUC comes nearest to this."""


def main() -> None:
    """Writes the plots and puts the table into the README."""
    studies = common.read(FOLDER, _rows)
    plots = f"![AUC over fine-tuning steps]({over_steps(studies)})\n\n![AUC over evaluations]({over_cost(studies)})"
    common.into_readme("authentication", f"{findings(studies)}\n\n{plots}\n\n{table(studies)}")


def _rows(rows: list[dict]) -> list[dict]:
    """Those of the tests, none of the control."""
    control = any(row["metric"] == "false_positive_rate" for row in rows)
    return [] if control else rows


def findings(studies: list[Study]) -> str:
    """What the rows say, as a list."""
    lines = []
    for study in studies:
        steps = informative(study)
        areas = {method: last(study, "AUC", method, steps=steps) for method in METHODS}
        best = max(areas, key=lambda method: areas[method]["value"])
        others = [areas[best]["value"], *(areas[name]["value"] for name in ("loss-difference", "pfami", "cgi-dm"))]
        lines.append(
            f"  - {study.title}, {steps} steps: {METHODS[best][0]}, {' / '.join(f'{value:.2f}' for value in others)}"
        )
    end = [last(study, "AUC", "cgi-dm", steps=max(study.steps))["value"] for study in studies]
    length = " or ".join(str(steps) for steps in sorted({max(study.steps) for study in studies}))
    lead = lambda study, steps: last(study, "AUC difference", "cgi-dm", steps=steps, against="cgi-dm-faithful")
    gaps = [row for study in studies for steps in study.steps if (row := lead(study, steps)) is not None]
    moved = [row for row in gaps if row["low"] < row["high"]]  # where both are always right, nothing can be told
    told = sum(row["low"] > 0 or row["high"] < 0 for row in moved)
    values = [row["value"] for row in gaps]
    parts = [
        "- The best test at the number of steps that tells most about tests; AUC of it / the loss difference / PFAMI / CGI-DM:",
        *lines,
        f"- After {length} steps CGI-DM is at {min(end):.2f} to {max(end):.2f}.",
        f"- Common noise in CGI-DM over noise for each model: {min(values):+.2f} to {max(values):+.2f} in AUC at equal cost; "
        f"{told} of {len(moved)} intervals exclude zero.",
    ]
    thirds = [row for study in studies for steps in study.steps if (row := at_a_third(study, steps)) is not None]
    if thirds:
        values, moved = [row["value"] for row in thirds], [row for row in thirds if row["low"] < row["high"]]
        below, above = sum(row["high"] < 0 for row in moved), sum(row["low"] > 0 for row in moved)
        parts.append(
            f"- CGI-DM at a third of the evaluations of the public code or less, over the public code at all of them: {np.mean(values):+.2f} in AUC "
            f"on average, {min(values):+.2f} to {max(values):+.2f}; of {len(moved)} intervals {below} lie below zero and {above} above."
        )
    rows = {row["metric"]: row for row in common.newest(FOLDER.name)}
    if "false_positive_rate" in rows:
        row, uniform = rows["false_positive_rate"], rows["uniformity_p_value"]
        accused = round(row["value"] * row["n"])
        parts.append(
            f"- Of {row['n']} models that never saw the pictures {accused} were accused at 5 % (interval {row['low']:.0%} to {row['high']:.0%}); "
            f"p-values of single pictures against a uniform distribution: p = {uniform['value']:.2f}."
        )
    return "\n".join(parts)


def last(study: Study, metric: str, method: str, **case) -> dict | None:
    """The row with the most evaluations, or None."""
    rows = study.all(metric, method, **case)
    return max(rows, key=lambda row: row["case"]["evaluations"]) if rows else None


def at_a_third(study: Study, steps: int) -> dict | None:
    """CGI-DM's lead over the public code at a third of its cost, or None."""
    rows = study.all("AUC difference", "cgi-dm", steps=steps, against="cgi-dm-faithful")
    return next((row for row in rows if "evaluations_against" in row["case"]), None)


def informative(study: Study) -> int:
    """The number of steps with the mean AUC of the tests nearest to `GOAL`."""
    mean = lambda steps: np.mean([last(study, "AUC", method, steps=steps)["value"] for method in METHODS])
    return min(study.steps, key=lambda steps: abs(mean(steps) - GOAL))


def over_steps(studies: list[Study]) -> str:
    """AUC of each test at its highest cost, one panel per study."""
    draw = lambda study, method: [(steps, last(study, "AUC", method, steps=steps)) for steps in study.steps]
    return _plot(studies, draw, lambda study: study.title, "fine-tuning steps (batch 4)", FOLDER / "steps.svg")


def over_cost(studies: list[Study]) -> str:
    """AUC against evaluations, at each study's most informative number of steps."""

    def draw(study: Study, method: str) -> list[tuple[int, dict | None]]:
        found = study.all("AUC", method, steps=informative(study))
        return sorted(((row["case"]["evaluations"], row) for row in found), key=lambda point: point[0])

    title = lambda study: f"{study.title}\n{informative(study)} steps"
    return _plot(studies, draw, title, "network evaluations per picture", FOLDER / "evaluations.svg")


def _plot(
    studies: list[Study],
    draw: Callable[[Study, str], list[tuple[int, dict | None]]],
    title: Callable[[Study], str],
    label: str,
    path: Path,
) -> str:
    """One panel per study and one line, or dot, per test."""
    columns = min(4, len(studies))
    shape = (-(-len(studies) // columns), columns)
    figure = Figure(figsize=(3.3 * shape[1], 2.8 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharey=True)
    for panel in panels.flat[len(studies) :]:
        panel.set_visible(False)
    for panel, study in zip(panels.flat, studies, strict=False):
        for shift, (method, (name, colour, mark)) in enumerate(METHODS.items()):
            points = [(x, row) for x, row in draw(study, method) if row is not None and row["value"] is not None]
            if not points:
                continue
            x = [value * 1.012 ** (shift - len(METHODS) // 2) for value, _ in points]  # side by side, not on top
            y = [row["value"] for _, row in points]
            low, high = (
                [row["value"] if row[end] is None else row[end] for _, row in points] for end in ("low", "high")
            )
            error = np.abs(np.array([low, np.minimum(high, 1)]) - y)
            panel.errorbar(x, y, error, fmt="-", marker=mark, ms=4, lw=1.2, elinewidth=0.6, color=colour, label=name)
        panel.axhline(0.5, color="#999999", linewidth=0.6, linestyle=":")
        panel.set_xscale("log")
        panel.set_ylim(0, 1.03)
        panel.grid(axis="y", linewidth=0.3)
        panel.set_title(title(study), fontsize=9)
        panel.set_xlabel(label, fontsize=8)
    for row in panels:
        row[0].set_ylabel("AUC")
    panels[0, 0].legend(fontsize=6, frameon=False)
    return common.save(figure, path)


def table(studies: list[Study]) -> str:
    """Markdown: AUC of each test at its highest cost, the best transferred accuracy, and CGI-DM's lead over the public code."""
    head = ["set", "N0", "tuner", "steps", *(METHODS[name][0] for name in TABLE)]
    head += [
        "accuracy at a transferred threshold",
        "TPR without a false positive",
        "CGI-DM over public code, equal cost",
    ]
    lines = [head]
    for study in studies:
        for steps in study.steps:
            at = {"steps": steps}
            names = [study.name, str(study.n0), TUNERS[study.tuner], str(steps)]
            areas = [number(last(study, "AUC", method, **at)) for method in TABLE]
            rest = [
                number(last(study, name, "loss-difference", **at)) for name in ("accuracy@transferred", "TPR@1%FPR")
            ]
            lead = last(study, "AUC difference", "cgi-dm", against="cgi-dm-faithful", **at)
            lines.append([*names, *areas, *rest, number(lead, signed=True)])
    return common.table(lines)
