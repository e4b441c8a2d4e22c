"""What may be concluded from an authentication, in plain words and with its complement."""

import math
from typing import Literal, NamedTuple

import numpy as np

from dmsec_jax.metrics import evidence
from dmsec_jax.metrics.evidence import Rate, SetEvidence
from dmsec_jax.metrics.extraction import Interval
from dmsec_jax.report.authentication_data import Authentication, Outcome
from dmsec_jax.report.page import rarity

LEVEL = 0.05
"""Risk of a false claim, of the set as a whole and of each picture."""
CONTROL_LEVEL = 0.01
"""If a model that knows neither set tells them apart as surely as this, they differ in kind, and no test can say why."""


class Finding(NamedTuple):
    """What one test says, where non-members are known."""

    whole: SetEvidence
    """Of the set as a whole."""
    p_values: np.ndarray
    """[N] of each picture by itself: no smaller than 1 / (1 + non-members)."""
    adjusted: np.ndarray
    """[N] the same after Benjamini-Hochberg: of the pictures at most `LEVEL`, a share of at most `LEVEL` is expected to be claimed falsely."""
    auc: Interval
    rate: Rate
    """Pictures above all but 1 % of the non-members."""

    @property
    def single(self) -> int:
        """Pictures that can be claimed one by one."""
        return int((self.adjusted <= LEVEL).sum())


class Verdict(NamedTuple):
    kind: Literal["used", "none", "differs", "few", "unknown"]
    headline: str
    reasons: tuple[str, ...]
    finding: Finding | None
    control: SetEvidence | None
    """Two-sided: whether the base model tells the sets apart."""


def finding(test: Outcome, seed: int) -> Finding | None:
    """Statistics of one test; None without non-members."""
    if test.null is None:
        return None
    p_values = evidence.p_values(test.scores, test.null)
    return Finding(
        whole=evidence.set_evidence(seed, test.scores, test.null),
        p_values=p_values,
        adjusted=evidence.benjamini_hochberg(p_values),
        auc=evidence.auc(test.scores, test.null),
        rate=evidence.rate_at(test.scores, test.null, 0.01),
    )


def verdict(found: Authentication) -> Verdict:
    """Judges by `found.main` alone: to pick the best of several tests afterwards would overstate it."""
    own = finding(found.main, found.seed)
    control = _control(found)
    one, count = len(found.names) == 1, len(found.names)
    these = "this picture was" if one else f"these {count} pictures were"
    if own is None:
        reasons = (
            "A score alone says little: a model that learnt a style denoises every picture of it better. Give non-members: pictures of the "
            "same artist or subject, prepared in the same way, that were certainly not trained on.",
        )
        return Verdict("unknown", "Without non-members nothing can be concluded.", reasons, None, None)
    least = 1 / math.comb(count + len(found.non_member_names), count)
    if least > LEVEL:
        reasons = (
            f"With {_count(count, 'picture')} and {_count(len(found.non_member_names), 'non-member')} even the clearest difference has "
            f"p = {least:.2f}. Nineteen non-members are enough for a single picture, three of each kind for a set.",
        )
        return Verdict("few", "These are too few pictures to tell.", reasons, own, control)
    if control is not None and control.p_value < CONTROL_LEVEL:
        reasons = (
            f"The base model, which knows neither, already tells your pictures from the non-members (p = {_p(control.p_value)}). So they "
            "differ in kind, for example in detail, size or compression, and whatever the fine-tuned model says of them may come from that. "
            "Give non-members that are more like them.",
        )
        return Verdict("differs", "The two sets differ in kind, so nothing can be concluded.", reasons, own, control)
    used = own.whole.p_value <= LEVEL
    if used:
        headline = f"There is {_strength(own.whole.p_value)} evidence that {these} used to fine-tune this model."
        chance = f"If none of them had been used, a lead this wide over the non-members would occur {rarity(own.whole.p_value)}."
    else:
        headline = f"There is no evidence that {these} used to fine-tune this model."
        chance = (
            f"If none of them had been used, so much would be seen in {own.whole.p_value:.0%} of audits. That is no proof that they were not: "
            "little training leaves little trace."
        )
    reasons = (chance, _area(own), *([] if one else [_single(found, own)]))
    return Verdict("used" if used else "none", headline, reasons, own, control)


def _control(found: Authentication) -> SetEvidence | None:
    """Two-sided permutation test of the base model's loss."""
    if found.control is None or found.control.null is None:
        return None
    sides = [
        evidence.set_evidence(
            found.seed, sign * np.asarray(found.control.scores), sign * np.asarray(found.control.null)
        )
        for sign in (1, -1)
    ]
    least = min(sides, key=lambda side: side.p_value)
    return least._replace(p_value=min(1.0, 2 * least.p_value))


def _area(own: Finding) -> str:
    between = f"95 % interval {own.auc.low:.0%} to {own.auc.high:.0%}"
    return f"A picture of yours scores higher than a non-member in {own.auc.value:.0%} of all pairs ({between}; 50 % is chance)."


def _single(found: Authentication, own: Finding) -> str:
    """What can be said of single pictures."""
    least = 1 / (1 + len(found.non_member_names))
    if least > LEVEL:
        return (
            f"Of single pictures nothing can be claimed: with {_count(len(found.non_member_names), 'non-member')} no p-value is below {least:.2f}; "
            "19 are needed for 0.05."
        )
    if own.single == 0:
        return "Taken one by one, no picture stands out enough to be claimed."
    return f"Taken one by one, {own.single} of {len(found.names)} can be claimed, of which at most {LEVEL:.0%} are expected to be wrong."


def _strength(p_value: float) -> str:
    return "very strong" if p_value < 0.001 else "strong" if p_value < 0.01 else "some"


def _p(p_value: float) -> str:
    return "below 0.001" if p_value < 1e-3 else f"{p_value:.3f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
