"""Every method beside PyTorch on the same weights: ratios, rates, what binds each row, how our side grows, and what compiling takes.

A file counts if it is complete: every baseline took part at full length, both sides had two threads, and the wall clock judged. Each kind of
processor has rows of its own, since PyTorch is not equally good on all; of each row the newest file speaks, with the limits of its own run. Results
of growth count if they are of two threads.
"""

import itertools
import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.harness import RESULTS
from benchmarks.throughput import limits
from benchmarks.throughput.cases import NO_YNNPACK, OURS, PUBLIC, SHARED_CONV, SHARED_NO_YNNPACK, SHARED_ROWS
from benchmarks.throughput.measuring import BEST, OURS_BEST

FOLDER, GROWTH = RESULTS / "throughput", RESULTS / "growth"
THREADS = 2
WAYS = {
    OURS: "one device",
    SHARED_CONV: "one, convolutions by Eigen",
    NO_YNNPACK: "one, all by Eigen",
    SHARED_ROWS: "a device of each core",
    SHARED_NO_YNNPACK: "a device of each core, by Eigen",
}
"""Of using the cores: `benchmarks.throughput.cases`."""
GOAL, LEAD, PUBLIC_LEAD = 1.0, 1.3, 3.0
"""Ratios to reach: in every row and in half of them against the best PyTorch, and in every method against the public structure."""
COLOURS = {BEST: ("best PyTorch", "#c0392b", "o"), PUBLIC: ("structure of the public code", "#2c6fbb", "s")}
HEAD = [
    "row",
    "ours",
    "by",
    "ratio to the best PyTorch",
    "to the public structure",
    "GFLOP/s",
    "of the machine's peak",
    "MB a step",
    "FLOP a byte",
    "bound by",
    "again",
]

Figures = dict[tuple[str, str], dict]
"""(metric, method) -> row, on the wall clock where there is a choice; the limits of the machine among them."""


def main() -> None:
    """Writes the plots and puts the block into the README."""
    common.into_readme("throughput", block(measured(FOLDER), grown(GROWTH)))


def complete(content: dict) -> bool:
    """Whether a result file counts; its rows say how many threads."""
    cfg = content["config"]
    return cfg["clock"] == "wall" and not cfg["peers"] and not cfg["quick"]


def measured(folder: Path) -> dict[str, dict[str, Figures]]:
    """Processor -> `op/shape/batch` -> figures, in the order in which they were measured."""
    found: dict[str, dict[str, Figures]] = {}
    for path in sorted(folder.glob("cpu/*.json"), key=lambda path: path.name):
        content = json.loads(path.read_text())
        if not complete(content):
            continue
        ours = [row for row in content["rows"] if row["case"]["threads"] == THREADS]
        wall = [row for row in ours if row["case"].get("clock", "wall") == "wall"]
        machine: Figures = {}
        for name, rows in itertools.groupby(wall, key=_name):
            figures = {(row["metric"], row["method"]): row for row in rows}
            if not name:
                machine |= figures
            elif ("ratio", BEST) in figures:
                found.setdefault(content["device"]["processor"], {})[name] = machine | figures
    return found


def grown(folder: Path) -> list[dict]:
    """The newest row of each metric and case."""
    found = {}
    for path in sorted(folder.glob("cpu/*.json"), key=lambda path: path.name):
        for row in json.loads(path.read_text())["rows"]:
            if row["case"]["threads"] == THREADS:
                found[json.dumps([row["metric"], row["case"]], sort_keys=True)] = row
    return list(found.values())


def _name(row: dict) -> str:
    return "/".join(str(row["case"][part]) for part in ("op", "shape", "batch")) if "op" in row["case"] else ""


def block(kinds: dict[str, dict[str, Figures]], growth: list[dict]) -> str:
    """Markdown, with the plots written; the processor that was measured last comes first."""
    newest_first = dict(reversed(kinds.items()))
    parts = []
    if kinds:
        plot = ratios(newest_first, FOLDER / "ratios.svg")
        parts += [findings(processor, lines) for processor, lines in newest_first.items()]
        parts += [f"![Ratios of times]({plot})"]
        parts += [f"On {kind(processor)}:\n\n{table(lines)}" for processor, lines in newest_first.items()]
    if growth:
        plot = over_size(growth, GROWTH / "growth.svg")
        parts += [f"![Time over size]({plot})", exponents(growth), compiling(growth)]
    return "\n\n".join(filter(None, parts)) or "Not measured yet."


def kind(processor: str) -> str:
    """A name for people; early results have the architecture alone."""
    return processor if "," in processor else f"{processor} of a kind that is not on record"


def findings(processor: str, lines: dict[str, Figures]) -> str:
    """What the rows of one kind of processor say, as a list under its name and limits."""
    best = {name: figures["ratio", BEST]["value"] for name, figures in lines.items()}
    public = {name: f["ratio", PUBLIC]["value"] for name, f in lines.items() if ("ratio", PUBLIC) in f}
    reached = lambda ratios, goal: f"{sum(ratio >= goal for ratio in ratios.values())} of {len(ratios)} rows"
    found = [
        f"- As fast as the best PyTorch or faster in {reached(best, GOAL)}, {LEAD:g} times and more in {reached(best, LEAD)}.",
        f"- {PUBLIC_LEAD:g} times as fast as the structure of the public code and more in {reached(public, PUBLIC_LEAD)}.",
    ]
    short = lambda ratios, goal: "; ".join(
        f"{name} {ratio:.2f}, bound by {bound(lines[name])}" for name, ratio in ratios.items() if ratio < goal
    )
    for title, ratios, goal in (
        ("Behind", best, GOAL),
        (f"Less than {PUBLIC_LEAD:g} times the public structure", public, PUBLIC_LEAD),
    ):
        if short(ratios, goal):
            found.append(f"- {title}: {short(ratios, goal)}.")
    rows = list(lines.values())
    limit = (
        f"{len(rows)} rows on {kind(processor)}, {THREADS} threads: matrix products reach {_span(rows, 'matrix_peak', 'ours')} GFLOP/s here and "
        f"{_span(rows, 'matrix_peak', 'torch')} in PyTorch, memory {_span(rows, 'bandwidth', 'ours')} GB/s."
    )
    return "\n".join([limit, "", *found])


def _span(rows: list[Figures], *figure: str) -> str:
    values = sorted({round(figures[figure]["value"]) for figures in rows})
    return " to ".join(map(str, dict.fromkeys([values[0], values[-1]])))


def bound(figures: Figures) -> str:
    """By the rule of `limits`."""
    share = lambda metric: figures[metric, "ours"]["value"] if (metric, "ours") in figures else 0.0
    return limits.bound(share("peak_share"), share("memory_share"))


def table(lines: dict[str, Figures]) -> str:
    """Markdown: one line per row, with the command that measures it again."""
    found = [HEAD]
    for name, figures in lines.items():
        show = lambda metric, form, scale=1.0, of=figures: (
            format(scale * of[metric, "ours"]["value"], form) if (metric, "ours") in of else "-"
        )
        which = common.number(figures["ratio", BEST])
        public = common.number(figures.get(("ratio", PUBLIC)))
        peak = f"{show('peak_share', '.0%')} of {figures['matrix_peak', 'ours']['value']:.0f}"
        rates = [show("gflops", ".3g"), peak, show("bytes", ".3g", 1e-6), show("intensity", ".3g")]
        again = f"`python -m benchmarks.throughput --rows {name}`"
        seconds = figures["seconds", OURS_BEST]["value"]
        way = next(way for own, way in WAYS.items() if figures.get(("seconds", own), {}).get("value") == seconds)
        found.append([name, f"{1e3 * seconds:.3g} ms", way, which, public, *rates, bound(figures), again])
    return common.table(found)


def ratios(kinds: dict[str, dict[str, Figures]], path: Path) -> str:
    """Ratio and interval of each row, first above; a panel for each kind of processor."""
    names = list(dict.fromkeys(name for lines in kinds.values() for name in lines))
    figure = Figure(figsize=(3.5 + 3.5 * len(kinds), 0.9 + 0.2 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharex=True, sharey=True)[0]
    for panel, (processor, lines) in zip(panels, kinds.items(), strict=True):
        for method, (label, colour, mark) in COLOURS.items():
            points = {names.index(name): of["ratio", method] for name, of in lines.items() if ("ratio", method) in of}
            if points:
                x = [row["value"] for row in points.values()]
                error = [[abs(row[end] - row["value"]) for row in points.values()] for end in ("low", "high")]
                style = {"fmt": mark, "ms": 4, "elinewidth": 0.8, "color": colour, "label": label}
                panel.errorbar(x, list(points), xerr=error, **style)
        panel.axvline(1.0, color="#999999", linewidth=0.8)
        panel.set_title(kind(processor), fontsize=8)
        panel.set_xlabel("baseline's time over ours")
        panel.grid(axis="x", linewidth=0.3)
    panels[0].set_xscale("log")
    panels[0].set_yticks(range(len(names)), names, fontsize=6)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=7, frameon=False)
    return common.save(figure, path)


def over_size(growth: list[dict], path: Path) -> str:
    """Seconds a step over each kind of size, log-log."""
    points = [row for row in growth if row["metric"] == "seconds"]
    kinds = list(dict.fromkeys(row["case"]["along"] for row in points))
    figure = Figure(figsize=(3.2 * len(kinds), 3), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for panel, along in zip(panels, kinds, strict=True):
        mine = [row for row in points if row["case"]["along"] == along]
        for op in dict.fromkeys(row["case"]["op"] for row in mine):
            line = sorted((row["case"]["size"], row["value"]) for row in mine if row["case"]["op"] == op)
            panel.plot(*zip(*line, strict=True), marker="o", ms=3, lw=1, label=op)
        panel.set(xscale="log", yscale="log", xlabel=along)
        panel.grid(linewidth=0.3)
        panel.legend(fontsize=6, frameon=False)
    panels[0].set_ylabel("seconds a step")
    return common.save(figure, path)


def exponents(growth: list[dict]) -> str:
    """Markdown: how time and peak memory grow, and both at the largest size."""
    mine = [row for row in growth if "along" in row["case"]]
    found = {(row["case"]["op"], row["case"]["along"], row["metric"], row["case"].get("size")): row for row in mine}
    series = dict.fromkeys(key[:2] for key, row in found.items() if row["metric"] == "seconds")
    lines = [
        [
            "row",
            "along",
            "sizes",
            "exponent of time",
            "of peak memory",
            "seconds a step at the largest",
            "peak MB there",
        ]
    ]
    for own in series:
        sizes = sorted(key[3] for key in found if key[:3] == (*own, "seconds"))
        slopes = [common.number(found.get((*own, f"{metric}_exponent", None))) for metric in ("seconds", "peak_bytes")]
        largest, peak = found[*own, "seconds", sizes[-1]], found.get((*own, "peak_bytes", sizes[-1]))
        ends = [f"{largest['value']:.3g}", "-" if peak is None else f"{peak['value'] / 1e6:.3g}"]
        lines.append([*own, f"{sizes[0]} to {sizes[-1]}", *slopes, *ends])
    return common.table(lines)


def compiling(growth: list[dict]) -> str:
    """Markdown: seconds to trace and compile, without and with the persistent cache."""
    rows = [row for row in growth if row["metric"] in ("compile_seconds", "trace_seconds")]
    found = {(_name(row), row["metric"], row["case"]["cache"]): common.number(row) for row in rows}
    columns = [("trace_seconds", "empty"), ("compile_seconds", "empty"), ("compile_seconds", "filled")]
    lines = [
        [name, *(found.get((name, *column), "-") for column in columns)] for name in dict.fromkeys(map(_name, rows))
    ]
    head = ["program", "seconds to trace", "to compile", "to load from the persistent cache"]
    return common.table([head, *lines]) if lines else ""
