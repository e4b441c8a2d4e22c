"""What samples are worth, from features of unit length: fidelity, likeness to a text, quality, diversity.

All take features, so each picture is encoded once whatever is asked of it. Which network made them changes every value: record it.
Sources: Wu et al. 2024 (arXiv 2405.19931), appendix A7, whose CLIP-T, CLIP-I, DINO and LPIPS these are.
"""

import numpy as np
from jaxtyping import Float

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import AnyArray

ANTONYMS = ("Good photo.", "Bad photo.")
"""Prompts of CLIP-IQA's overall quality."""
SCALE = 100.0
"""Of cosines in CLIP-IQA, the factor that CLIP was trained to."""

Rows = Float[AnyArray, "_ D"]


def fidelity(samples: Rows, training: Rows) -> float:
    """CLIP-I or DINO: mean cosine over all pairs of a sample and a training picture, in [-1, 1].

    Raises:
        ValueError: if one of the two is empty.
    """
    _some(samples, training)
    return float(np.asarray(samples, np.float64).mean(0) @ np.asarray(training, np.float64).mean(0))


def text_alignment(samples: Rows, text: Rows) -> Float[np.ndarray, "_"]:
    """CLIP-T: cosine of each sample [N, D] and its text, [N, D] or one for all [1, D]."""
    return (np.asarray(samples, np.float64) * np.asarray(text, np.float64)).sum(1)


def quality(samples: Rows, antonyms: Float[AnyArray, "2 D"]) -> Float[np.ndarray, "_"]:
    """CLIP-IQA of each picture, in (0, 1): how much likelier CLIP holds the first of two opposite texts to be than the second.

    Wang, Chan and Loy, "Exploring CLIP for Assessing the Look and Feel of Images", AAAI 2023, Eq. 2. They take a ResNet without positions;
    with a vision transformer, as in torchmetrics, the values are others.

    Args:
        samples: [N, D] from CLIP's image tower.
        antonyms: [2, D] from its text tower, of `ANTONYMS`.
    """
    _some(samples)
    cosines = np.asarray(samples, np.float64) @ np.asarray(antonyms, np.float64).T
    return 1 / (1 + np.exp(-SCALE * (cosines[:, 0] - cosines[:, 1])))


def squared_distances(vectors: Float[AnyArray, "N D"]) -> Float[np.ndarray, "N N"]:
    """Between all rows; of `models.features.perceptual` vectors these are LPIPS."""
    x = np.asarray(vectors, np.float64)
    energy = np.square(x).sum(1)
    return np.maximum(energy[:, None] + energy[None] - 2 * x @ x.T, 0.0)


def diversity(distances: Float[AnyArray, "N N"]) -> float:
    """Mean over the pairs of different pictures, equal pictures included; 0 for a single one."""
    pairs = np.asarray(distances)[np.triu_indices(len(distances), 1)]
    return float(pairs.mean()) if len(pairs) else 0.0


def _some(*sets: Rows) -> None:
    for rows in sets:
        require(len(rows) > 0, "features", "of one picture at least", "none", "draw some samples")
