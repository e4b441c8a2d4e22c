"""Causal discovery: skeletons and ends beside other programs, calibration, and times."""

import json

from benchmarks.figures import common
from benchmarks.figures.common import number
from benchmarks.harness import RESULTS
from dmsec_jax import discovery
from dmsec_jax.core.checks import require

FOLDER = RESULTS / "spot"
METHODS = {
    "posterior": "posterior",
    "unguided": "gradients, unguided",
    "spot": "gradients, guided",
    "spot+local": "and local search",
    "local": "local search without gradients",
    "fci": "FCI (causal-learn)",
    "fci-andrey": "FCI (andrey)",
    "gfci": "GFCI (andrey)",
    "boss": "BOSS (andrey)",
}
SEARCHES = ("unguided", "spot", "spot+local")
"""Methods whose number of starts can be chosen."""
IDENTITY = (
    "posterior",
    "part",
    "data",
    "mechanism",
    "variables",
    "scale",
    "against",
    "op",
    "clock",
    "compilation",
    "data_sets",
)
"""What tells rows of one method and metric apart."""


def main() -> None:
    """Puts the tables into the README."""
    rows = newest()
    parts = [accuracy(rows, metric) for metric in ("skeleton_F1", "endpoint_F1")]
    titles = ["Skeleton F1", "Endpoint F1, of partial ancestral graphs", "Calibration", "Time"]
    tables = [*parts, calibration(rows), speed(rows)]
    shown = [f"{title}:\n\n{table}" for title, table in zip(titles, tables, strict=True) if table]
    common.into_readme("spot", "\n\n".join(shown))


def newest() -> list[dict]:
    """The newest row of each identity; files with the names of earlier benchmarks have no `skeleton_F1` and count for nothing."""
    found = {}
    for path in sorted(FOLDER.glob("*/*.json"), key=lambda path: path.name):
        content = json.loads(path.read_text())
        posterior, restarts = content["config"]["posterior"], content["config"].get("restarts")
        for row in content["rows"]:
            if row["method"] in SEARCHES:
                row["case"]["restarts"] = restarts
            if posterior != discovery.SHIPPED.name:
                row["case"]["posterior"] = f"(posterior: {posterior})"
            if " F1" not in row["metric"] and row["metric"] != "distance":
                case = {name: row["case"].get(name) for name in IDENTITY if name != "data_sets" or "op" in row["case"]}
                found[json.dumps([row["metric"], row["method"], case])] = row
    require(len(found) > 0, str(FOLDER), "a folder with results", "none", "run python -m benchmarks.spot")
    return list(found.values())


def accuracy(rows: list[dict], metric: str) -> str:
    """One line for each kind of data and scale; what does not depend on scale stands in both."""
    mine = [row for row in rows if row["metric"] == metric]
    kinds = dict.fromkeys(json.dumps(_kind(row["case"])) for row in mine)
    lines = []
    for kind in kinds:
        here = [row for row in mine if json.dumps(_kind(row["case"])) == kind]
        scales = sorted({row["case"]["scale"] for row in here} - {"either"}) or ["either"]
        for scale in scales:
            of = {row["method"]: row for row in here if row["case"]["scale"] in (scale, "either")}
            name = " ".join(str(part) for part in json.loads(kind) if part is not None)
            count = str(max(row["n"] for row in of.values()))
            lines.append([name, scale, count, *(number(of.get(method)) for method in METHODS)])
    return common.table([["data, variables", "scale", "data sets", *METHODS.values()], *lines]) if lines else ""


def _kind(case: dict) -> list:
    return [case.get(name) for name in ("data", "mechanism", "variables", "posterior")]


def calibration(rows: list[dict]) -> str:
    """ECE and expected over true edges, by size."""
    mine = [row for row in rows if row["case"].get("part") == "calibration" and "data" in row["case"]]
    sizes = sorted({row["case"]["variables"] for row in mine})
    at = lambda size, metric: next((r for r in mine if r["case"]["variables"] == size and r["metric"] == metric), None)
    lines = [
        [
            str(size),
            str(at(size, "ECE")["case"]["data_sets"]),
            *(_fine(at(size, "ECE")), number(at(size, "sum_ratio")), number(at(size, "AUPRC"))),
        ]
        for size in sizes
    ]
    return (
        common.table([["variables", "data sets", "ECE", "expected over true edges", "AUPRC"], *lines]) if lines else ""
    )


def _fine(row: dict) -> str:
    return f"{row['value']:.4f}" if row["low"] is None else f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"


def speed(rows: list[dict]) -> str:
    """Seconds of the processor, and the baselines' over ours."""
    lines = []
    for row in rows:
        case = row["case"]
        if row["metric"] in ("seconds", "ratio", "peak_gib") and case.get("clock", "cpu") == "cpu":
            sets = f", {case['data_sets']} data sets" if "data_sets" in case else ""
            compiled = ", with compilation" if case.get("compilation") else ""
            what = {"seconds": "s", "ratio": "times ours", "peak_gib": "GiB at the peak"}[row["metric"]]
            lines.append(
                [f"{case['op']}{sets}{compiled}", str(case["variables"]), row["method"], f"{_short(row)} {what}"]
            )
    return common.table([["what", "variables", "program", "processor time, one core"], *lines]) if lines else ""


def _short(row: dict) -> str:
    show = lambda value: f"{value:.3g}"
    return show(row["value"]) + ("" if row["low"] is None else f" [{show(row['low'])}, {show(row['high'])}]")
