"""Graphs with marks, and probabilities of pairs, as SVG: for a page, whose colours they take, and, by themselves, for a file.

Vertices are placed so that distances in the picture are those along edges (stress majorisation; Gansner, Koren, North, Graph Drawing 2004).
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape
from scipy.sparse import csgraph

from dmsec_jax.core.marks import ARROW, CIRCLE
from dmsec_jax.report.graph_files import Edge
from dmsec_jax.report.page import cut, printable

INK, MUTED, LINE, MARK, NULL, PAPER = (
    f"var(--{name}, {colour})"
    for name, colour in (
        ("ink", "#1d2125"),
        ("muted", "#61676e"),
        ("line", "#e2dfd9"),
        ("mark", "#b3401f"),
        ("null", "#3f6f86"),
        ("paper", "#fbfaf8"),
    )
)
NAME = 18
"""Letters of a name that are shown."""
LETTER, HEIGHT = 6.6, 22.0
"""Width of a letter and height of a vertex, in pixels."""
APART = 118.0
"""Pixels between neighbours."""
HEAD = 9.0
"""Length of an arrowhead; a circle is as long."""


def drawing(names: Sequence[str], edges: Sequence[Edge], description: str) -> Markup:
    """The graph: width and shade of a line are the probability of its edge; a hidden common cause, <->, has a colour of its own."""
    labels = [cut(printable(name), NAME) for name in names]
    half = np.array([[LETTER * len(label) / 2 + 8, HEIGHT / 2] for label in labels])
    place = _layout(len(names), edges)
    place = place - (place - half).min(axis=0) + 14
    width, height = (place + half).max(axis=0) + 14
    lines = [_line(place, half, edge) for edge in edges]
    boxes = [
        f'<g><title>{escape(printable(name))}</title><rect x="{x - a:.1f}" y="{y - b:.1f}" width="{2 * a:.1f}" height="{2 * b:.1f}" rx="6" '
        f'fill="{PAPER}" stroke="{MUTED}"/><text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(label)}</text></g>'
        for name, label, (x, y), (a, b) in zip(names, labels, place, half, strict=True)
    ]
    return _svg(width, height, description, "".join(lines) + "".join(boxes))


def heat_map(names: Sequence[str], probability: Float[np.ndarray, "V V"], description: str) -> Markup:
    """A square for each pair, the darker the likelier an edge; with few variables the figure is written in it, in per cent."""
    size = len(names)
    side = 34.0 if size <= 20 else 22.0 if size <= 40 else 12.0
    labels = [cut(printable(name), NAME) for name in names]
    margin = LETTER * max(map(len, labels)) + 12
    parts = []
    for i, label in enumerate(labels):
        middle = margin + side * (i + 0.5)
        text = escape(label)
        parts.append(f'<text x="{margin - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{text}</text>')
        parts.append(f'<text transform="translate({middle + 4:.1f} {margin - 6:.1f}) rotate(-90)">{text}</text>')
    for i, j in np.argwhere((probability >= 0.005) & ~np.eye(size, dtype=bool)).tolist():
        x, y, p = margin + side * j, margin + side * i, float(probability[i, j])
        title = f"<title>{escape(labels[i])}, {escape(labels[j])}: {p:.1%}</title>"
        square = f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{side - 2:.1f}" height="{side - 2:.1f}" rx="2" fill="{MARK}" fill-opacity="{p:.3f}"/>'
        ink = PAPER if p > 0.55 else INK
        middle = f'x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}"'
        figure = f'<text {middle} text-anchor="middle" font-size="11" fill="{ink}">{100 * p:.0f}</text>'
        parts.append(f"<g>{title}{square}{figure if size <= 20 else ''}</g>")
    whole = margin + side * size
    frame = (
        f'<rect x="{margin}" y="{margin}" width="{side * size}" height="{side * size}" fill="none" stroke="{LINE}"/>'
    )
    return _svg(whole + 6, whole + 6, description, frame + "".join(parts))


def sample(at_source: int, at_target: int, probability: float = 1.0) -> Markup:
    """One edge by itself, for a legend or a table."""
    place, half = np.array([[2.0, 8.0], [54.0, 8.0]]), np.zeros((2, 2))
    edge = Edge(0, 1, at_source, at_target, probability, 0.0)
    return _svg(56, 16, edge.symbol, _line(place, half, edge))


def standalone(svg: Markup) -> str:
    """The same as a file of its own."""
    font = 'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, Helvetica, Arial, sans-serif" style="background:#fbfaf8"'
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + str(svg).replace("<svg ", f"<svg {font} ", 1) + "\n"


def _svg(width: float, height: float, description: str, content: str) -> Markup:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return Markup(
        f'<svg {size} role="img" aria-label="{escape(description)}" font-size="12" fill="{INK}">{content}</svg>'
    )


def _line(place, half, edge: Edge) -> str:
    """A straight line from border to border, with its marks."""
    a, b = place[edge.source], place[edge.target]
    way = b - a
    length = max(float(np.hypot(*way)), 1e-6)
    along = way / length
    start, end = a + along * _inside(half[edge.source], along), b - along * _inside(half[edge.target], along)
    colour = NULL if edge.at_source == edge.at_target == ARROW else INK
    look = f'stroke="{colour}" stroke-opacity="{0.3 + 0.7 * edge.probability:.2f}"'
    inner_start = start + along * (HEAD if edge.at_source in (ARROW, CIRCLE) else 0)
    inner_end = end - along * (HEAD if edge.at_target in (ARROW, CIRCLE) else 0)
    (x1, y1), (x2, y2) = inner_start, inner_end
    line = f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look} stroke-width="{0.8 + 2.2 * edge.probability:.2f}"/>'
    marks = _mark(start, -along, edge.at_source, colour) + _mark(end, along, edge.at_target, colour)
    return f"<g><title>P = {edge.probability:.3f}</title>{line}{marks}</g>"


def _inside(half, along) -> float:
    """How far a line leaves the middle of a box before it meets its border, with a gap."""
    steps = half / np.maximum(np.abs(along), 1e-9)
    return float(steps.min()) + 2.0


def _mark(tip, along, mark: int, colour: str) -> str:
    """An arrowhead with its tip there, a circle that touches it, or nothing."""
    if mark == ARROW:
        back, side = tip - HEAD * along, 0.42 * HEAD * np.array([-along[1], along[0]])
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (tip, back + side, back - side))
        return f'<polygon points="{points}" fill="{colour}"/>'
    if mark == CIRCLE:
        x, y = tip - HEAD / 2 * along
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{HEAD / 2 - 0.6:.1f}" fill="{PAPER}" stroke="{colour}" stroke-width="1.3"/>'
    return ""


def _layout(size: int, edges: Sequence[Edge]) -> Float[np.ndarray, "V 2"]:
    """Positions in pixels, wider than high."""
    graph = np.zeros((size, size))
    for edge in edges:
        graph[edge.source, edge.target] = graph[edge.target, edge.source] = 1
    distance = csgraph.shortest_path(graph, directed=False, unweighted=True)
    reach = distance[np.isfinite(distance)].max(initial=1.0)
    distance = np.where(np.isfinite(distance), distance, reach + 1)
    distance = np.maximum(distance, 1 - np.eye(size))
    turn = 2 * math.pi * np.arange(size) / size
    place = np.stack([np.cos(turn), np.sin(turn)], axis=1) * max(reach / 2, size / 8)
    weight = np.where(np.eye(size, dtype=bool), 0.0, 1 / np.maximum(distance, 1e-9) ** 2)
    laplacian = np.linalg.pinv(np.diag(weight.sum(axis=1)) - weight)
    for _ in range(200):
        gap = place[:, None] - place[None]
        length = np.maximum(np.linalg.norm(gap, axis=-1), 1e-6)
        ratio = weight * distance / length
        place = laplacian @ ((np.diag(ratio.sum(axis=1)) - ratio) @ place)
    return _spread(place) * APART * np.array([1.35, 0.85])


def _spread(place: Float[np.ndarray, "V 2"]) -> Float[np.ndarray, "V 2"]:
    """Lying down, and enlarged where vertices stand closer than 0.6."""
    centred = place - place.mean(axis=0)
    turned = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    gap = np.linalg.norm(turned[:, None] - turned[None], axis=-1) + np.where(np.eye(len(place)), np.inf, 0)
    nearest = np.quantile(gap.min(axis=1), 0.1)
    return turned * max(1.0, 0.6 / max(float(nearest), 0.2))
