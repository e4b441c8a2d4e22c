"""The matrix: what each defence leaves of each attack, and which comparisons may be called one."""

import json

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


def main() -> None:
    """Puts the tables into the README."""
    rows, knobs = newest("full") or newest("small"), newest("knobs")
    parts = [defences(rows), comparisons(rows)] if rows else []
    if knobs:
        parts.append(causes(knobs))
    common.into_readme("matrix", "\n\n".join(parts) if parts else "Not measured yet.")


def newest(preset: str) -> list[dict]:
    """Rows of the last complete run of a preset alone: comparisons are corrected over their own run, so runs do not mix."""
    for path in sorted(FOLDER.glob("*/*.json"), key=lambda path: path.name, reverse=True):
        content = json.loads(path.read_text())
        if content["config"]["preset"] == preset and not any(
            note.startswith("incomplete") for note in content["notes"]
        ):
            return content["rows"]
    return []


def defences(rows: list[dict]) -> str:
    """Markdown: means over sets, tuners and seeds."""
    values: dict[tuple, dict[tuple, list[float]]] = {}
    for row in rows:
        attack = (row["metric"], row["method"])
        if attack in ATTACKS and row["value"] is not None:
            defence = (row["case"]["objective"], row["case"]["treatment"])
            values.setdefault(defence, {}).setdefault(attack, []).append(row["value"])
    lines = [["objective", "pictures", *ATTACKS.values()]]
    for defence, found in values.items():
        lines.append(
            [*defence, *(f"{sum(found[one]) / len(found[one]):.2f}" if one in found else "-" for one in ATTACKS)]
        )
    return common.table(lines)


def comparisons(rows: list[dict]) -> str:
    """Markdown: those that are told from zero after Holm's correction, the surest first."""
    family = [row for row in rows if row["metric"].endswith(" difference") and "holm" in row["case"]]
    told = sorted((row for row in family if row["case"]["holm"] < 0.05), key=lambda row: row["case"]["holm"])
    lines = [["outcome", "choice", "difference", "effect size", "p after Holm"]]
    for row in told:
        case = row["case"]
        effect = "-" if case["effect"] is None else f"{case['effect']:+.1f}"
        names = [row["metric"].removesuffix(" difference"), f"{row['method']} over {case['reference']}"]
        lines.append([*names, number(row, signed=True), effect, f"{case['holm']:.1g}"])
    return f"Told from zero: {len(told)} of {len(family)} comparisons.\n\n{common.table(lines)}"


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
        f"{name}: precision {shares[name, 'precision']:.2f}, recall {shares[name, 'recall']:.2f}"
        for name in dict.fromkeys(name for name, _ in shares)
    )
    count = next(iter(effects.values()))["n"]
    text = f"Rank correlation of knobs, drawn at random for {count} models, and outcomes; bold where told from zero after Holm's correction."
    return f"{text} `dmsec discover` on the same table ({shown}):\n\n{common.table(lines)}"
