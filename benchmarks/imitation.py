"""How well a model imitates an artist after it was fine-tuned on pictures that were protected, noised, purified, or left alone."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from jax.tree_util import Partial

from benchmarks import harness
from benchmarks.trained import Training
from dmsec_jax import pipeline
from dmsec_jax.data.images import from_uint8, to_uint8
from dmsec_jax.metrics import distribution, similarity
from dmsec_jax.models import features
from dmsec_jax.report.result import Row

BASE_SEED = 2**31
"""Of the base model's samples, which belong to no training."""


def features_of(pictures: np.ndarray) -> np.ndarray:
    """[N, D] of pictures in [-1, 1]; `features.NAME` says which."""
    return similarity.embed(pictures, Partial(_pooled, features.load()[1]))


def _pooled(params, images):
    return features.pooled(features.FeaturesConfig(), params, images)


def samples(
    work: Path, training: Training, views: np.ndarray | None, arm: str, count: int, settings: str
) -> np.ndarray:
    """`count` pictures that a model draws after a training on `views` in place of the training's pictures (None: the base model).

    The training's noise and the first noise of sample j depend on the seed alone: arms are paired.
    """

    def compute() -> dict[str, np.ndarray]:
        params, key = None, jax.random.key(BASE_SEED)
        if views is not None:
            training.pictures = dataclasses.replace(training.pictures, images=views)
            params, key = training.models[max(training.steps)], jax.random.key(training.seed)
        return {"images": to_uint8(pipeline.sample(key, training.base, training.prompt, count, params=params))}

    settings = json.dumps([settings, training.base.sha256, training.prompt, count])
    return from_uint8(harness.kept(work / f"{arm}.npz", settings, compute)["images"])


def figures(drawn: np.ndarray, holdout: np.ndarray, untuned: np.ndarray) -> dict[str, float]:
    """What samples have of an artist's hold-out pictures, all as features [N, D].

    `imitation`: mean cosine of a sample and a hold-out picture, both seen from the mean of what the base model draws for the prompt; 0 for
    samples that moved nowhere. `frechet`: squared distance of the two sets; both biased alike, since all arms draw as many.
    """
    origin = untuned.mean(axis=0)
    likeness = similarity.centred(drawn, origin) @ similarity.centred(holdout, origin).T
    return {"imitation": float(likeness.mean()), "frechet": distribution.frechet_distance(holdout, drawn)}


def rows(found: dict[str, float], method: str, case: dict, count: int) -> list[Row]:
    """One for each figure."""
    units = {"imitation": "cosine", "frechet": "squared distance"}
    names = {"bench": "protection", "method": method, "case": case, "n": count}
    return [Row(metric=metric, value=value, unit=units[metric], **names) for metric, value in found.items()]
