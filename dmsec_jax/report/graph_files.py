"""Graphs with marks for other programs: GraphML (networkx, Gephi, yEd, igraph) and DOT (Graphviz)."""

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import Float, Int8

from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL
from dmsec_jax.report.page import printable

MARKS = {CIRCLE: "circle", ARROW: "arrow", TAIL: "tail"}
SHAPES = {CIRCLE: "odot", ARROW: "normal", TAIL: "none"}
"""Graphviz's names of them."""
SYMBOLS = {(TAIL, ARROW): "-->", (ARROW, ARROW): "<->", (CIRCLE, ARROW): "o->", (CIRCLE, CIRCLE): "o-o"}
KEYS = {"source_mark": "string", "target_mark": "string", "probability": "double", "effect": "double"}


class Edge(NamedTuple):
    """One edge, turned so that an arrow, if there is only one, stands at the target."""

    source: int
    target: int
    at_source: int
    at_target: int
    probability: float
    effect: float
    """Coefficient source -> target; 0 where there is none."""

    @property
    def symbol(self) -> str:
        """For example `o->`."""
        return SYMBOLS.get((self.at_source, self.at_target), "---")


def edges(
    marks: Int8[np.ndarray, "V V"], probability: Float[np.ndarray, "V V"], coef: Float[np.ndarray, "V V"]
) -> list[Edge]:
    """Every edge once, the likeliest first."""
    found = []
    for i, j in np.argwhere(np.triu(marks != NONE, 1)).tolist():
        a, b = (j, i) if marks[j, i] == ARROW and marks[i, j] != ARROW else (i, j)
        found.append(Edge(a, b, int(marks[b, a]), int(marks[a, b]), float(probability[a, b]), float(coef[a, b])))
    return sorted(found, key=lambda edge: -edge.probability)


def graphml(names: Sequence[str], listed: Sequence[Edge]) -> str:
    """GraphML; marks, probability and effect are data of the edges, names those of the nodes."""
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<graphml xmlns="http://graphml.graphdrawing.org/xmlns">\n'
    keys = '<key id="name" for="node" attr.name="name" attr.type="string"/>\n'
    keys += "".join(f'<key id="{key}" for="edge" attr.name="{key}" attr.type="{t}"/>\n' for key, t in KEYS.items())
    nodes = "".join(
        f'<node id="n{i}"><data key="name">{escape(printable(name))}</data></node>\n' for i, name in enumerate(names)
    )
    lines = []
    for edge in listed:
        values = (MARKS[edge.at_source], MARKS[edge.at_target], f"{edge.probability:.6g}", f"{edge.effect:.6g}")
        data = "".join(f'<data key="{key}">{value}</data>' for key, value in zip(KEYS, values, strict=True))
        directed = str((edge.at_source, edge.at_target) == (TAIL, ARROW)).lower()
        lines.append(f'<edge source="n{edge.source}" target="n{edge.target}" directed="{directed}">{data}</edge>\n')
    return f'{head}{keys}<graph edgedefault="undirected">\n{nodes}{"".join(lines)}</graph>\n</graphml>\n'


def dot(names: Sequence[str], listed: Sequence[Edge]) -> str:
    """DOT; the width of a line is the probability of its edge."""
    nodes = "".join(f"  n{i} [label={_quoted(name)}];\n" for i, name in enumerate(names))
    lines = [
        f"  n{edge.source} -> n{edge.target} [dir=both, arrowtail={SHAPES[edge.at_source]}, "
        f"arrowhead={SHAPES[edge.at_target]}, penwidth={0.5 + 2.5 * edge.probability:.2f}, "
        f'tooltip="P = {edge.probability:.3f}"];\n'
        for edge in listed
    ]
    return f"digraph {{\n  node [shape=box, style=rounded];\n{nodes}{''.join(lines)}}}\n"


def _quoted(name: str) -> str:
    text = printable(name).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
