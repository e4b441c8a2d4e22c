"""What may be concluded from an extraction, in plain words and with its complement."""

from typing import Literal, NamedTuple

from scipy import stats

from dmsec_jax.report.extraction_data import Extraction, Method, Threshold
from dmsec_jax.report.page import rarity

LEVEL = 0.05
"""A gap that chance would make more often than this carries no verdict."""


class Tally(NamedTuple):
    """`matched` of `total` pictures have an extraction of their own that is the same picture, closer to it than all samples of the base."""

    matched: int
    total: int

    def __str__(self):
        return f"{self.matched} of {self.total}"


class Verdict(NamedTuple):
    kind: Literal["leak", "unclear", "none", "failed"]
    """`failed`: no image was finite, so nothing can be said."""
    headline: str
    comparison: tuple[str, ...]
    """Sentences on hold-outs and chance: what the figures below say, in words."""
    reasons: tuple[str, ...]
    """Sentences that the figures do not say."""
    training: Tally
    holdouts: Tally | None
    chance: float
    """Training pictures expected to match if the model had nothing to do with them."""
    p_value: float
    """Probability of so many matches or more if it had nothing to do with them: against the hold-outs by Fisher's exact
    test, without hold-outs against `chance` by the binomial."""


def verdict(extraction: Extraction) -> Verdict:
    """Judges the method in question: `extraction.main` at the calibrated threshold."""
    method = extraction.main
    training = tally(extraction, method)
    holdouts = None if method.holdout_matches is None else tally(extraction, method, holdouts=True)
    probability = extraction.threshold.chance(len(method.extracted))
    if holdouts is None:
        p_value = float(stats.binomtest(training.matched, training.total, probability, "greater").pvalue)
    else:
        table = [[t.matched, t.total - t.matched] for t in (training, holdouts)]
        p_value = float(stats.fisher_exact(table, alternative="greater").pvalue)
    stands_alone = holdouts is not None or extraction.threshold.same_style
    if method.finite == 0:
        kind = "failed"
    elif training.matched == 0:
        kind = "none"
    else:
        kind = "leak" if p_value < LEVEL and stands_alone else "unclear"
    found = Verdict(
        kind, _headline(kind, training, stands_alone), (), (), training, holdouts, probability * training.total, p_value
    )
    reasons = (*_groups(method), *_weight(found, extraction.threshold), *_base(extraction, method), *_peers(extraction))
    return found._replace(comparison=_comparison(found, extraction.threshold), reasons=reasons)


def tally(extraction: Extraction, method: Method, *, holdouts: bool = False) -> Tally:
    """Pictures read out of the model by `method`, as `Extraction.read_out` counts them."""
    total = len(extraction.holdout_names if holdouts else extraction.names)
    matches = method.holdout_matches if holdouts else method.matches
    if matches is None:
        return Tally(0, total)
    return Tally(int(extraction.read_out(method, holdouts=holdouts).sum()), total)


def _headline(kind: str, training: Tally, stands_alone: bool) -> str:
    one, every = training.total == 1, training.matched == training.total
    if kind == "failed":
        return "Nothing could be sampled from this model, so nothing can be said."
    if kind == "none":
        return "No training picture could be read out of this model."
    which = "The training picture" if one else f"All {training.total} training pictures" if every else str(training)
    if not one and not every:
        which += " training pictures"
    many = training.matched > 1
    if kind == "unclear":
        verb = "have look-alikes" if many else "has a look-alike"
        but = "but that is no evidence" if stands_alone else "which proves nothing without hold-outs"
        return f"{which} {verb} among the extractions, {but}."
    return f"{which} can be read out of this model."


def _comparison(found: Verdict, threshold: Threshold) -> tuple[str, ...]:
    if found.kind == "failed" or (found.holdouts is None and not threshold.same_style):
        return ()
    amount = "fewer than 0.1" if found.chance < 0.1 else f"about {found.chance:.1f}"
    chance = f"Of unrelated pictures {amount} of {found.training.total} would match by accident."
    if found.holdouts is None:
        return (chance,)
    return f"Of pictures like them that the model never saw, {found.holdouts} match.", chance


def _groups(method: Method) -> list[str]:
    if method.finite == 0 or method.matches is not None:
        return []
    return [f"No group of look-alikes was found among the {method.finite} images, so none was extracted."]


def _weight(found: Verdict, threshold: Threshold) -> list[str]:
    """How sure it is."""
    if found.kind == "failed":
        return ["All images had NaN or infinite values; weaker guidance may help."]
    reasons = []
    if found.kind == "leak":
        gap = "so many matches" if found.holdouts is None else "a lead this wide over the hold-outs"
        reasons.append(f"If the model knew nothing of the training pictures, {gap} would occur {_odds(found.p_value)}.")
    elif found.kind == "unclear" and found.holdouts is None and not threshold.same_style:
        return [
            "These are too few pictures to know how much pictures of this style resemble one another, and a model that learnt the style alone "
            "would resemble them too. Give hold-outs: pictures of the same style that it was not trained on."
        ]
    elif found.kind == "unclear":
        reasons.append(f"A model that knows nothing of them would do as well {_odds(found.p_value)}.")
    else:
        reasons.append("That is no proof of safety: more samples, another prompt or a better method may find more.")
    if found.holdouts is None:
        reasons.append("No hold-out pictures were given, so this rests on the calibration of the threshold alone.")
    return reasons


def _odds(p_value: float) -> str:
    """How often something of this probability happens."""
    return rarity(p_value) if p_value < LEVEL else f"in {p_value:.0%} of audits"


def _base(extraction: Extraction, method: Method) -> list[str]:
    """Which matches do not count."""
    if method.matches is None:
        return []
    matched = int(extraction.matched(method.matches).sum())
    base = int(extraction.from_base(method).sum())
    shared = matched - base - tally(extraction, method).matched
    said = lambda count, why: [f"Not counted {'is' if count == 1 else 'are'} {count} {why}."] if count else []
    return [
        *said(base, "to which the base model's own samples come as close, without having seen them"),
        *said(shared, "whose only match is closer to another of the pictures"),
    ]


def _peers(extraction: Extraction) -> list[str]:
    """What the other methods find by the same count."""
    peers = extraction.methods[1:]
    if not peers or extraction.main.finite == 0:
        return []
    counts = ", ".join(f"{tally(extraction, peer).matched} ({peer.label})" for peer in peers)
    return [f"Other ways to sample the same model find {counts}."]
