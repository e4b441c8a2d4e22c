"""What a report on an extraction is made from."""

import dataclasses
import re

import numpy as np
from jaxtyping import Bool, Float, Int

from dmsec_jax.core.checks import image_batch, require
from dmsec_jax.core.types import AnyArray
from dmsec_jax.metrics.extraction import Interval, Matches, Summary
from dmsec_jax.report.training_data import Course

Pictures = Float[AnyArray, "N H W 3"]
PAPER_THRESHOLDS = (0.6, 0.7)
"""Where the paper counts an extraction as a success; its scores come from another network, so read them as relative."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """From which score on two pictures count as the same one.

    Attributes:
        value: the score.
        false_match_rate: share of `pairs` pairs of different pictures that score at least `value`.
        pairs: how many pairs were looked at.
        source: which pictures they came from, to complete "calibrated on ...".
        same_style: whether they are pictures of the style in question. If not, whatever the model learnt of the style passes it, and without
            hold-outs nothing can be concluded.
    """

    value: float
    false_match_rate: float
    pairs: int
    source: str = "pairs of different pictures"
    same_style: bool = True

    def chance(self, extracted: int) -> float:
        """Probability that a picture unrelated to the model matches one of `extracted` pictures, pairs taken as
        independent. Where no pair matched, the rate's upper 95 % limit, 3 / pairs, stands in."""
        rate = self.false_match_rate if self.false_match_rate > 0 else min(1.0, 3 / max(self.pairs, 1))
        return 1 - (1 - rate) ** extracted


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """One way to get training pictures out, and what it gave.

    Attributes:
        name: for rows and file names: lower-case letters, digits, "-".
        label, description: for people; the description is one sentence.
        evaluations: UNet evaluations per image.
        generated, finite: images sampled, and how many of them are finite; the others were left out.
        extracted: [M, H, W, 3] in rank order, M may be 0.
        sizes, tightness: [M] members of the cluster and their mean similarity (0 or NaN for a single one).
        base_similarity: [M] similarity to the nearest sample of the base model; None where that was not measured.
        matches: per training picture [N], the best of `extracted` and its score; None if there is none.
        holdout_matches: the same for the hold-outs [K]; None also where there are no hold-outs.
        clustered, everything: figures for `extracted`, and for all finite images before clustering; None if there are none.
        samples: [S, H, W, 3], some images as sampled, for a contact sheet; may hold NaN.
    """

    name: str
    label: str
    description: str
    evaluations: int
    generated: int
    finite: int
    extracted: Float[AnyArray, "M H W 3"]
    sizes: Int[AnyArray, "M"]
    tightness: Float[AnyArray, "M"]
    base_similarity: Float[AnyArray, "M"] | None
    matches: Matches | None
    holdout_matches: Matches | None
    clustered: Summary | None
    everything: Summary | None
    samples: Float[AnyArray, "S H W 3"]

    def __post_init__(self):
        plain = re.fullmatch("[a-z0-9][a-z0-9-]*", self.name) is not None
        require(plain, "name", "of lower-case letters, digits and '-'", repr(self.name), "put the rest into label")
        image_batch(f"extracted of {self.name}", self.extracted)
        counts = f"{self.finite} of {self.generated}"
        possible = 0 <= self.finite <= self.generated
        require(possible, f"finite of {self.name}", "at most generated", counts, "count the finite images")
        lengths = {len(self.extracted), len(self.sizes), len(self.tightness)}
        if self.base_similarity is not None:
            lengths.add(len(self.base_similarity))
        one = f"{sorted(lengths)} entries"
        require(len(lengths) == 1, self.name, "described once per extracted picture", one, "give one value for each")
        for name, matches in (("matches", self.matches), ("holdout_matches", self.holdout_matches)):
            if matches is not None:
                ok = bool(((matches.index >= 0) & (matches.index < len(self.extracted))).all())
                require(ok, f"{name} of {self.name}", "indices of extracted", matches.index, "match against extracted")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Extraction:
    """A whole extraction: the model, the pictures, and what each method gave.

    Attributes:
        prompt: what the model was sampled with.
        base, tuned: labels of the two models.
        pictures, names: the training pictures [N, H, W, 3] in [-1, 1].
        holdouts, holdout_names: pictures like them that the model never saw, or None.
        methods: the one in question first, then those it is compared with.
        threshold: the calibrated one, on which the verdict rests.
        thresholds: further ones, each in the `rates` of every `Summary`, as is `threshold.value`.
        similarity: what the scores are, to complete "cosine similarity of ...".
        count_known: whether clustering was told the number of training pictures.
        base_scores: [N] similarity of the base model's nearest sample to each training picture; None if not measured.
        holdout_base_scores: [K] the same for the hold-outs.
        course: how the model was fine-tuned, if that is known.
        notes: sentences on what deserves attention.
        command: the command line, ready to be pasted.
        config, seeds, seconds, inputs: as in `result.Result`.

    Raises:
        ValueError: on pictures out of range, names or matches that do not fit them, a threshold without rates, or methods
            that are missing or share a name.
    """

    prompt: str
    base: str
    tuned: str
    pictures: Float[AnyArray, "N H W 3"]
    names: tuple[str, ...]
    holdouts: Float[AnyArray, "K H W 3"] | None = None
    holdout_names: tuple[str, ...] = ()
    methods: tuple[Method, ...]
    threshold: Threshold
    thresholds: tuple[float, ...] = PAPER_THRESHOLDS
    similarity: str = "image features"
    count_known: bool = True
    base_scores: Float[AnyArray, "_"] | None = None
    holdout_base_scores: Float[AnyArray, "_"] | None = None
    course: Course | None = None
    notes: tuple[str, ...] = ()
    command: str
    config: dict
    seeds: dict
    seconds: dict
    inputs: dict

    def __post_init__(self):
        names = [method.name for method in self.methods]
        require(len(names) > 0, "methods", "at least one", "none", "put the method in question first")
        require(len(set(names)) == len(names), "methods", "of different names", names, "rename one")
        _require_named("pictures", self.pictures, self.names)
        require(len(self.names) > 0, "pictures", "at least one", "none", "pass the training pictures")
        if self.holdouts is not None:
            _require_named("holdouts", self.holdouts, self.holdout_names)
        bases = ((self.base_scores, self.names), (self.holdout_base_scores, self.holdout_names))
        for scores, names in bases:
            fits = scores is None or len(scores) == len(names)
            require(
                fits, "base scores", "one per picture", "another number", "match the base's samples with every picture"
            )
        for method in self.methods:
            self._require_fitting(method)

    def _require_fitting(self, method: Method) -> None:
        sets = ((method.matches, len(self.names)), (method.holdout_matches, len(self.holdout_names)))
        for matches, count in sets:
            ok = matches is None or len(matches.score) == len(matches.index) == count
            require(ok, f"matches of {method.name}", f"[{count}]", "another length", "match all pictures of the set")
        for summary in (method.clustered, method.everything):
            wanted = {self.threshold.value, *self.thresholds}
            missing = sorted(wanted - set(summary.rates)) if summary else []
            cure = "pass these thresholds to metrics.extraction.summarise"
            require(not missing, f"rates of {method.name}", "complete", f"none at {missing}", cure)

    @property
    def main(self) -> Method:
        """The method in question."""
        return self.methods[0]

    def matched(self, matches: Matches | None) -> Bool[np.ndarray, "K"]:
        """Which pictures have an extraction that counts as the same picture; none where there is no match."""
        if matches is None:
            return np.zeros(0, bool)
        return np.asarray(matches.score) >= self.threshold.value

    def from_base(self, method: Method, *, holdouts: bool = False) -> Bool[np.ndarray, "K"]:
        """Which pictures have a match that is no evidence, because a sample of the base model comes as close; none if not measured.

        The base's samples are held against the picture itself, not against the threshold: they are many more than the extractions, so
        that the nearest of them passes a threshold made for single pairs by accident.
        """
        matches, base = (
            (method.holdout_matches, self.holdout_base_scores) if holdouts else (method.matches, self.base_scores)
        )
        if matches is None or base is None:
            return np.zeros(0 if matches is None else len(matches.score), bool)
        return self.matched(matches) & (np.asarray(base) >= np.asarray(matches.score))

    def read_out(self, method: Method, *, holdouts: bool = False) -> Bool[np.ndarray, "K"]:
        """Which pictures were read out: matched, closer than the base model comes, each by an extraction of its own.

        An extraction is evidence of one picture, the one it is closest to: a picture of nothing but the style may resemble all of them.
        """
        matches = method.holdout_matches if holdouts else method.matches
        found = self.matched(matches) & ~self.from_base(method, holdouts=holdouts)
        for index in np.unique(np.asarray(matches.index)[found] if found.any() else []):
            same = np.flatnonzero(found & (matches.index == index))
            found[same] = False
            found[same[np.argmax(np.asarray(matches.score)[same])]] = True
        return found


def _require_named(what: str, images: Pictures, names: tuple[str, ...]) -> None:
    image_batch(what, images)
    fits = f"{len(images)} pictures, {len(names)} names"
    require(len(images) == len(names), what, "named one by one", fits, "give one name per picture")


def interval_at(summary: Summary | None, threshold: float | None, *, holdouts: bool = False) -> Interval | None:
    """A figure of a summary: the rate at a threshold, or the average score where it is None; None if there is none."""
    if summary is None:
        return None
    if threshold is None:
        return summary.holdout_average if holdouts else summary.average
    rates = summary.holdout_rates if holdouts else summary.rates
    return None if rates is None else rates[threshold]
