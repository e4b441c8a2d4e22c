"""The report of an authentication: a page for people, a summary for the terminal, rows for tables, all of it as files."""

import dataclasses
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmsec_jax.data.images import save_png
from dmsec_jax.metrics import evidence
from dmsec_jax.report import page as html
from dmsec_jax.report import plots, result
from dmsec_jax.report.authentication_data import Authentication, Outcome, Recovered, scaled
from dmsec_jax.report.authentication_verdict import LEVEL, Finding, finding, verdict
from dmsec_jax.report.page import Picture
from dmsec_jax.report.result import Result, Row, row_over

__all__ = ["Authentication", "Outcome", "Recovered", "page", "result_of", "rows", "summary", "write"]
SHOWN = 24
"""Pictures shown at once; the rest folds away."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One picture, what CGI-DM was given and what it made of it, its score, and what that proves."""

    name: str
    picture: Picture
    partial: Picture | None
    recovered: Picture | None
    error: float
    score: float
    p_value: float
    claimed: bool


def page(found: Authentication, written: Result | None = None) -> str:
    """The whole report as one HTML page; `written` adds versions, device and date."""
    judged = verdict(found)
    findings = [finding(test, found.seed) for test in found.tests]
    known = found.non_members is not None
    strips = [plots.Strip(test.label, *scaled(test)) for test in found.tests] if known else []
    return html.render(
        "authentication",
        found=found,
        verdict=judged,
        written=written,
        findings=list(zip(found.tests, findings, strict=True)),
        lines=_lines(found, judged.finding),
        null_lines=_null_lines(found) if known else [],
        strips=plots.strips(strips, None, "score, in standard deviations of the non-members") if strips else None,
        curve=plots.roc([(test.label, evidence.roc(test.scores, test.null)) for test in found.tests])
        if known
        else None,
        between=html.between,
        level=LEVEL,
        shown=SHOWN,
    )


def summary(found: Authentication) -> str:
    """The outcome on one screen of a terminal: at most 24 lines of 80 columns, plain text."""
    judged = verdict(found)
    lines = [
        html.cut(f"Model    {html.printable(found.tuned)}", 80),
        html.cut(f"Prompt   {html.printable(found.prompt)}", 80),
        "",
        *(line for text in (judged.headline, *judged.reasons) for line in textwrap.wrap(text, 80)),
    ]
    if judged.finding is not None:
        lines += ["", f"{'test':32}{'UNet calls':>11}{'p (set)':>10}{'AUC':>7}{'95 % interval':>16}"]
        lines += [_summary_line(test, finding(test, found.seed)) for test in found.tests[:8]]
    return "\n".join(lines)


def rows(found: Authentication, case: Mapping[str, Any]) -> tuple[Row, ...]:
    """Tidy rows per test: AUC, TPR@1%FPR, the p-value of the set, pictures claimed; `case` names the run, `evaluations` is added.

    Intervals are over pictures, of this one pair of models.
    """
    made = []
    for test in found.tests:
        own = finding(test, found.seed)
        if own is None:
            continue
        names = {"bench": "authentication", "method": test.name, "case": {**case, "evaluations": test.evaluations}}
        rate = own.rate
        made += [
            row_over(own.auc, metric="AUC", unit="share", **names),
            Row(
                metric="TPR@1%FPR", value=rate.value, low=rate.low, high=rate.high, n=rate.total, unit="share", **names
            ),
            Row(metric="p_value", value=own.whole.p_value, n=own.whole.permutations, unit="probability", **names),
            Row(metric="claimed", value=own.single / len(found.names), n=len(found.names), unit="share", **names),
        ]
    return tuple(made)


def result_of(found: Authentication, case: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> Result:
    """What goes into `result.json`; `details` holds the verdict and the scores and p-values of every picture."""
    judged = verdict(found)
    tests = {}
    for test in (*found.tests, *([found.control] if found.control else [])):
        own = finding(test, found.seed)
        p = [None] * len(found.names) if own is None else own.p_values.tolist()
        adjusted = [None] * len(found.names) if own is None else own.adjusted.tolist()
        scored = zip(found.names, np.asarray(test.scores).tolist(), p, adjusted, strict=True)
        tests[test.name] = {
            "label": test.label,
            "evaluations": test.evaluations,
            "pictures": [dict(zip(("picture", "score", "p_value", "adjusted"), one, strict=True)) for one in scored],
            "non_members": None
            if test.null is None
            else [
                {"picture": name, "score": score}
                for name, score in zip(found.non_member_names, np.asarray(test.null).tolist(), strict=True)
            ],
        }
    return Result(
        method=found.main.name,
        command=found.command,
        config=found.config,
        seeds=found.seeds,
        inputs=found.inputs,
        seconds=found.seconds,
        rows=rows(found, case),
        pictures=dict(pictures or {}),
        details={
            "verdict": {"kind": judged.kind, "headline": judged.headline, "reasons": judged.reasons},
            "control_p_value": None if judged.control is None else judged.control.p_value,
            "prompt": found.prompt,
            "tests": tests,
        },
        notes=found.notes,
    )


def write(folder: str | Path, found: Authentication, case: Mapping[str, Any]) -> Result:
    """Writes pictures, `report.html` and, last, `result.json` into `folder`; each file whole or not at all.

    Raises:
        OSError: if a file cannot be written, for instance because the disk is full.
    """
    folder = Path(folder)
    made = {}
    sets = {
        "pictures": (found.pictures, found.recovered),
        "non-members": (found.non_members, found.non_members_recovered),
    }
    for name, (images, recovered) in sets.items():
        if recovered is not None:
            path = f"pictures/{name}.png"
            sheet = np.concatenate([np.asarray(part) for part in (images, recovered.partial, recovered.images)])
            save_png(folder / path, html.contact(sheet, len(images)))
            made[path] = "first row: pictures; second: what CGI-DM was given; third: what it made of it"
    written = result_of(found, case, made)
    html.write(folder / "report.html", page(found, written))
    result.replace(folder, written)
    return written


def _lines(found: Authentication, own: Finding | None) -> list[Line]:
    """One line per picture in question, highest score first."""
    lines = _lines_of(found.pictures, found.names, found.main.scores, found.recovered, "picture")
    if own is not None:
        judged = zip(lines, own.p_values, own.adjusted, strict=True)
        lines = [dataclasses.replace(line, p_value=float(p), claimed=bool(q <= LEVEL)) for line, p, q in judged]
    return sorted(lines, key=lambda line: -line.score)


def _null_lines(found: Authentication) -> list[Line]:
    lines = _lines_of(
        found.non_members, found.non_member_names, found.main.null, found.non_members_recovered, "non-member"
    )
    return sorted(lines, key=lambda line: -line.score)


def _lines_of(images, names, scores, recovered: Recovered | None, kind: str) -> list[Line]:
    shown = lambda part, i, alt: None if part is None else html.picture(np.asarray(part)[i], alt)
    partial, completed = (None, None) if recovered is None else (recovered.partial, recovered.images)
    return [
        Line(
            name=name,
            picture=html.picture(np.asarray(images)[i], f"{kind} {name}"),
            partial=shown(partial, i, f"what CGI-DM was given of {name}"),
            recovered=shown(completed, i, f"what CGI-DM made of {name}"),
            error=float("nan") if recovered is None else float(recovered.error[i]),
            score=float(scores[i]),
            p_value=float("nan"),
            claimed=False,
        )
        for i, name in enumerate(names)
    ]


def _summary_line(test: Outcome, own: Finding) -> str:
    interval = html.between(own.auc.low, own.auc.high)
    p = "<0.001" if own.whole.p_value < 1e-3 else f"{own.whole.p_value:.3f}"
    return f"{html.printable(test.label)[:31]:32}{test.evaluations:>11,}{p:>10}{own.auc.value:>7.2f}{interval:>16}"
