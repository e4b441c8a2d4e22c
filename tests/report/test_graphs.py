"""Graphs as files and pictures: every mark at its end, names of strangers harmless."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL
from dmsec_jax.report import discovery, graph_files, graph_plots

NAMES = ("a", '<b> & "c"\\', "d\x07", "e", "alone")
ENDS = {(0, 1): (TAIL, ARROW), (1, 2): (ARROW, ARROW), (3, 2): (CIRCLE, ARROW), (0, 3): (CIRCLE, CIRCLE)}
MARKS = np.full((5, 5), NONE, np.int8)
PROBABILITY = np.zeros((5, 5))
COEF = np.zeros((5, 5))
for n, ((i, j), (at_i, at_j)) in enumerate(ENDS.items()):
    MARKS[j, i], MARKS[i, j] = at_i, at_j
    PROBABILITY[i, j] = PROBABILITY[j, i] = 0.9 - 0.2 * n
COEF[0, 1] = -0.5
EDGES = graph_files.edges(MARKS, PROBABILITY, COEF)


def test_edges_come_once_with_arrows_at_the_target():
    assert {(edge.source, edge.target): (edge.at_source, edge.at_target) for edge in EDGES} == ENDS
    assert [edge.symbol for edge in EDGES] == ["-->", "<->", "o->", "o-o"]
    assert [edge.probability for edge in EDGES] == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert EDGES[0].effect == -0.5
    turned = graph_files.edges(MARKS[::-1, ::-1], PROBABILITY[::-1, ::-1], COEF[::-1, ::-1])
    assert [edge.symbol for edge in turned] == [edge.symbol for edge in EDGES]


def test_graphml_holds_all_marks():
    space = {"g": "http://graphml.graphdrawing.org/xmlns"}
    root = ElementTree.fromstring(graph_files.graphml(NAMES, EDGES))
    labels = {node.get("id"): node.findtext("g:data", None, space) for node in root.iterfind(".//g:node", space)}
    assert labels == {"n0": "a", "n1": '<b> & "c"\\', "n2": "d\ufffd", "n3": "e", "n4": "alone"}
    edges = root.findall(".//g:edge", space)
    data = [{item.get("key"): item.text for item in edge} for edge in edges]
    assert [(edge.get("source"), edge.get("target")) for edge in edges] == [
        ("n0", "n1"),
        ("n1", "n2"),
        ("n3", "n2"),
        ("n0", "n3"),
    ]
    ends = [(item["source_mark"], item["target_mark"]) for item in data]
    assert ends == [("tail", "arrow"), ("arrow", "arrow"), ("circle", "arrow"), ("circle", "circle")]
    assert [edge.get("directed") for edge in edges] == ["true", "false", "false", "false"]
    assert float(data[0]["effect"]) == -0.5


def test_dot_quotes_names_and_shapes_ends():
    text = graph_files.dot(NAMES, EDGES)
    assert 'n1 [label="<b> & \\"c\\"\\\\"];' in text
    assert "n3 -> n2 [dir=both, arrowtail=odot, arrowhead=normal" in text
    assert "n0 -> n1 [dir=both, arrowtail=none, arrowhead=normal" in text


def test_the_drawing_shows_every_mark_and_name():
    svg = graph_plots.drawing(NAMES, EDGES, "a <graph>")
    root = ElementTree.fromstring(svg)
    ends = [end for pair in ENDS.values() for end in pair]
    assert len(root.findall(".//polygon")) == ends.count(ARROW)
    assert len(root.findall(".//circle")) == ends.count(CIRCLE)
    lines = root.findall(".//line")
    assert [float(line.get("stroke-width")) for line in lines] == sorted(
        (float(line.get("stroke-width")) for line in lines), reverse=True
    )
    assert [node.text for node in root.iterfind(".//text")] == ["a", '<b> & "c"\\', "d\ufffd", "e", "alone"]
    middles = np.array([[float(node.get("x")), float(node.get("y"))] for node in root.iterfind(".//text")])
    gaps = np.abs(middles[:, None] - middles[None]).max(axis=-1) + np.where(np.eye(5), np.inf, 0)
    assert gaps.min() > 20  # no name lies on another
    ElementTree.fromstring(graph_plots.standalone(svg))


def test_an_arrowhead_touches_its_vertex():
    pair = graph_files.Edge(0, 1, TAIL, ARROW, 1.0, 0.0)
    root = ElementTree.fromstring(graph_plots.drawing(("one", "two"), [pair], "two"))
    tip = [float(x) for x in root.find(".//polygon").get("points").split()[0].split(",")]
    two = root.findall(".//rect")[1]
    x, y, width, height = (float(two.get(name)) for name in ("x", "y", "width", "height"))
    outside = np.hypot(max(x - tip[0], 0, tip[0] - x - width), max(y - tip[1], 0, tip[1] - y - height))
    assert 0 < outside < 4


def test_the_heat_map_has_a_square_for_each_likely_pair():
    svg = graph_plots.heat_map(NAMES, PROBABILITY, "likely")
    ElementTree.fromstring(svg)
    shades = [float(x) for x in re.findall('fill-opacity="([^"]+)"', svg)]
    assert sorted(shades) == pytest.approx(sorted([0.9, 0.7, 0.5, 0.3] * 2))
    assert "http" not in svg


@pytest.mark.parametrize("size", [3, 40])
def test_graphs_without_edges_can_be_drawn(size):
    ElementTree.fromstring(graph_plots.drawing([f"v{i}" for i in range(size)], [], "empty"))


@pytest.mark.parametrize(
    ("family", "said", "unsaid"),
    [
        ("ancestral", ("share a hidden cause", "the direction cannot be told"), ("No hidden common causes",)),
        (
            "dag",
            ("a causes e or e causes a", "No hidden common causes", "a causes d"),
            ("share a hidden", "both share"),
        ),
    ],
)
def test_the_page_speaks_of_hidden_causes_where_there_can_be_some(family, said, unsaid):
    names = ("a", "d", "e")
    marks = np.zeros((3, 3), np.int8)
    marks[0, 1], marks[1, 0] = ARROW, TAIL
    marks[0, 2] = marks[2, 0] = CIRCLE
    if family == "ancestral":
        marks[1, 2] = marks[2, 1] = ARROW
    probability = np.where(marks, 0.9, 0.0)
    numbers = {"coef": np.zeros((3, 3)), "omega": np.eye(3), "bic": 1.0, "bics": np.ones(2)}
    run = discovery.Discovery(
        source="x.csv", names=names, num_rows=9, transform="standardise", family=family,
        probability=probability, mag=marks, pag=marks, **numbers,
    )  # fmt: skip
    page = discovery.page(run)
    assert [text for text in said if text not in page] == []
    assert [text for text in unsaid if text in page] == []
