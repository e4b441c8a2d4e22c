"""Figures as inline SVG: text stays text, and colours are the page's variables, so they follow its light or dark mode."""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsec_jax.finetune.monitor import Measures
from dmsec_jax.metrics.evidence import Roc

INK, MUTED, LINE, MARK, NULL = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
"""Stand-ins that become the CSS variables of `VARIABLES`."""
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", MARK: "--mark", NULL: "--null"}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Strip(NamedTuple):
    """The scores of one method: training pictures [N] and hold-outs [K], K may be 0."""

    label: str
    training: np.ndarray
    holdouts: np.ndarray


@contextmanager
def drawing(width: float, height: float, description: str, prefix: str) -> Iterator[tuple[Axes, list[Markup]]]:
    """Yields axes to draw on and a list that holds the finished SVG afterwards; sizes in inches, 72 units each.

    `prefix` keeps the ids of several figures on one page apart.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": prefix}):
        figure = Figure(figsize=(width, height), layout="constrained")
        finished: list[Markup] = []
        yield figure.add_subplot(), finished
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
        finished.append(_inline(stream.getvalue(), description, prefix))


def strips(lines: Sequence[Strip], threshold: float | None, label: str = "similarity of the best extraction") -> Markup:
    """One line of dots per method: training pictures filled above, hold-outs hollow below, the threshold, if any, dashed."""
    limit = "" if threshold is None else f"; the threshold is {threshold:.2f}"
    description = f"Score of each picture by method{limit}"
    with drawing(5.6, 0.75 + 0.45 * len(lines), description, "strips") as (axes, finished):
        for position, line in enumerate(reversed(lines)):
            axes.axhline(position, color=LINE, linewidth=0.8, zorder=0)
            for scores, lift, face, edge in ((line.training, 0.13, MARK, MARK), (line.holdouts, -0.13, "none", NULL)):
                level = np.full(len(scores), position + lift)
                axes.scatter(scores, level, s=34, facecolors=face, edgecolors=edge, linewidths=1.2, alpha=0.85)
        if threshold is not None:
            axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(lines)), [_shortened(line.label) for line in reversed(lines)])
        axes.set_ylim(-0.55, len(lines) - 0.45)
        axes.set_xlabel(label)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return finished[0]


def roc(curves: Sequence[tuple[str, Roc]]) -> Markup:
    """ROC curves, the first strong, the others faint, with the diagonal of chance."""
    description = f"ROC curves of {', '.join(label for label, _ in curves)}"
    with drawing(5.6, 3.4, description, "roc") as (axes, finished):
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=1, linestyle=(0, (4, 3)))
        styles = itertools.cycle(["-", "--", ":", "-."])
        for i, ((label, found), style) in enumerate(zip(curves, styles, strict=False)):
            look = (
                {"color": MARK, "linewidth": 2.2} if i == 0 else {"color": NULL, "linewidth": 1.2, "linestyle": style}
            )
            axes.step(found.false_positive, found.true_positive, where="post", label=_shortened(label), **look)
        axes.set_xlabel("share of non-members above the threshold")
        axes.set_ylabel("share of your pictures")
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    return finished[0]


def curve(values, first_step: int = 1, prefix: str = "curve") -> Markup:
    """A noisy curve over steps: every value faint, their running mean strong, gaps where values are not finite."""
    values = np.asarray(values, np.float64)
    steps = first_step + np.arange(len(values))
    with drawing(5.6, 2.2, f"Loss over {len(values)} steps", prefix) as (axes, finished):
        axes.plot(steps, values, color=NULL, linewidth=0.6, alpha=0.45)
        axes.plot(steps, running_mean(values), color=MARK, linewidth=1.8)
        known = values[np.isfinite(values)]
        if known.size:
            axes.set_ylim(0, 1.05 * np.quantile(known, 0.99) or 1.0)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
    return finished[0]


TRENDS = {
    "fidelity": "fidelity",
    "noise": "noise",
    "diversity": "diversity",
    "widths": "width s1",
    "drift": "drift",
    "quality": "CLIP-IQA",
    "alignment": "CLIP-T",
}
"""Fields of `Measures` that are plotted where they are known, with their labels."""


def trends(measures: Sequence[Measures], prefix: str = "trend") -> list[Markup]:
    """One small plot over steps for each of `TRENDS`; measurements in the stages corrupting and copying are hollow and square."""
    steps = [found.step for found in measures]
    looks = {"learning": ("o", MARK), "corrupting": ("o", "none"), "copying": ("s", MARK)}
    made = []
    for name, label in TRENDS.items():
        if any(getattr(found, name) is None for found in measures):
            continue
        values = np.array([getattr(found, name) for found in measures], np.float64).reshape(len(steps), -1)
        text = f"{label} at {len(steps)} steps, last {values[-1].mean():.3g} in the stage {measures[-1].stage}"
        with drawing(5.6, 1.3, text, f"{prefix}-{name}") as (axes, finished):
            for line in values.T:
                axes.plot(steps, line, color=NULL, linewidth=1, zorder=0)
                for found, value in zip(measures, line, strict=True):
                    marker, face = looks[found.stage]
                    axes.scatter(found.step, value, s=26, marker=marker, facecolors=face, edgecolors=MARK)
            axes.tick_params(axis="y", labelcolor=MUTED)
            axes.set_ylabel(label)
        made.append(finished[0])
    return made


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values in a centred window of a twentieth of the length (NaN where there are none)."""
    width = max(1, len(values) // 20)
    window = np.ones(2 * (width // 2) + 1)
    finite = np.isfinite(values)
    spread = lambda x: np.convolve(x, window)[width // 2 : width // 2 + len(values)]
    count = spread(finite.astype(float))
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, spread(np.where(finite, values, 0.0)) / count, np.nan)


def _shortened(label: str) -> str:
    text = label if len(label) <= 26 else label[:25] + "…"
    return text.replace("$", r"\$")  # a label is no formula


def _inline(svg: str, description: str, prefix: str) -> Markup:
    """The <svg> element alone, its ids prefixed, its stand-in colours replaced, without fonts or namespaces."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)  # that style would reach the whole page
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    ids = dict(zip(re.findall(r' id="([^"]+)"', svg), (f"{prefix}{n}" for n in itertools.count()), strict=False))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{ids[found[1]]}"', svg)
    svg = re.sub(r'href="#([^"]+)"', lambda found: f'href="#{ids[found[1]]}"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{ids[found[1]]})", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    label = f'role="img" aria-label="{escape(description)}"'
    return Markup(svg.replace("<svg ", f"<svg {label} ", 1))
