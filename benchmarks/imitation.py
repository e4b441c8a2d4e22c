"""How well a model imitates an artist after it was fine-tuned on pictures that were protected, noised, purified, or left alone."""

import json
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness
from benchmarks.trained import Training
from dmsec_jax import imitation
from dmsec_jax.data.images import from_uint8, to_uint8
from dmsec_jax.metrics import distribution
from dmsec_jax.report.result import Row

BASE_SEED = 2**31
"""Of the base model's samples, which belong to no training."""


def samples(
    work: Path, training: Training, views: np.ndarray | None, arm: str, count: int, settings: str
) -> np.ndarray:
    """`count` pictures that a model draws after a training on `views` in place of the training's pictures (None: the base model)."""

    def compute() -> dict[str, np.ndarray]:
        key = jax.random.key(BASE_SEED if views is None else training.seed)
        drawn = imitation.imitate(key, training.base, views, training.prompt, training.recipe, count)
        return {"images": to_uint8(drawn)}

    settings = json.dumps([settings, training.identity(0), training.recipe.tune.num_steps, count])
    return from_uint8(harness.kept(work / f"{arm}.npz", settings, compute)["images"])


def figures(drawn: np.ndarray, holdout: np.ndarray, untuned: np.ndarray) -> dict[str, float]:
    """What samples have of an artist's hold-out pictures, all as features [N, D].

    `imitation`: mean of `dmsec_jax.imitation.likeness`. `frechet`: squared distance of the two sets; biased alike for all arms, since all draw
    as many.
    """
    found = imitation.likeness(drawn, holdout, untuned)
    return {"imitation": float(found.mean()), "frechet": distribution.frechet_distance(holdout, drawn)}


def rows(found: dict[str, float], method: str, case: dict, count: int) -> list[Row]:
    """One for each figure."""
    units = {"imitation": "cosine", "frechet": "squared distance"}
    names = {"bench": "protection", "method": method, "case": case, "n": count}
    return [Row(metric=metric, value=value, unit=units[metric], **names) for metric, value in found.items()]
