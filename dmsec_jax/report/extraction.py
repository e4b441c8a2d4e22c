"""The report of an extraction: a page for people, a summary for the terminal, rows for tables, all of it as files."""

import dataclasses
import itertools
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmsec_jax.data.images import save_png
from dmsec_jax.metrics.extraction import Matches
from dmsec_jax.report import page as html
from dmsec_jax.report import plots, result, training
from dmsec_jax.report.extraction_data import Extraction, Method, Threshold, interval_at
from dmsec_jax.report.page import Picture
from dmsec_jax.report.result import Result, Row
from dmsec_jax.report.verdict import tally, verdict

__all__ = ["Extraction", "Method", "Threshold", "page", "result_of", "rows", "summary", "write"]
SHOWN = 24
"""Pictures and clusters shown at once; the rest folds away."""
MOST_LINES = 8
"""Methods in the terminal summary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The best extraction of one picture by one method; "base" is a match that the base model makes too, "shared" one that is closer to
    another picture."""

    picture: Picture | None
    score: float
    state: Literal["match", "shared", "base", "none", "missing"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One picture and its best extraction by each method."""

    name: str
    picture: Picture
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One extracted picture with its cluster; `of` names the pictures it is evidence of, `from_base` says that it matches only such as the
    base model comes as close to."""

    picture: Picture
    size: int
    tightness: float
    base_similarity: float
    from_base: bool
    of: tuple[str, ...]


def page(extraction: Extraction, written: Result | None = None) -> str:
    """The whole report as one HTML page; `written` adds versions, device and date."""
    main = extraction.main
    has_holdouts = extraction.holdouts is not None
    return html.render(
        "extraction",
        extraction=extraction,
        verdict=verdict(extraction),
        written=written,
        lines=_lines(extraction, holdouts=False),
        null_lines=_lines(extraction, holdouts=True) if has_holdouts else [],
        cards={method.name: _cards(extraction, method) for method in extraction.methods},
        samples={m.name: html.tiles(m.samples, f"sample of {m.label}") for m in extraction.methods},
        strips=plots.strips([_strip(method) for method in extraction.methods], extraction.threshold.value),
        course=training.section(extraction.course) if extraction.course else None,
        interval_at=interval_at,
        between=html.between,
        chance=extraction.threshold.chance(max(len(main.extracted), 1)),
        broken=sum(method.generated - method.finite for method in extraction.methods),
        shown=SHOWN,
    )


def summary(extraction: Extraction) -> str:
    """The outcome on one screen of a terminal: at most 24 lines of 80 columns, plain text."""
    found = verdict(extraction)
    threshold, methods = extraction.threshold, extraction.methods
    shown = methods if len(methods) <= MOST_LINES else methods[: MOST_LINES - 1]
    broken = sum(method.generated - method.finite for method in methods)
    first = f"@{extraction.thresholds[0]:g}" if extraction.thresholds else ""
    lines = [
        html.cut(f"Model    {html.printable(extraction.tuned)}", 80),
        html.cut(f"Prompt   {html.printable(extraction.prompt)}", 80),
        "",
        *(line for text in (found.headline, *found.comparison, *found.reasons[:1]) for line in textwrap.wrap(text, 80)),
        "",
        f"{'':25}{'UNet':>9}{'read':>7}{'A-ESR':>8}{'A-ESR':>8}{'average score':>23}",
        f"{'method':25}{'calls':>9}{'out':>7}{first:>8}{'@cal':>8}{'(training / hold-outs)':>23}",
        *(_summary_line(extraction, method) for method in shown),
    ]
    if len(shown) < len(methods):
        lines.append(f"and {len(methods) - len(shown)} more")
    rate = f"{threshold.false_match_rate:.2%} of {threshold.pairs:,} unrelated pairs"
    lines += ["", f"cal: score >= {threshold.value:.2f}, reached by {rate}."]
    if broken:
        lines.append(f"Left out: {broken:,} images with NaN or infinite values.")
    return "\n".join(lines)


def rows(extraction: Extraction, case: Mapping[str, Any]) -> tuple[Row, ...]:
    """Tidy rows: AS and A-ESR at each threshold, per method, before and after clustering, training and hold-outs.

    Intervals are over pictures, of this one run. `case` names the run (`set`, `tuner`, `steps`); `n0`, `stage` (`all`,
    `clustered`) and `pictures` (`training`, `holdout`) are added.
    """
    metrics = {"AS": None, **{f"A-ESR@{tau:g}": tau for tau in extraction.thresholds}}
    metrics["A-ESR@cal"] = extraction.threshold.value
    found = []
    for method, stage, of in itertools.product(extraction.methods, ("clustered", "all"), ("training", "holdout")):
        if of == "holdout" and extraction.holdouts is None:
            continue
        full = {**case, "n0": len(extraction.names), "stage": stage, "pictures": of}
        figures = method.clustered if stage == "clustered" else method.everything
        for metric, tau in metrics.items():
            unit = "cosine" if tau is None else "share"
            names = {"bench": "extraction", "metric": metric, "unit": unit, "method": method.name, "case": full}
            interval = interval_at(figures, tau, holdouts=of == "holdout")
            found.append(result.row_over(interval, **names) if interval else Row(value=None, n=0, **names))
    return tuple(found)


def result_of(extraction: Extraction, case: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> Result:
    """What goes into `result.json`; `details` holds the verdict, the threshold and the scores of every picture."""
    found = verdict(extraction)
    scores = lambda matches, names: (
        None
        if matches is None
        else [
            {"picture": name, "extracted": int(i), "score": float(s)}
            for name, i, s in zip(names, matches.index, matches.score, strict=True)
        ]
    )
    methods = {
        method.name: {
            "label": method.label,
            "evaluations_per_image": method.evaluations,
            "generated": method.generated,
            "finite": method.finite,
            "sizes": method.sizes,
            "tightness": method.tightness,
            "base_similarity": method.base_similarity,
            "training": scores(method.matches, extraction.names),
            "holdouts": scores(method.holdout_matches, extraction.holdout_names),
        }
        for method in extraction.methods
    }
    threshold = dataclasses.asdict(extraction.threshold)
    base = {"training": extraction.base_scores, "holdouts": extraction.holdout_base_scores}
    return Result(
        method=extraction.main.name,
        command=extraction.command,
        config=extraction.config,
        seeds=extraction.seeds,
        inputs=extraction.inputs,
        seconds=extraction.seconds,
        rows=rows(extraction, case),
        pictures=dict(pictures or {}),
        details={
            "verdict": found._asdict(),
            "threshold": threshold,
            "base": base,
            "prompt": extraction.prompt,
            "methods": methods,
            "stages": [] if extraction.course is None else training.stages(extraction.course),
        },
        notes=extraction.notes,
    )


def write(folder: str | Path, extraction: Extraction, case: Mapping[str, Any]) -> Result:
    """Writes pictures, `report.html` and, last, `result.json` into `folder`; each file whole or not at all.

    Raises:
        OSError: if a file cannot be written, for instance because the disk is full.
    """
    folder = Path(folder)
    pictures = _write_pictures(folder, extraction)
    written = result_of(extraction, case, pictures)
    html.write(folder / "report.html", page(extraction, written))
    result.replace(folder, written)
    return written


def _write_pictures(folder: Path, extraction: Extraction) -> dict[str, str]:
    """Sheets of comparisons and samples, and every extracted picture; returns path -> what it shows."""
    made = {}

    def save(name: str, images: np.ndarray, columns: int, shows: str) -> None:
        save_png(folder / "pictures" / f"{name}.png", html.contact(images, columns))
        made[f"pictures/{name}.png"] = shows

    order = "first row: pictures; below: best extraction by " + ", ".join(m.name for m in extraction.methods)
    sets = [("training", extraction.pictures, "matches"), ("holdouts", extraction.holdouts, "holdout_matches")]
    for name, images, attribute in sets:
        if images is not None:
            best = [_best(method, getattr(method, attribute), images) for method in extraction.methods]
            save(name, np.concatenate([images, *best]), len(images), order)
    for method in extraction.methods:
        for rank, image in enumerate(np.asarray(method.extracted), 1):
            name = f"pictures/{method.name}/{rank:03d}.png"
            save_png(folder / name, image)
            made[name] = f"extracted by {method.label}, rank {rank}"
        if len(method.samples):
            save(f"{method.name}-samples", method.samples, 10, f"samples of {method.label}, as they come")
    return made


def _best(method: Method, matches: Matches | None, images: np.ndarray) -> np.ndarray:
    """The best extraction of each of `images`; white where there is none."""
    return np.ones_like(images) if matches is None else np.asarray(method.extracted)[np.asarray(matches.index)]


def _lines(extraction: Extraction, *, holdouts: bool) -> list[Line]:
    """One line per picture, best score of the method in question first."""
    images = extraction.holdouts if holdouts else extraction.pictures
    names = extraction.holdout_names if holdouts else extraction.names
    kind = "hold-out" if holdouts else "training picture"
    matches = [method.holdout_matches if holdouts else method.matches for method in extraction.methods]
    score = np.full(len(names), np.nan) if matches[0] is None else np.asarray(matches[0].score)
    return [
        Line(
            name=names[i],
            picture=html.picture(images[i], f"{kind} {names[i]}"),
            cells=tuple(
                _cell(extraction, m, found, i, names[i], holdouts)
                for m, found in zip(extraction.methods, matches, strict=True)
            ),
        )
        for i in np.argsort(-score, kind="stable").tolist()
    ]


def _cell(extraction: Extraction, method: Method, matches: Matches | None, i: int, name: str, holdouts: bool) -> Cell:
    if matches is None:
        return Cell(picture=None, score=float("nan"), state="missing")
    index, score = int(matches.index[i]), float(matches.score[i])
    matched, base = extraction.matched(matches)[i], extraction.from_base(method, holdouts=holdouts)[i]
    own = extraction.read_out(method, holdouts=holdouts)[i]
    state = "none" if not matched else "base" if base else "match" if own else "shared"
    alt = f"best extraction of {name} by {method.label}, score {score:.2f}"
    return Cell(picture=html.picture(method.extracted[index], alt), score=score, state=state)


def _cards(extraction: Extraction, method: Method) -> list[Card]:
    base_too = extraction.from_base(method)
    matched = extraction.read_out(method)
    excluded = set() if method.matches is None else set(np.asarray(method.matches.index)[base_too].tolist())
    owners: dict[int, list[str]] = {}
    for i in np.flatnonzero(matched):
        owners.setdefault(int(method.matches.index[i]), []).append(extraction.names[i])
    base = method.base_similarity if method.base_similarity is not None else np.full(len(method.extracted), np.nan)
    return [
        Card(
            picture=html.picture(image, f"extracted picture {rank + 1} by {method.label}"),
            size=int(method.sizes[rank]),
            tightness=float(method.tightness[rank]),
            base_similarity=float(base[rank]),
            from_base=rank in excluded and rank not in owners,
            of=tuple(owners.get(rank, ())),
        )
        for rank, image in enumerate(np.asarray(method.extracted))
    ]


def _strip(method: Method) -> plots.Strip:
    scores = [np.zeros(0) if m is None else np.asarray(m.score) for m in (method.matches, method.holdout_matches)]
    return plots.Strip(method.label, *scores)


def _summary_line(extraction: Extraction, method: Method) -> str:
    def figure(threshold: float | None, *, holdouts: bool = False) -> str:
        interval = interval_at(method.clustered, threshold, holdouts=holdouts)
        return html.number(interval.value if interval else None)

    label = html.cut(html.printable(method.label).replace(" = ", "="), 24)  # "FineXtract, w = 2, k = -0.02" just fits
    count = tally(extraction, method)
    first = figure(extraction.thresholds[0]) if extraction.thresholds else ""
    calls, read = f"{method.evaluations * method.generated:,}", f"{count.matched}/{count.total}"
    averages = f"{figure(None)} / {figure(None, holdouts=True)}"
    return f"{label:25}{calls:>9}{read:>7}{first:>8}{figure(extraction.threshold.value):>8}{averages:>23}"
