"""The claims of the five papers beside what was measured here: directions only, since the papers' figures are of models a hundred times as large.

A claim is judged by differences with intervals, in the newest committed results. A case is a training, of whose lengths differences and ends of
intervals are averaged: the lengths are no independent trials, and such an interval is never too narrow. A case is for the claim where the interval
lies on the claimed side of zero, against it where it lies on the other; one without width is of a measure that never moved, and no case. One rule
for all: `yes` if more than half of the cases are for it and none against; else `in part` or `no` if more are for it or against it than chance
explains, `mixed` if both are, `open` if neither is.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence

from scipy import stats

from benchmarks.figures import common, spot

Row = dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of a paper, and which rows say whether it holds."""

    paper: str
    says: str
    measured: str
    bench: str
    command: str
    chosen: Callable[[Row], bool]
    sign: int = 1
    """Of the difference, if the claim is true."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a claim fares."""

    cases: int
    favour: int
    against: int
    still: int
    """Differences that were zero in every run; no cases."""
    low: float
    high: float
    on: tuple[str, ...]

    @property
    def holds(self) -> str:
        if not self.cases:
            return "cannot be told" if self.still else "not measured yet"
        if 2 * self.favour > self.cases and not self.against:
            return "yes"
        told = self._beyond_chance(self.favour), self._beyond_chance(self.against)
        return {(True, False): "in part", (False, True): "no", (True, True): "mixed", (False, False): "open"}[told]

    def _beyond_chance(self, count: int) -> bool:
        """Whether so many intervals of 95 % lie on one side where there is nothing, in at most one of twenty such tables."""
        return float(stats.binom.sf(count - 1, self.cases, 0.025)) <= 0.05


def _is(metric: str, *methods: str, **case) -> Callable[[Row], bool]:
    """Rows of this metric, of these methods (or methods that start so), and of this case."""
    return lambda row: (
        row["metric"] == metric and row["method"].startswith(methods) and case.items() <= row["case"].items()
    )


def _posterior(metric: str) -> Callable[[Row], bool]:
    """Differences of posteriors to plain fine-tuning, with the usual recipe."""
    return lambda row: (
        _is(metric, "bayes-")(row) and "recipe" not in row["case"] and row["case"].get("steps") in (None, 100)
    )


CLAIMS = (
    Claim(
        paper="AdvDM",
        says="Denoising the protected picture is harder for the attacked model.",
        measured="rise of the held-out loss beyond random noise of the same size",
        bench="protection",
        command="python -m benchmarks.protection",
        chosen=lambda row: _is("loss_rise", "advdm", purifier="none")(row) and row["method"] == "advdm",
    ),
    Claim(
        paper="AdvDM",
        says="A model tuned on protected pictures imitates worse.",
        measured="imitation, protected over clean pictures",
        bench="protection",
        command="python -m benchmarks.protection --tuners full lora",
        chosen=_is("imitation difference", "advdm", purifier="none", against="clean", coverage=1.0),
        sign=-1,
    ),
    Claim(
        paper="AdvDM",
        says="... and it is the attack, not the change of the pixels, that does it.",
        measured="imitation, protected over noised pictures",
        bench="protection",
        command="python -m benchmarks.protection --tuners full lora",
        chosen=_is("imitation difference", "advdm", purifier="none", against="noise", coverage=1.0),
        sign=-1,
    ),
    Claim(
        paper="CGI-DM",
        says="Recovering hidden parts tells members better than earlier tests.",
        measured="AUC of CGI-DM over that of the loss, SecMI, PIA and PFAMI",
        bench="authentication",
        command="python -m benchmarks.authentication",
        chosen=lambda row: _is("AUC difference", "cgi-dm")(row) and row["case"]["against"] in ("loss", "secmi", "pia", "pfami"),
    ),
    Claim(
        paper="Bayesian few-shot",
        says="Samples keep their quality where plain fine-tuning corrupts.",
        measured="dip of quality over the training, posterior over plain",
        bench="corruption",
        command="python -m benchmarks.corruption",
        chosen=_posterior("quality dip difference"),
        sign=-1,
    ),
    Claim(
        paper="Bayesian few-shot",
        says="Samples are more diverse.",
        measured="diversity after 100 steps, posterior over plain",
        bench="corruption",
        command="python -m benchmarks.corruption",
        chosen=_posterior("diversity difference"),
    ),
    Claim(
        paper="Bayesian few-shot",
        says="Samples are more faithful.",
        measured="fidelity after 100 steps, posterior over plain",
        bench="corruption",
        command="python -m benchmarks.corruption",
        chosen=_posterior("fidelity difference"),
    ),
    Claim(
        paper="FineXtract",
        says="Guidance away from the base model extracts more than classifier-free guidance.",
        measured="AS over guidance at equal cost, average linkage",
        bench="extraction",
        command="python -m benchmarks.extraction",
        chosen=_is("AS difference", "finextract", against="cfg", stage="clustered", pictures="training", clustering="agglomerative"),
    ),
    Claim(
        paper="FineXtract",
        says="... and more than plain sampling.",
        measured="AS over plain sampling at equal cost, average linkage",
        bench="extraction",
        command="python -m benchmarks.extraction",
        chosen=_is("AS difference", "finextract", against="plain", stage="clustered", pictures="training", clustering="agglomerative"),
    ),
    Claim(
        paper="SPOT",
        says="The skeleton posterior beats constraint-based search.",
        measured="skeleton F1 of the posterior over FCI's",
        bench="spot",
        command="python -m benchmarks.spot",
        chosen=_is("skeleton_F1 difference", "posterior", against="fci-andrey"),
    ),
    Claim(
        paper="SPOT",
        says="Guided by it the search finds better graphs.",
        measured="skeleton F1 of the guided search over the unguided, standardised data",
        bench="spot",
        command="python -m benchmarks.spot",
        chosen=lambda row: _is("skeleton_F1 difference", "spot", against="unguided", scale="standardised")(row) and row["method"] == "spot",
    ),
)  # fmt: skip
"""In one sentence each."""


def verdict(claim: Claim, rows: Iterable[Row]) -> Verdict:
    """Counts the cases for and against; one without an interval says nothing."""
    known = trainings([row for row in rows if claim.chosen(row) and row["low"] is not None])
    found = [row for row in known if row["low"] < row["high"] or row["value"] != 0]
    low, high = [row["low"] for row in found], [row["high"] for row in found]
    if claim.sign < 0:
        low, high = [-value for value in high], [-value for value in low]
    values = [row["value"] for row in found]
    sets = (row["case"].get("set") or row["case"].get("data") for row in found)
    return Verdict(
        cases=len(found),
        favour=sum(value > 0 for value in low),
        against=sum(value < 0 for value in high),
        still=len(known) - len(found),
        low=min(values, default=0.0),
        high=max(values, default=0.0),
        on=tuple(sorted({str(name) for name in sets if name})),
    )


def trainings(rows: Sequence[Row]) -> list[Row]:
    """One row for those that differ in the length of the training alone: the mean of values and of ends of intervals."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        case = {name: value for name, value in row["case"].items() if name != "steps"}
        alike.setdefault(json.dumps([row["metric"], row["method"], case], sort_keys=True), []).append(
            row | {"case": case}
        )
    mean = lambda found, name: sum(row[name] for row in found) / len(found)
    return [found[0] | {name: mean(found, name) for name in ("value", "low", "high")} for found in alike.values()]


def verdicts() -> list[tuple[Claim, Verdict]]:
    """Every claim, with the committed results."""
    rows = {bench: common.newest(bench) for bench in {claim.bench for claim in CLAIMS} - {"spot"}}
    rows["spot"] = [row for row in spot.newest() if "posterior" not in row["case"]]  # the shipped posterior alone
    return [(claim, verdict(claim, rows[claim.bench])) for claim in CLAIMS]


def failed() -> Sequence[str]:
    """What did not hold, or not everywhere, one sentence each."""
    return [
        f"{claim.paper}: {claim.says} Measured: {claim.measured}; {counted(found)}. Holds: {found.holds}."
        for claim, found in verdicts()
        if found.holds != "yes"
    ]


def counted(found: Verdict) -> str:
    """The cases in words."""
    if not found.cases:
        return f"no difference at all in {found.still}" if found.still else "nothing yet"
    undecided = found.cases - found.favour - found.against
    return f"for it {found.favour}, against it {found.against}, open {undecided}; {found.low:+.2f} to {found.high:+.2f}"
