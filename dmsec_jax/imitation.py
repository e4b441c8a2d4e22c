"""Floor 6, imitation: what a model draws after a fine-tuning on pictures that were protected, noised, purified or left alone."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float

from dmsec_jax import pipeline, tuning
from dmsec_jax.checkpoints.unfinished import Store
from dmsec_jax.core import config
from dmsec_jax.core.types import AnyArray
from dmsec_jax.metrics import similarity
from dmsec_jax.models import features
from dmsec_jax.tuning import Recipe

FEATURES = features.NAME
"""What a likeness is the likeness of."""


def imitate(
    key: jax.Array,
    base: pipeline.Pipeline,
    views: Float[AnyArray, "N H W 3"] | None,
    prompt: str,
    recipe: Recipe,
    count: int,
) -> np.ndarray:
    """`count` pictures [K, H, W, 3] in [-1, 1] that the model draws for the prompt after a fine-tuning on `views`; None: without one.

    Batches and noise of the training, and the first noise of sample j, depend on the key alone: imitators with one key are paired, and their
    differences come from the pictures.

    Raises:
        KeyboardInterrupt: if the training was stopped.
    """
    params = None
    if views is not None:
        tuned = tuning.tune(key, base, views, [prompt], recipe)
        if not tuned.finished:
            raise KeyboardInterrupt
        params = tuned.params
    return pipeline.sample(key, base, prompt, count, params=params)


def compare(
    seed: int,
    base: pipeline.Pipeline,
    kinds: Mapping[str, Float[AnyArray, "N H W 3"]],
    artist: Float[AnyArray, "M H W 3"],
    prompt: str,
    recipe: Recipe,
    count: int,
    *,
    folder: Path,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind -> what a model draws after a fine-tuning on it, [K, H, W, 3], and the `likeness` [K] of that with the artist's pictures.

    Args:
        kinds: name, which becomes a file's name -> pictures in [-1, 1].
        folder: what was drawn is kept there, one file per kind, so that an interrupted comparison goes on.
    """

    def drawn(name: str, views: np.ndarray | None) -> np.ndarray:
        pixels = None if views is None else hashlib.sha256(np.ascontiguousarray(views).tobytes()).hexdigest()
        decisive = [base.origin, prompt, seed, count, config.to_dict(recipe), pixels]
        store = Store(folder / f"{name.replace(', then ', '-')}.npz", decisive)
        stored = store.read()
        if stored is not None:
            return stored["images"]
        images = imitate(jax.random.key(seed), base, views, prompt, recipe, count)
        store.write(images=images)
        return images

    untuned, goal = embed(drawn("untuned", None)), embed(artist)
    samples = {name: drawn(name, np.clip(views, -1, 1)) for name, views in kinds.items()}
    return {name: (images, likeness(embed(images), goal, untuned)) for name, images in samples.items()}


def embed(pictures: Float[AnyArray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
    """Features of pictures in [-1, 1]; `FEATURES` says which. Pictures too small for the network are enlarged by a whole factor."""
    factor = -(-features.MIN_SIDE // min(pictures.shape[1:3]))
    pictures = np.repeat(np.repeat(pictures, factor, axis=1), factor, axis=2)
    return similarity.embed(pictures, Partial(_pooled, features.load()[1]))


def likeness(
    drawn: Float[AnyArray, "K D"], artist: Float[AnyArray, "N D"], untuned: Float[AnyArray, "M D"]
) -> Float[np.ndarray, "K"]:
    """Cosine of each sample with an artist's pictures, mean over those, all as features seen from the mean of what the model drew before.

    0 for a sample that moved nowhere; what the artist's own pictures have among themselves is what can be reached.
    """
    origin = untuned.mean(axis=0)
    return (similarity.centred(drawn, origin) @ similarity.centred(artist, origin).T).mean(axis=1)


def _pooled(params, images):
    return features.pooled(features.FeaturesConfig(), params, images)
