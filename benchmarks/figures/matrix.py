"""The matrix: what each defence leaves of each attack, and which comparisons may be called one."""

import json
import math
from collections.abc import Sequence

from benchmarks.figures import common
from benchmarks.figures.common import number
from benchmarks.harness import RESULTS

FOLDER = RESULTS / "matrix"

ATTACKS = {
    ("AS", "finextract"): "FineXtract, AS",
    ("AS", "cfg"): "guidance, AS",
    ("AUC", "cgi-dm_early"): "CGI-DM, AUC",
    ("AUC", "loss-difference_early"): "loss difference, AUC",
    ("imitation", "samples"): "imitation",
    ("fidelity", "samples"): "fidelity",
    ("diversity", "samples"): "diversity",
}
VIEWS = {"adjacent": "links", "ancestor": "directed paths", "posterior": "links that are likelier than not"}
"""Of what a graph says of a knob and an outcome, for people: `benchmarks.matrix.causes.VIEWS`."""


def main() -> None:
    """Puts the tables into the README."""
    rows, knobs = newest("full") or newest("small"), newest("knobs")
    parts = [defences(rows), comparisons(rows)] if rows else []
    if knobs:
        parts.append(causes(knobs))
    common.into_readme("matrix", "\n\n".join(parts) if parts else "Not measured yet.")


def newest(preset: str) -> list[dict]:
    """Rows of the last complete run of a preset as it is, alone: comparisons are corrected over their own run, so runs do not mix."""
    for path in sorted(FOLDER.glob("*/*.json"), key=lambda path: path.name, reverse=True):
        content = json.loads(path.read_text())
        asked = content["config"]["preset"] == preset and not content["config"]["set"]
        if asked and not any(note.startswith("incomplete") for note in content["notes"]):
            return content["rows"]
    return []


def defences(rows: list[dict]) -> str:
    """Markdown: means over sets, whose intervals over seeds give that of the mean."""
    found: dict[tuple, dict[tuple, list[dict]]] = {}
    for row in rows:
        attack = (row["metric"], row["method"])
        if attack in ATTACKS and row["value"] is not None:
            model = tuple(row["case"][name] for name in ("tuner", "objective", "treatment"))
            found.setdefault(model, {}).setdefault(attack, []).append(row)
    lines = [["tuner", "objective", "pictures", *ATTACKS.values()]]
    for (tuner, *defence), by_attack in found.items():
        lines.append([common.TUNERS.get(tuner, tuner), *defence, *(_mean(by_attack.get(one, ())) for one in ATTACKS)])
    cost = next(row for row in rows if row["metric"] == "processor_time")
    sets = ", ".join(dict.fromkeys(row["case"]["set"] for row in rows if "set" in row["case"]))
    text = f"{cost['n']} models of {sets}; {cost['value']:.1f} hours of a processor core."
    return f"{text} Means over sets, with half the width of 95 % intervals over seeds.\n\n{common.table(lines)}"


def _mean(rows: Sequence[dict]) -> str:
    if not rows:
        return "-"
    value = sum(row["value"] for row in rows) / len(rows)
    half = math.hypot(*((row["high"] - row["low"]) / 2 for row in rows)) / len(rows)
    return f"{value:.2f} ± {half:.2f}"


def comparisons(rows: list[dict]) -> str:
    """Markdown: those that are distinguishable from zero after Holm's correction, the surest first."""
    family = [row for row in rows if row["metric"].endswith(" difference") and "holm" in row["case"]]
    told = sorted((row for row in family if row["case"]["holm"] < 0.05), key=lambda row: row["case"]["holm"])
    lines = [["outcome", "choice", "difference", "of sets like these", "effect size", "p after Holm"]]
    for row in told:
        case = row["case"]
        effect = "-" if case["effect"] is None else f"{case['effect']:+.1f}"
        names = [row["metric"].removesuffix(" difference"), f"{row['method']} over {case['reference']}"]
        several = case["sets_low"] is not None
        like = f"[{case['sets_low']:+.2f}, {case['sets_high']:+.2f}]" if several else "-"
        lines.append([*names, number(row, signed=True), like, effect, f"{case['holm']:.1g}"])
    return f"Distinguishable from zero: {len(told)} of {len(family)} comparisons.\n\n{common.table(lines)}"


def causes(rows: list[dict]) -> str:
    """Markdown: what turning each knob does to each outcome, whether the learnt graph links the two, and how far the graph agrees."""
    effects = {(row["case"]["knob"], row["case"]["outcome"]): row for row in rows if row["metric"] == "effect"}
    outcomes = list(dict.fromkeys(outcome for _, outcome in effects))
    lines = [["knob", *outcomes]]
    for knob in dict.fromkeys(knob for knob, _ in effects):
        cells = []
        for outcome in outcomes:
            row = effects[knob, outcome]
            mark = "**" if row["case"]["holm"] < 0.05 else ""
            cells.append(f"{mark}{row['value']:+.2f}{mark}{', linked' if row['case']['adjacent'] else ''}")
        lines.append([knob, *cells])
    shares = {(row["method"], row["metric"]): row["value"] for row in rows if row["metric"] in ("precision", "recall")}
    shown = "; ".join(
        f"{VIEWS[name]}: precision {shares[name, 'precision']:.2f}, recall {shares[name, 'recall']:.2f}"
        for name in dict.fromkeys(name for name, _ in shares)
    )
    count = next(iter(effects.values()))["n"]
    false = next(row["value"] for row in rows if row["metric"] == "false_links")
    hours = next(row["value"] for row in rows if row["metric"] == "processor_time")
    text = [
        f"{count} LoRA models whose knobs were drawn at random, each of the others; {hours:.1f} hours of a processor core.",
        "Rank correlation of outcomes with knobs, within sets; bold where p < 0.05 after Holm's correction: the knob has an effect.",
        "Linked: `dmsec discover` on the same table has a link there.",
        f"Against the effects in bold, its graph: {shown}; links between knobs, all of them false: {false:.0f}.",
    ]
    return f"{' '.join(text)}\n\n{common.table(lines)}"
