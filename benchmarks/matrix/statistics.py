"""What the table says: paired comparisons of each choice with its reference, with intervals, effect sizes and one correction for all of them.

Two models are a pair if they differ in the choice alone. Pairs of one set and seed share pictures, those of a small N0 are among those of a larger,
so their differences are averaged first:
one difference d_sb for each set s and seed b. Over sets the mean of the sets' means is reported, twice: with an interval of the sets at hand (Student
over seeds within sets, Satterthwaite's degrees of freedom), and with one of sets like them (Student over the sets' means). The p-value is that of
the first, corrected by Holm over the whole family; the effect size is the mean over the deviation of d_sb within sets (Cohen's d_z).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks import harness
from benchmarks.matrix.evaluators import EXTRACTIONS, TESTS
from benchmarks.matrix.tables import Row
from dmsec_jax.metrics import evidence
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.report import result

OUTCOMES = {
    **{f"AS_{name}": "cosine" for name in EXTRACTIONS},
    **{f"AUC_{test}_early": "share" for test in TESTS},
    **{f"AUC_{test}": "share" for test in TESTS},
    "separation": "deviations of the hold-outs",
    "imitation": "cosine",
    "frechet": "squared distance",
    "fidelity": "cosine of features, samples and training pictures",
    "quality": "log of the noise that base model or pictures have over that of samples, at most 0",
    "diversity": "LPIPS, pairs of samples",
    "copied": "samples",
}
"""Columns that are compared, with their units."""
FAMILY = (
    "AS_finextract",
    "AS_cfg",
    "AUC_loss-difference_early",
    "AUC_cgi-dm_early",
    "separation",
    "imitation",
    "fidelity",
    "quality",
    "diversity",
)
"""Outcomes of the family that Holm's correction is over: chosen before any comparison. Others are in the table, and no claim is made of them.
`separation` is membership of the finished model, where every AUC ends at 1."""
REFERENCES = {"treatment": ("clean", "noise", "advdm"), "objective": ("plain",), "tuner": ("full",)}
"""Choice -> what its other levels are compared with."""
BLOCK = ("set", "n0", "seed")
FIXED = ("steps", "tuner", "objective", "treatment")
"""Two models are paired if the block and all of these agree but the choice itself."""
LEVEL = 0.05
NOTES = (
    "intervals: 95 %, Student over seeds within sets, whose pictures can overlap; p-values of comparisons are corrected by Holm over the family",
    "AS and membership are of the original pictures, whatever was trained on; AS after average linkage",
    "feature networks: oriented gradients for AS and fidelity, the project's AlexNet for imitation, Frechet distance and LPIPS",
)


class Comparison(NamedTuple):
    """Level minus reference in one outcome."""

    outcome: str
    knob: str
    level: str
    reference: str
    mean: float
    low: float
    high: float
    sets_low: float | None
    """Of sets like these; None with fewer than two."""
    sets_high: float | None
    p: float
    holm: float
    """p corrected over the family; `p` itself until `corrected` did it."""
    effect: float | None
    """None where the differences do not vary."""
    n: int
    """Differences: sets times seeds."""
    sets: int

    @property
    def told(self) -> bool:
        """Whether anything may be said of it."""
        return self.holm < LEVEL


def differences(rows: Sequence[Row], outcome: str, knob: str, level: str, reference: str) -> dict[str, np.ndarray]:
    """Set -> d_sb, one for each seed in which pairs are found."""
    others = tuple(name for name in FIXED if name != knob)
    values = {}
    for row in rows:
        if row[knob] in (level, reference):
            place = tuple(row[name] for name in (*BLOCK, *others))
            values.setdefault(place, {})[row[knob]] = row[outcome]
    blocks: dict[tuple, list[float]] = {}
    for place, pair in values.items():
        if len(pair) == 2:
            blocks.setdefault((place[BLOCK.index("set")], place[BLOCK.index("seed")]), []).append(
                pair[level] - pair[reference]
            )
    by_set: dict[str, list[float]] = {}
    for block, gaps in sorted(blocks.items()):
        by_set.setdefault(block[0], []).append(float(np.mean(gaps)))
    return {name: np.array(gaps) for name, gaps in by_set.items()}


def compare(gaps: dict[str, np.ndarray], *names: str) -> Comparison | None:
    """The comparison of differences by set; None where no set has two, so that nothing is known of chance.

    Args:
        names: outcome, knob, level, reference.
    """
    gaps = {name: values for name, values in gaps.items() if len(values) > 1}
    if not gaps:
        return None
    means = np.array([values.mean() for values in gaps.values()])
    parts = np.array([values.var(ddof=1) / len(values) for values in gaps.values()]) / len(gaps) ** 2
    freedom = np.array([len(values) - 1 for values in gaps.values()])
    mean, error, count = float(means.mean()), math.sqrt(parts.sum()), sum(map(len, gaps.values()))
    if error > 0:
        df = parts.sum() ** 2 / (parts**2 / freedom).sum()
        half = float(stats.t.ppf(0.975, df) * error)
        p = float(2 * stats.t.sf(abs(mean) / error, df))
    else:  # all alike: the least that a test of signs can say
        half, p = 0.0, 1.0 if mean == 0 else min(1.0, 2.0 ** (1 - count))
    spread = math.sqrt(sum(values.var(ddof=1) * (len(values) - 1) for values in gaps.values()) / freedom.sum())
    over = seed_interval(means)
    several = len(means) > 1
    return Comparison(
        *names,
        mean=mean,
        low=mean - half,
        high=mean + half,
        sets_low=over.low if several else None,
        sets_high=over.high if several else None,
        p=p,
        holm=p,
        effect=mean / spread if spread > 0 else None,
        n=count,
        sets=len(gaps),
    )


def corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """With Holm's correction over all of them   (Holm 1979)."""
    adjusted = evidence.holm([one.p for one in found]) if found else []
    return [one._replace(holm=float(p)) for one, p in zip(found, adjusted, strict=True)]


def all_comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """The family: every level of every choice against its references, in every outcome of `FAMILY`."""
    found = []
    for knob, references in REFERENCES.items():
        levels = list(dict.fromkeys(row[knob] for row in rows))
        for outcome, (place, reference), level in itertools.product(FAMILY, enumerate(references), levels):
            if level not in references[: place + 1] and reference in levels:
                names = (outcome, knob, level, reference)
                found.append(compare(differences(rows, *names), *names))
    return corrected([one for one in found if one is not None])


def means(rows: Sequence[Row]) -> list[result.Row]:
    """Rows of each outcome of the family, of each kind of model of each set, over seeds."""
    results = []
    for row in rows:
        case = {name: row[name] for name in ("set", "n0", "steps", "tuner", "objective", "treatment")}
        names = {"bench": "matrix", "case": case}
        for outcome in FAMILY:
            unit = OUTCOMES[outcome]
            metric, _, method = outcome.partition("_")
            results.append(
                {**names, "metric": metric, "method": method or "samples", "unit": unit, "value": row[outcome]}
            )
    return harness.over_seeds(results)


def result_row(one: Comparison) -> result.Row:
    """As a tidy row; p-value and effect size are in its case."""
    over = {"low": one.low, "high": one.high} if one.n > 1 else {}
    case = {
        name: getattr(one, name)
        for name in ("knob", "reference", "sets", "p", "holm", "effect", "sets_low", "sets_high")
    }
    return result.Row(
        bench="matrix", metric=f"{one.outcome} difference", method=one.level, value=one.mean, **over,
        n=one.n, unit=OUTCOMES[one.outcome], case=case,
    )  # fmt: skip


def printed(found: Sequence[Comparison]) -> str:
    """A table for people, a star where something may be said."""
    header = ["outcome", "choice", "level - reference", "difference [95 %]", "effect", "p, Holm", "n"]
    lines = [
        [
            one.outcome,
            one.knob,
            f"{one.level} - {one.reference}",
            f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]",
            "" if one.effect is None else f"{one.effect:+.2f}",
            f"{one.holm:.3g}{' *' if one.told else ''}",
            str(one.n),
        ]
        for one in found
    ]
    return harness.table(header, lines)
