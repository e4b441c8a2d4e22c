"""What an authentication found: pictures in question, non-members, and the evidence of each test."""

import dataclasses

import numpy as np
from jaxtyping import Float

from dmsec_jax.core.checks import image_batch, require
from dmsec_jax.core.types import AnyArray
from dmsec_jax.metrics.extraction import checked_scores

Pictures = Float[AnyArray, "N H W 3"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one membership test says of all pictures.

    Attributes:
        name, label, description: for machines, for people, and what is measured, to complete "It asks ...".
        evaluations: of the network, per picture.
        scores: [N] evidence for each picture in question, higher for members.
        null: [K] the same for the non-members; None if there are none.

    Raises:
        ValueError: on scores that are not finite.
    """

    name: str
    label: str
    description: str
    evaluations: int
    scores: Float[AnyArray, "N"]
    null: Float[AnyArray, "K"] | None = None

    def __post_init__(self):
        checked_scores(self.scores, f"scores of {self.name}")
        if self.null is not None:
            checked_scores(self.null, f"null of {self.name}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recovered:
    """What CGI-DM made of a set of pictures: where it began, where it ended [N, H, W, 3], and the share of the error that is left [N]."""

    partial: Pictures
    images: Pictures
    error: Float[AnyArray, "N"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Authentication:
    """A whole authentication.

    Attributes:
        prompt: what both models were asked with.
        base, tuned: labels of the two models.
        pictures, names: those in question [N, H, W, 3] in [-1, 1].
        non_members, non_member_names: pictures like them that were certainly not trained on, or None.
        tests: the one the verdict rests on first, then those it is compared with.
        control: the base model's own loss, which must not tell the two sets apart; None if not measured.
        recovered, non_members_recovered: pictures of CGI-DM; None if it was not run.
        seed: of the permutations.
        notes, command, config, seeds, seconds, inputs: as in `result.Result`.

    Raises:
        ValueError: on pictures out of range, or names or scores that do not fit them.
    """

    prompt: str
    base: str
    tuned: str
    pictures: Pictures
    names: tuple[str, ...]
    non_members: Float[AnyArray, "K H W 3"] | None = None
    non_member_names: tuple[str, ...] = ()
    tests: tuple[Outcome, ...]
    control: Outcome | None = None
    recovered: Recovered | None = None
    non_members_recovered: Recovered | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()
    command: str
    config: dict
    seeds: dict
    seconds: dict
    inputs: dict

    def __post_init__(self):
        known = None if self.non_members is None else len(self.non_members)
        image_batch("pictures", self.pictures)
        if known is not None:
            image_batch("non_members", self.non_members)
        counted = [len(self.pictures), known or 0]
        fits = [len(self.names), len(self.non_member_names)] == counted
        require(fits, "pictures", "named one by one", f"{counted} pictures", "give one name for each")
        require(len(self.tests) > 0, "tests", "at least one", "none", "put the one in question first")
        for test in (*self.tests, *([self.control] if self.control else [])):
            found = [len(test.scores), None if test.null is None else len(test.null)]
            expected = f"of {[counted[0], known]} pictures"
            require(found == [counted[0], known], f"scores of {test.name}", expected, found, "score every picture")
        for recovered, count in ((self.recovered, counted[0]), (self.non_members_recovered, known)):
            if recovered is not None:
                found = [len(recovered.partial), len(recovered.images), len(recovered.error)]
                require(found == [count] * 3, "recovered", f"of {count} pictures", found, "recover every picture")

    @property
    def main(self) -> Outcome:
        """The test in question."""
        return self.tests[0]


def scaled(test: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Scores and null in standard deviations of the null from its mean, so that tests can be drawn side by side."""
    null = np.asarray(test.null, np.float64)
    spread = null.std(ddof=1) if len(null) > 1 else 0.0
    move = lambda values: (np.asarray(values, np.float64) - null.mean()) / (spread or 1.0)
    return move(test.scores), move(null)
