"""Floor 6, the extraction audit: FineXtract and its baselines on one pair of models, generated, clustered and scored alike.

All methods start from the same noise and spend the same number of network evaluations: those that need one evaluation per step draw
twice as many pictures as those that need two.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax import pipeline
from dmsec_jax.core.checks import require
from dmsec_jax.data.images import ImageSet
from dmsec_jax.methods import finextract
from dmsec_jax.metrics import cliques, clusters, extraction, similarity
from dmsec_jax.metrics.similarity import Embed
from dmsec_jax.pipeline import Subject
from dmsec_jax.report import extraction_data as report


class Method(NamedTuple):
    """A way to draw candidate pictures from a fine-tuned model."""

    label: str
    description: str
    evaluations: int
    """Of the network, per denoising step."""
    w: float
    """Default guidance weight (or, for `lora-scale`, the scale of the weight difference)."""
    k: float = 0.0


METHODS = {
    "finextract": Method("FineXtract", "the fine-tuned model, guided away from the base model it was made from", 2, 2.0),
    "finextract-caption": Method("FineXtract, caption in both", "as FineXtract, but the base model sees the prompt too", 2, 2.0),
    "cfg": Method("classifier-free guidance", "the fine-tuned model, guided away from its own picture of no prompt", 2, 3.0),
    "lora-scale": Method("weight extrapolation", "one network whose weights go beyond the fine-tuned ones", 1, 1.25),
    "plain": Method("plain sampling", "the fine-tuned model with the prompt, nothing else", 1, 1.0),
    "carlini": Method("plain sampling, large cliques", "as plain sampling; only groups of five or more look-alikes count", 1, 1.0),
}  # fmt: skip
SAMPLERS = {"ddim": finextract.clean_ddim, "public": finextract.public_ddim}
PARTITIONS = {"cliques": cliques.partition, "agglomerative": clusters.agglomerate}
CLUSTERINGS = (*PARTITIONS, "public")
CLIQUE_SIZE = 5
SHOWN = 40


class Generated(NamedTuple):
    """Pictures [N, H, W, 3] that one method drew; rows that are not finite are left out and counted."""

    images: np.ndarray
    drawn: int
    broken: int


def generate(
    key, subject: Subject, name: str, *, evaluations: int, w: float | None = None, k: float | None = None, **options
) -> Generated:
    """Draws as many pictures as `evaluations` network evaluations per step allow, by the method `name` of `METHODS`.

    Args:
        w, k: guidance; default: the method's own.
        options: as `sweep` takes them.

    Raises:
        ValueError: on an unknown method or sampler, or where no picture is finite (names the guidance).
    """
    method = method_of(name)
    pair = (method.w if w is None else w, method.k if k is None else k)
    return sweep(key, subject, name, [pair], evaluations=evaluations, **options)[0]


def sweep(
    key,
    subject: Subject,
    name: str,
    pairs: Sequence[tuple[float, float]],
    *,
    evaluations: int,
    num_steps: int = 25,
    sampler: str = "ddim",
    batch_size: int = 50,
    progress: Callable[[int, int], None] | None = None,
    kept_fn: finextract.KeptFn | None = None,
) -> tuple[Generated, ...]:
    """As `generate`, once for each guidance (w, k) of `pairs`, all from the same noise and in common batches.

    Args:
        sampler: of `SAMPLERS`.
        batch_size: pictures sampled at once, whatever pair they belong to.
        kept_fn: as `finextract.sweep`.

    Raises:
        ValueError: on an unknown method or sampler, where no picture of any pair is finite, and on several pairs for `lora-scale`.
    """
    method = method_of(name)
    alone = len(pairs) == 1 or name != "lora-scale"  # there the weight is part of the network
    require(alone, "pairs", "one at a time for lora-scale", len(pairs), "call it once for each")
    pair_fn, params, guide_fn = _networks(subject, name, pairs[0][0])
    count = evaluations // method.evaluations
    w, k = jnp.asarray(pairs, jnp.float32).T
    drawn = finextract.sweep(
        key,
        params,
        finextract.Config(w=w, k=k, num_steps=num_steps),
        count=count,
        shape=subject.base.latent_shape,
        batch_size=batch_size,
        pair_fn=pair_fn,
        schedule=subject.base.schedule,
        sampler_fn=sampler_of(sampler),
        guide_fn=guide_fn,
        finish_fn=lambda latents: pipeline.decode(subject.base, latents, batch_size),
        progress=progress,
        kept_fn=kept_fn,
    )
    return tuple(
        Generated(images[finite], count, int((~finite).sum()))
        for images, finite in zip(drawn.images, drawn.finite, strict=True)
    )


def method_of(name: str) -> Method:
    """The method of this name; raises ValueError on an unknown one."""
    require(name in METHODS, "method", f"one of {', '.join(METHODS)}", repr(name), "choose one of them")
    return METHODS[name]


def sampler_of(name: str) -> finextract.SamplerFn:
    """The sampler of this name; raises ValueError on an unknown one."""
    require(name in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}", repr(name), "choose one of them")
    return SAMPLERS[name]


_alone = functools.cache(finextract.alone)  # the same object every time, so that nothing compiles twice


def _networks(subject: Subject, name: str, weight: float):
    """(pair_fn, its parameters, guide_fn) of a method."""
    base, tuned = subject.base, subject.tuned
    empty, prompt = pipeline.contexts(base, ["", subject.prompt])[:, None]
    tuned_empty, tuned_prompt = pipeline.contexts(base, ["", subject.prompt], tuned)[:, None]
    if name == "finextract":
        pair = pipeline.pair(base, (base.params["unet"], empty), (tuned["unet"], tuned_prompt))
        return *pair, finextract.guided
    if name == "finextract-caption":
        pair = pipeline.pair(base, (base.params["unet"], prompt), (tuned["unet"], tuned_prompt))
        return *pair, finextract.guided_by_caption
    if name == "cfg":
        pair = pipeline.pair(base, (tuned["unet"], tuned_empty), (tuned["unet"], tuned_prompt))
        return *pair, finextract.guided_by_caption
    network = tuned["unet"]
    if name == "lora-scale":
        network = jax.tree.map(lambda old, new: old + weight * (new - old), base.params["unet"], network)
    eps_fn, params = pipeline.single(base, network, tuned_prompt)
    return _alone(eps_fn), params, finextract.plain


def extracted_set(
    name: str, features: np.ndarray, count: int | None, same: float, *, clustering: str = "cliques", seed: int = 0
) -> tuple[clusters.Cluster, ...]:
    """Clusters of a method's pictures, best first: at most `count`, or every stable one where the number is unknown.

    Args:
        same: similarity from which two pictures count as the same one; no large clique below it counts.
        clustering: of `CLUSTERINGS`; "public" may give more than `count`, or none. Large cliques (`carlini`) are always cliques.
        seed: of the public clustering's start.

    Raises:
        ValueError: on an unknown clustering, and on the public one without `count`.
    """
    require_clustering(clustering, number_known=count is not None)
    if name == "carlini":
        matrix = clusters.similarity_matrix(features)
        found = clusters.sweep_down(matrix, count or len(features), min_size=CLIQUE_SIZE, floor=max(same, 0.01))
        return clusters.rank(found.groups, matrix, features)[:count]
    if clustering == "public":
        return finextract.extracted_set_public(seed, features, count)
    if count is None:
        return finextract.extracted_set_unknown(features, partition_fn=PARTITIONS[clustering])
    return finextract.extracted_set(features, count, partition_fn=PARTITIONS[clustering])


def require_clustering(clustering: str, *, number_known: bool) -> None:
    """Raises ValueError unless it is one of `CLUSTERINGS`, and the number of training pictures is known where it is needed."""
    known = ", ".join(CLUSTERINGS)
    require(clustering in CLUSTERINGS, "clustering", f"one of {known}", repr(clustering), "choose one of them")
    possible = number_known or clustering != "public"
    cure = "give the number or choose cliques"
    require(possible, "clustering", "told the number of training pictures to be public", "no number", cure)


class Judge(NamedTuple):
    """What decides whether two pictures are the same one, and the pictures in question as features."""

    embed: Embed
    threshold: report.Threshold
    members: np.ndarray
    """[N, D] of the training pictures."""
    holdouts: np.ndarray | None
    """[K, D] of pictures never trained on."""
    base: np.ndarray
    """[M, D] of the base model's own pictures of the prompt."""

    def base_scores(self, pictures: np.ndarray | None) -> np.ndarray | None:
        """Similarity of the base model's nearest picture to each of `pictures` [K, D]: [K]."""
        return None if pictures is None else extraction.best_matches(pictures, self.base).score


FEW = 8
"""With fewer pictures of the style than this, its mean and the calibration lean on the base model's pictures."""


def calibrated(
    pictures: ImageSet,
    holdout: ImageSet | None,
    base_pictures: np.ndarray,
    false_match_rate: float,
    embed: Embed = similarity.embed,
) -> Judge:
    """Features centred on the style, and the threshold that pairs of different pictures set.

    Training pictures and hold-outs enter mean and threshold alike, so that neither has an advantage. Files that occur twice count once.
    """
    members = embed(pictures.images)
    holdouts = None if holdout is None else embed(holdout.images)
    base = embed(base_pictures)
    digests = [*pictures.sha256, *(() if holdout is None else holdout.sha256)]
    known = members if holdouts is None else np.concatenate([members, holdouts])
    known = known[np.unique(digests, return_index=True)[1]]
    few = len(known) < FEW
    mean = (np.concatenate([known, base]) if few else known).mean(0)
    centre = lambda features: similarity.centred(features, mean)
    pairs = (known, base) if few else (known,)
    found = similarity.calibrate_style(*pairs, rate=false_match_rate)
    source = (
        "pairs of one of these pictures and one by the base model" if few else "pairs of different pictures of the set"
    )
    return Judge(
        embed=lambda images: centre(embed(images)),
        threshold=report.Threshold(
            value=max(found.value, 0.0),  # below it two pictures are less alike than strangers
            false_match_rate=found.rate,
            pairs=found.pairs,
            source=source,
            same_style=not few,
        ),
        members=centre(members),
        holdouts=None if holdouts is None else centre(holdouts),
        base=centre(base),
    )


def judge(
    name: str, drawn: Generated, by: Judge, *, count: int | None, seed: int = 0, clustering: str = "cliques"
) -> report.Method:
    """Clusters a method's pictures and scores them: AS and A-ESR of training pictures and of hold-outs, the null.

    Args:
        drawn: perhaps none that is finite.
        count: how many training pictures there were, None if unknown.
        clustering: as `extracted_set` takes it.
    """
    method = METHODS[name]
    some = len(drawn.images) > 0
    features = by.embed(drawn.images) if some else np.zeros((0, by.members.shape[1]))
    found = extracted_set(name, features, count, by.threshold.value, clustering=clustering, seed=seed) if some else ()
    medoids = features[[cluster.medoid for cluster in found]]
    thresholds = (by.threshold.value, *report.PAPER_THRESHOLDS)
    summary = lambda rows: extraction.summarise(seed, by.members, rows, thresholds, holdouts=by.holdouts)
    return report.Method(
        name=name,
        label=method.label,
        description=method.description,
        evaluations=method.evaluations,
        generated=drawn.drawn,
        finite=drawn.drawn - drawn.broken,
        extracted=drawn.images[[cluster.medoid for cluster in found]],
        sizes=np.array([cluster.size for cluster in found], int),
        tightness=np.array([cluster.tightness for cluster in found], float),
        base_similarity=clusters.calibrate(found, features, by.base).base_similarity if found else np.zeros(0),
        matches=extraction.best_matches(by.members, medoids) if found else None,
        holdout_matches=extraction.best_matches(by.holdouts, medoids) if found and by.holdouts is not None else None,
        clustered=summary(medoids) if found else None,
        everything=summary(features) if some else None,
        samples=drawn.images[:SHOWN],
    )
