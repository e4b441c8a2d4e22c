"""The report of a causal discovery: which variables are linked, what the data tell of each link, and how that could be wrong."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int8
from markupsafe import Markup

from dmsec_jax.core.files import write_atomically
from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL
from dmsec_jax.report import graph_files, graph_plots, result
from dmsec_jax.report import page as html
from dmsec_jax.report.graph_files import Edge
from dmsec_jax.report.result import Result, Row

DOUBTFUL = (0.1, 0.9)
"""Between these, a link is neither likely nor unlikely."""
LISTED = 60
"""Lines of a table in the page."""
LEGEND = (
    (TAIL, ARROW, "the left causes the right, directly or through variables that are not in the data"),
    (ARROW, ARROW, "neither causes the other: they share a hidden cause"),
    (CIRCLE, ARROW, "the right does not cause the left; the left causes it, or both share a hidden cause"),
    (CIRCLE, CIRCLE, "linked, and the data cannot tell how"),
)
LEGEND_WITHOUT_HIDDEN = (LEGEND[0], (CIRCLE, CIRCLE, "one causes the other, and the data cannot tell which"))
"""Of the family `dag`."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Discovery:
    """A whole run.

    Attributes:
        source, names, num_rows, dropped_rows: of the data.
        transform, family, background: how it was searched; `background` in sentences.
        probability, mag, pag, coef, omega, bic, bics: the outcome, as `discovery.SPOT` has it.
        calibration: of the posterior on held-out data sets, as its card has it.
        notes, command, config, seeds, seconds, inputs: as in `result.Result`.
    """

    source: str
    names: tuple[str, ...]
    num_rows: int
    dropped_rows: int = 0
    transform: str
    family: str
    background: tuple[str, ...] = ()
    probability: Float[np.ndarray, "V V"]
    mag: Int8[np.ndarray, "V V"]
    pag: Int8[np.ndarray, "V V"]
    coef: Float[np.ndarray, "V V"]
    omega: Float[np.ndarray, "V V"]
    bic: float
    bics: Float[np.ndarray, "R"]
    calibration: tuple[dict, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    config: dict = dataclasses.field(default_factory=dict)
    seeds: dict = dataclasses.field(default_factory=dict)
    seconds: dict = dataclasses.field(default_factory=dict)
    inputs: dict = dataclasses.field(default_factory=dict)


def told(run: Discovery) -> list[Edge]:
    """Links with the marks that the data tell, the likeliest first."""
    return graph_files.edges(run.pag, run.probability, run.coef)


def best(run: Discovery) -> list[Edge]:
    """Links of the one graph that fits best."""
    return graph_files.edges(run.mag, run.probability, run.coef)


def sentence(edge: Edge, names: tuple[str, ...], family: str) -> str:
    """What one link says, in words."""
    a, b = names[edge.source], names[edge.target]
    ends = (edge.at_source, edge.at_target)
    if ends == (TAIL, ARROW):
        return f"{a} causes {b}"
    if ends == (ARROW, ARROW):
        return f"{a} and {b} share a hidden cause"
    if ends == (CIRCLE, ARROW):
        return f"{b} does not cause {a}: {a} causes {b}, or a hidden cause both"
    if family == "dag":
        return f"{a} causes {b} or {b} causes {a}, which cannot be told"
    return f"{a} and {b} are linked, the direction cannot be told"


def headline(run: Discovery) -> str:
    """The outcome in one sentence."""
    links, size = told(run), len(run.names)
    if not links:
        return f"No link between any of the {size} variables was found."
    count = lambda *ends: sum((edge.at_source, edge.at_target) == ends for edge in links)
    causes, hidden = count(TAIL, ARROW), count(ARROW, ARROW)
    share = f"{len(links)} of {size * (size - 1) // 2} pairs of variables are linked"
    parts = [f"the data tell cause from effect in {causes}"] if causes else []
    parts += [f"show a hidden cause behind {hidden}"] if hidden else []
    rest = len(links) - causes - hidden
    parts += [f"leave {rest} open"] if rest else []
    if not causes and not hidden:
        return f"{share}; for none of them the data tell what causes what."
    text = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    return f"{share}; {text if causes else f'the data {text}'}."


def doubtful(run: Discovery) -> list[tuple[str, str, float, bool]]:
    """Pairs whose link is neither likely nor unlikely: names, probability, and whether it is in the graph; the most doubtful first."""
    pairs = np.argwhere(np.triu((run.probability > DOUBTFUL[0]) & (run.probability < DOUBTFUL[1]), 1)).tolist()
    found = [(run.names[i], run.names[j], float(run.probability[i, j]), bool(run.pag[i, j] != NONE)) for i, j in pairs]
    return sorted(found, key=lambda pair: abs(pair[2] - 0.5))


def rows(run: Discovery) -> tuple[Row, ...]:
    """The figures of `result.json`."""
    size = len(run.names)
    case = {"data": run.source, "variables": size, "rows": run.num_rows, "scale": run.transform}
    names = {"bench": "discover", "method": "spot", "case": case, "n": 1}
    expected = float(np.triu(run.probability, 1).sum())
    return (
        Row(metric="expected_edges", value=expected, unit="edges", **names),
        Row(metric="edges", value=float(len(told(run))), unit="edges", **names),
        Row(metric="extended BIC", value=run.bic, unit="nats x 2", **names),
    )


def page(run: Discovery, written: Result | None = None) -> str:
    """The whole report as one HTML page; `written` adds versions, device and date."""
    links, graph = told(run), best(run)
    table = [
        (
            edge,
            graph_plots.sample(edge.at_source, edge.at_target, edge.probability),
            sentence(edge, run.names, run.family),
        )
        for edge in links[:LISTED]
    ]
    return html.render(
        "discovery",
        run=run,
        headline=headline(run),
        picture=graph_plots.drawing(run.names, links, headline(run)),
        best=graph_plots.drawing(run.names, graph, "The graph of the lowest extended BIC"),
        heat=graph_plots.heat_map(run.names, run.probability, "Probability of a link for every pair"),
        legend=[
            (graph_plots.sample(a, b), text)
            for a, b, text in (LEGEND_WITHOUT_HIDDEN if run.family == "dag" else LEGEND)
        ],
        table=table,
        more=max(0, len(links) - LISTED),
        doubtful=doubtful(run)[:LISTED],
        expected=float(np.triu(run.probability, 1).sum()),
        total=len(links),
        spread=float(np.ptp(run.bics)),
        calibration=run.calibration,
        written=written,
    )


def result_of(run: Discovery) -> Result:
    """What goes into `result.json`: matrices and every edge in `details`."""
    listed = [
        {"source": run.names[e.source], "target": run.names[e.target], "edge": e.symbol, "probability": e.probability}
        for e in told(run)
    ]
    matrices = {name: getattr(run, name) for name in ("mag", "pag", "coef", "omega", "bics")}
    return Result(
        method="spot",
        command=run.command,
        config=run.config,
        seeds=run.seeds,
        inputs=run.inputs,
        seconds=run.seconds,
        rows=rows(run),
        pictures={"graph.svg": "what the data tell", "probabilities.svg": "probability of a link for every pair"},
        details={
            "names": list(run.names),
            "marks": "[i][j] is the mark at j on the edge between i and j: 0 none, 1 circle, 2 arrow, 3 tail",
            "edges": listed,
            "edge_probabilities": run.probability,
            **matrices,
        },
        notes=run.notes,
    )


def write(folder: str | Path, run: Discovery) -> Result:
    """Writes the graphs for other programs, both pictures, `report.html` and, last, `result.json`; raises OSError if one cannot be written."""
    folder = Path(folder)
    for name, links in (("graph", told(run)), ("best", best(run))):
        write_atomically(folder / f"{name}.graphml", graph_files.graphml(run.names, links).encode())
        write_atomically(folder / f"{name}.dot", graph_files.dot(run.names, links).encode())
    pictures: dict[str, Markup] = {
        "graph": graph_plots.drawing(run.names, told(run), headline(run)),
        "probabilities": graph_plots.heat_map(run.names, run.probability, "Probability of a link for every pair"),
    }
    for name, svg in pictures.items():
        write_atomically(folder / f"{name}.svg", graph_plots.standalone(svg).encode())
    written = result_of(run)
    html.write(folder / "report.html", page(run, written))
    result.write(folder / "result.json", written)
    return written


def summary(run: Discovery) -> str:
    """The outcome for a terminal."""
    lines = [headline(run), ""]
    lines += [
        f"  {edge.probability:5.0%}  {html.printable(run.names[edge.source])} {edge.symbol} {html.printable(run.names[edge.target])}"
        for edge in told(run)[:30]
    ]
    return "\n".join(lines)
