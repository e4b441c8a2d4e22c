"""The matrix on one page: what each defence leaves of each attack, what it costs, the pictures behind it, and what did not hold."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from benchmarks import claims
from benchmarks.matrix import store
from benchmarks.matrix.causes import VIEWS, Learnt, agreement
from benchmarks.matrix.plan import Cell
from benchmarks.matrix.statistics import FAMILY, Comparison
from benchmarks.matrix.tables import Row
from dmsec_jax.data.images import from_uint8
from dmsec_jax.report import graph_plots
from dmsec_jax.report import page as html

UNDEFENDED = ("plain", "clean")
ATTACKS = {
    "AS_finextract": "FineXtract",
    "AS_cfg": "guidance",
    "AS_plain": "plain sampling",
    "AUC_cgi-dm_early": "CGI-DM",
    "AUC_loss-difference_early": "loss difference",
    "AUC_pfami_early": "PFAMI",
    "imitation": "imitation",
}
WORTH = {"fidelity": "fidelity", "diversity": "diversity", "quality": "quality"}
OBJECTIVES = {
    "plain": "",
    "bayes": "Bayesian",
    "prior": "prior preservation",
    "bayes+prior": "Bayesian, prior preservation",
}
TREATMENTS = {
    "clean": "",
    "noise": "noise",
    "advdm": "AdvDM",
    "sds": "SDS",
    "mist": "Mist",
    "purified": "AdvDM, purified",
}
LEAST = 0.05
"""Leak that makes a field dark at least, so that chance is not shown as a leak where nothing leaks without a defence."""
TUNERS = {"full": "full fine-tuning", "lora": "LoRA", "oft": "OFT"}


class Shaded(NamedTuple):
    """One field of a heat map."""

    text: str
    note: str
    shade: float
    """0 nothing leaks, 1 as much as without a defence."""


class Map(NamedTuple):
    """A heat map."""

    title: str
    caption: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Shaded]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A list, a table or a figure under a heading."""

    title: str
    lines: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    figure: Markup | None = None


def write(
    path: Path,
    work: Path,
    finished: Mapping[str, Cell],
    rows: Sequence[Row],
    found: Sequence[Comparison],
    learnt: Learnt | None,
    notes: Sequence[str],
) -> None:
    """Writes the page of these models; their pictures are read from `work`."""
    tuners = list(dict.fromkeys(row["tuner"] for row in rows))
    maps = [leaks(rows, "Every attack against every defence")]
    if len(tuners) > 1:
        maps += [leaks([row for row in rows if row["tuner"] == one], TUNERS[one]) for one in tuners]
    maps.append(worth(rows))
    sections = [comparisons(found)]
    if learnt is not None:
        sections += causes(learnt)
    sections += [
        Section(title="What we could not reproduce", lines=claims.failed()),
        Section(title="Notes", lines=notes),
    ]
    sets = ", ".join(dict.fromkeys(row["set"] for row in rows))
    page = html.render(
        "heatmap",
        written=None,
        kicker="Fine-tuned diffusion models: extraction, membership, imitation",
        title="Which defence stops which attack?",
        lead=[
            f"{len(rows)} models of {sets}. Figures of a nano model say how methods compare here; they are not the papers' figures.",
            "All questions are about the original pictures, whatever was trained on.",
        ],
        maps=maps,
        drill=drill(work, finished),
        sections=sections,
    )
    html.write(path, page)


def leaks(rows: Sequence[Row], title: str) -> Map:
    """What attacks find under each defence."""
    caption = (
        "Means over sets, seeds and what else varies; the darker, the more of what leaks without a defence is left (white: what is found where "
        "there is nothing to find). Below each figure its difference to no defence. Similarity for extraction, AUC after few steps for "
        "membership, cosine for imitation."
    )

    def shade(column: str, value: float, undefended: float) -> float:
        floor = 0.5 if column.startswith("AUC") else 0.0
        if column.startswith("AS_"):
            floor = mean(rows, column.replace("AS_", "AS-holdout_"))
        return float(np.clip((value - floor) / max(undefended - floor, LEAST), 0, 1))

    return _map(rows, title, caption, ATTACKS, shade)


def worth(rows: Sequence[Row]) -> Map:
    """What the samples are worth under each defence."""
    caption = "Plain samples: likeness to the training pictures, LPIPS between samples, noise. The darker, the more was lost against no defence."
    scale = {column: max(np.std([row[column] for row in rows]), 1e-6) for column in WORTH}
    shade = lambda column, value, undefended: float(np.clip((undefended - value) / (2 * scale[column]), 0, 1))
    return _map(rows, "What the defence costs", caption, WORTH, shade)


def _map(rows: Sequence[Row], title: str, caption: str, columns: Mapping[str, str], shade) -> Map:
    """One line for each defence that occurs, none first."""
    defences = dict.fromkeys((row["objective"], row["treatment"]) for row in rows)
    order = sorted(defences, key=lambda pair: (list(OBJECTIVES).index(pair[0]), list(TREATMENTS).index(pair[1])))
    of = lambda pair: [row for row in rows if (row["objective"], row["treatment"]) == pair]
    base = {column: mean(of(UNDEFENDED), column) if UNDEFENDED in defences else np.nan for column in columns}
    lines = []
    for pair in order:
        fields = []
        for column in columns:
            value, undefended = mean(of(pair), column), base[column]
            known = np.isfinite(undefended)
            note = f"{value - undefended:+.2f}" if known and pair != UNDEFENDED else ""
            fields.append(Shaded(html.number(value), note, shade(column, value, undefended) if known else 0.0))
        lines.append((label(*pair), fields))
    return Map(title, caption, "defence", list(columns.values()), lines)


def mean(rows: Sequence[Row], column: str) -> float:
    return float(np.mean([row[column] for row in rows]))


def label(objective: str, treatment: str) -> str:
    """A defence for people."""
    return " + ".join(filter(None, (TREATMENTS[treatment], OBJECTIVES[objective]))) or "none"


def drill(work: Path, finished: Mapping[str, Cell]) -> list[tuple[str, list[tuple[str, list[html.Picture]]]]]:
    """Pictures of the first tuner and seed of each set and defence: what was trained on, what is drawn, what was extracted.

    Those of all models would make a page of many megabytes; they are in `work`.
    """
    first: dict[tuple, str] = {}
    shown = next(iter(finished.values())).tuner
    for name, cell in finished.items():
        if cell.tuner == shown:
            first.setdefault((cell.set, cell.tuner, cell.objective, cell.treatment), name)
    groups = []
    for (set_name, tuner), members in itertools.groupby(sorted(first), key=lambda key: key[:2]):
        strips = []
        for key in members:
            arrays, defence = store.load(store.path(work, "cells", first[key])), label(*key[2:])
            for kind, caption in (("training", "trained on"), ("samples", "drawn"), ("extracted", "extracted")):
                pictures = from_uint8(arrays[f"pictures/{kind}"])
                strips.append((f"{defence}: {caption}", html.tiles(pictures, f"{defence}, {caption}")))
        groups.append((f"{set_name}, {TUNERS[tuner]}", strips))
    return groups


def comparisons(found: Sequence[Comparison]) -> Section:
    """The family, what may be said of it first."""
    head = ["outcome", "choice", "difference [95 %]", "effect size", "p after Holm", "sets", "distinguishable from zero"]
    lines = [head]
    for one in sorted(found, key=lambda one: one.holm):
        size = "" if one.effect is None else f"{one.effect:+.2f}"
        told = "yes" if one.told else "no"
        span = f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
        lines.append(
            [one.outcome, f"{one.level} over {one.reference}", span, size, f"{one.holm:.2g}", str(one.sets), told]
        )
    text = (
        f"Paired by set and seed, over all other choices; Holm's correction over these {len(found)} comparisons, whose {len(FAMILY)} outcomes were "
        "chosen before any of them was computed. Nothing else on this page is a claim."
    )
    return Section(title="What may be said", lines=[text], table=lines if found else ())


def causes(learnt: Learnt) -> list[Section]:
    """The graph that was learnt, and the effects that the interventions show."""
    graph = graph_plots.drawing(learnt.names, learnt.edges, "Knobs and outcomes")
    parts = [
        f"{learnt.rows} models whose knobs were drawn at random. {learnt.knob_links} links between knobs, all of which are false."
    ]
    for name, says in VIEWS.items():
        score = agreement(learnt.effects, says)
        figures = f"precision {score.precision:.2f}, recall {score.recall:.2f} of {score.true} effects"
        parts.append(f"{name}: {score.found} pairs of knob and outcome, {figures}.")
    lines = [["knob", "outcome", "rank correlation", "p after Holm", "effect", "linked", "path"]]
    for one in learnt.effects:
        marks = ["yes" if value else "no" for value in (one.told, one.adjacent, one.ancestor)]
        lines.append([one.knob, one.outcome, f"{one.rho:+.2f}", f"{one.holm:.2g}", *marks])
    return [
        Section(
            title="Which knobs drive leakage? What dmsec discover says", lines=[*parts, *learnt.notes], figure=graph
        ),
        Section(title="What turning the knobs says", table=lines),
    ]
