"""Where a fine-tuning stands: it learns, it corrupts, or it copies.

    learning    neither of the following
    corrupting  samples are noisier than those of the base model from the same noise, and than the training pictures
    copying     more samples match a training picture than different pictures of the style match each other, and more closely than the base model's do

Both are tests at the level `LEVEL`, of samples that are few: a stage is evidence, not a measurement. The rest of `Measures` says why.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import AnyArray
from dmsec_jax.metrics import perception, similarity
from dmsec_jax.metrics.similarity import Embed

Stage = Literal["learning", "corrupting", "copying"]
STAGES = ("learning", "corrupting", "copying")
LEVEL = 0.01
"""Of each look; a run has several, so that one in twenty would be too many false alarms."""
STYLE = 3
"""Pictures that make a style: with fewer, the base model's samples play the different pictures."""


class Reference(NamedTuple):
    """What samples are compared with; see `reference`."""

    features: Float[np.ndarray, "N D"]
    mean: Float[np.ndarray, "D"]
    """Subtracted from all features before copies are looked for; zero without a style."""
    threshold: float
    """Above what different pictures of the style reach together, and above the base model's samples, which have copied nothing."""
    chance: float
    """That a sample which copies nothing reaches the threshold, at most."""
    training_noise: float
    base_noise: Float[np.ndarray, "K"]


class Scores(NamedTuple):
    """What networks say of the samples; None where they were not asked. As in `Measures`."""

    diversity: float | None = None
    quality: float | None = None
    alignment: float | None = None


UNASKED = Scores()


class Measures(NamedTuple):
    """The state of a model after `step` steps; plain numbers, for result.json."""

    step: int
    widths: tuple[float, ...]
    """The one-shot theory's s1 at rising t, mean over training pictures   (`response.widths`)."""
    fidelity: float
    """Mean cosine between features of samples and training pictures."""
    copied: float
    """Share of samples that reach the copy threshold."""
    copied_p: float
    """Probability of as many or more by chance."""
    noise: float
    """Mean noise level of the samples   (`noise_levels`)."""
    noise_p: float
    """Wilcoxon's, one-sided: samples are noisier than the base model's and the training pictures."""
    diversity: float
    """Mean distance over pairs of samples: as the caller measures it (LPIPS), or 1 - cosine of features."""
    drift: float
    """From the base model, on its own pictures   (`response.drift`)."""
    quality: float | None = None
    """CLIP-IQA, where CLIP's weights are given; without, the noise level has to do."""
    alignment: float | None = None
    """CLIP-T likewise: mean cosine of samples and the prompt."""

    @property
    def stage(self) -> Stage:
        """The furthest that is significant."""
        if self.copied_p < LEVEL:
            return "copying"
        return "corrupting" if self.noise_p < LEVEL else "learning"


def noise_levels(images: Float[AnyArray, "N H W 3"]) -> Float[np.ndarray, "N"]:
    """Deviation of white noise in each picture, in its own unit   (Immerkaer 1996, "Fast Noise Variance Estimation").

    The mask is blind to constant and linear grounds and nearly to straight edges; fine texture counts as noise.
    """
    grey = np.asarray(images, np.float64) @ similarity.LUMA
    rows = grey[:, :-2] - 2 * grey[:, 1:-1] + grey[:, 2:]
    masked = rows[:, :, :-2] - 2 * rows[:, :, 1:-1] + rows[:, :, 2:]
    weight = np.sqrt(np.square(similarity.LUMA).sum())  # noise of a grey picture is less than that of its channels
    return np.sqrt(np.pi / 2) * np.abs(masked).mean((1, 2)) / 6 / weight


def reference(
    training: Float[AnyArray, "N H W 3"],
    base_samples: Float[AnyArray, "K H W 3"],
    embed: Embed = similarity.embed,
) -> Reference:
    """What `measure` compares with.

    Args:
        training: the pictures that are learnt, in [-1, 1].
        base_samples: of the model before its fine-tuning, from the noise that later samples start from too. With fewer than `STYLE` training
            pictures they also set the copy threshold: what is merely the style then counts as a copy.
        embed: pictures -> features of unit length.
    """
    features, strangers = (embed(pictures) for pictures in (training, base_samples))
    distinct = np.unique(features.round(5), axis=0)  # a picture given twice is no pair of different ones
    if len(distinct) >= STYLE:
        mean = distinct.mean(0)
        found = similarity.calibrate_style(distinct)
    else:
        mean = np.zeros_like(features[0])
        found = similarity.calibrate(features, strangers)
    rate = max(found.rate, 1 / (found.pairs + 1))  # of one pair; so many pairs cannot promise less
    innocent = np.nextafter(_nearest(strangers, features, mean).max(), np.inf)
    return Reference(
        features=features,
        mean=mean,
        threshold=max(found.value, float(innocent)),
        chance=1 - (1 - rate) ** len(distinct),
        training_noise=float(np.median(noise_levels(training))),
        base_noise=noise_levels(base_samples),
    )


def measure(
    step: int,
    samples: Float[AnyArray, "K H W 3"],
    widths: Sequence[float],
    drift: float,
    known: Reference,
    embed: Embed = similarity.embed,
    scores: Scores = UNASKED,
) -> Measures:
    """Measures of `samples` in [-1, 1], as many as the base model's and in the order of their starting noise; `embed` as of `known`.

    Raises:
        ValueError: on another number of samples.
    """
    count = len(known.base_noise)
    require(len(samples) == count, "samples", f"{count}, as many as of the base model", len(samples), "draw as many")
    features = embed(samples)
    hits = int((_nearest(features, known.features, known.mean) >= known.threshold).sum())
    noise = noise_levels(samples)
    excess = noise - np.maximum(known.base_noise, known.training_noise)
    unlike = perception.diversity(1 - features @ features.T) if scores.diversity is None else scores.diversity
    return Measures(
        step=step,
        widths=tuple(float(width) for width in widths),
        fidelity=perception.fidelity(features, known.features),
        copied=hits / count,
        copied_p=float(stats.binom.sf(hits - 1, count, known.chance)),
        noise=float(noise.mean()),
        noise_p=float(stats.wilcoxon(excess, alternative="greater").pvalue) if excess.any() else 1.0,
        diversity=unlike,
        drift=float(drift),
        quality=scores.quality,
        alignment=scores.alignment,
    )


def _nearest(samples: np.ndarray, training: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Each sample's cosine with the training picture next to it; features of both."""
    centred = lambda features: similarity.centred(features, mean) if mean.any() else features
    return (centred(samples) @ centred(training).T).max(1)


def reached(measures: Sequence[Measures], stage: Stage) -> int | None:
    """The first step at which a stage, or one beyond it, was found; None if none was."""
    beyond = STAGES[STAGES.index(stage) :]
    return next((found.step for found in measures if found.stage in beyond), None)


def advice(measures: Sequence[Measures]) -> str:
    """One sentence on when to stop: at the most faithful step before the samples corrupt or copy."""
    if not measures:
        return "Nothing was measured, so nothing can be advised."
    end = reached(measures, "corrupting")
    before = [found for found in measures if end is None or found.step < end]
    if end is None:
        return f"No corruption and no copies were found in {measures[-1].step:,} steps."
    stage = next(found.stage for found in measures if found.step == end)
    if not before:
        return f"Samples were {stage} from the first measurement, at step {end:,}: measure more often, or train more slowly."
    best = max(before, key=lambda found: found.fidelity)
    return f"Samples were {stage} at step {end:,}: stop at step {best.step:,}, the most faithful before it."
