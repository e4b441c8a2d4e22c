import re
from xml.etree import ElementTree

import numpy as np

from dmsec_jax.report import plots

LINES = [
    plots.Strip("Plain <b>&amp;</b> $x_1$", np.array([0.2, 0.9, 0.3]), np.array([0.1, 0.2])),
    plots.Strip("Other", np.array([0.4, 0.5]), np.zeros(0)),
]


def test_strips_are_one_safe_svg_with_text_as_text():
    svg = plots.strips(LINES, 0.5)
    root = ElementTree.fromstring(svg)  # well formed
    texts = ["".join(node.itertext()) for node in root.iter("text")]
    assert "Plain <b>&amp;</b> $x_1$" in texts
    assert "Other" in texts
    assert root.get("role") == "img"
    assert "0.50" in root.get("aria-label")
    assert "http" not in svg
    assert "<style" not in svg
    assert "font-family" not in svg  # the page's own


def test_every_picture_is_a_dot():
    dots = lambda svg: len(re.findall("<use ", svg)) - len(re.findall("<use [^>]*var\\(--line\\)", svg))
    empty = [line._replace(training=np.zeros(0), holdouts=np.zeros(0)) for line in LINES]
    assert dots(plots.strips(LINES, 0.5)) - dots(plots.strips(empty, 0.5)) == 3 + 2 + 2


def test_colours_follow_the_page():
    svg = plots.strips(LINES, 0.5)
    assert not set(plots.VARIABLES) & set(re.findall("#[0-9a-f]{6}", svg))
    assert all(f"var({name})" in svg for name in plots.VARIABLES.values())


def test_ids_of_two_figures_do_not_meet():
    ids = lambda svg: set(re.findall(' id="([^"]+)"', svg))
    first, second = plots.strips(LINES, 0.5), plots.curve(np.arange(9.0))
    assert not ids(first) & ids(second)
    for svg in (first, second):
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
        assert used
        assert set(used) <= ids(svg)


def test_figures_are_the_same_every_time():
    assert plots.curve(np.arange(9.0)) == plots.curve(np.arange(9.0))


def test_running_mean_leaves_out_what_is_not_finite():
    values = np.ones(60)
    values[10], values[30:] = np.inf, np.nan
    mean = plots.running_mean(values)
    assert (mean[:31] == 1).all()
    assert np.isnan(mean[32:]).all()
    steps = np.arange(60.0)
    np.testing.assert_allclose(plots.running_mean(steps)[5:-5], steps[5:-5])  # centred


def test_a_curve_of_nothing_finite_is_drawn():
    assert "<svg" in plots.curve(np.full(5, np.nan))
    assert "<svg" in plots.curve(np.zeros(1))
