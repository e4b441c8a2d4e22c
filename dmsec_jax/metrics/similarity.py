"""Copy detection: features whose cosine says whether two pictures are the same one, centred on a style, with a calibrated threshold.

Raw cosines mean little inside one drawing style, where all pictures look somewhat alike: features are centred on the mean of the style's
pictures, and the threshold comes from pairs of pictures that are known to be different.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float
from scipy import stats

from dmsec_jax.core.checks import image_batch, require
from dmsec_jax.core.types import AnyArray, Image

EmbedFn = Callable[[Image], Float[jax.Array, "B D"]]
"""Pictures [B, H, W, 3] in [-1, 1] -> features of unit length; with weights a `jax.tree_util.Partial`, so that they are no constants."""
Embed = Callable[[np.ndarray], np.ndarray]
"""Any number of pictures [N, H, W, 3] in [-1, 1], on the host -> features [N, D] of unit length."""

CELLS, BINS = 16, 8
NOISE_FLOOR = 0.01
"""Gradients far below this do not count: flat ground stays flat after normalisation."""
LUMA = (0.299, 0.587, 0.114)
BATCH = 16
"""Pictures embedded at once, few enough for a large network at 288 pixels."""
HOG = "oriented gradients (16 x 16 cells, 8 directions), centred on the style"


def oriented_gradients(images: Image) -> Float[jax.Array, "B D"]:
    """Histograms of gradient directions, 16 x 16 cells of 8 directions, each cell scaled by the contrast around it   (Dalal & Triggs 2005).

    The embedded default for small pictures: no weights, and in `benchmarks/LOG.md` ahead of learned features at 64 pixels (one measurement each).

    Args:
        images: [B, H, W, 3] in [-1, 1], H and W multiples of 16.

    Returns:
        [B, 2048] of unit length (all zero for a picture without any edge).

    Raises:
        ValueError: on other sizes.
    """
    _, height, width, _ = images.shape
    fits = height % CELLS == 0 and width % CELLS == 0
    require(fits, "images", f"of sides that are multiples of {CELLS}", f"{height} x {width}", "resize them first")
    grey = _blurred(images @ jnp.asarray(LUMA, images.dtype))
    dy, dx = _slope(grey, 1), _slope(grey, 2)
    position = jnp.mod(jnp.arctan2(dy, dx) / (2 * jnp.pi), 1) * BINS  # [B, H, W], in [0, BINS]
    below = jnp.floor(position)
    share = position - below
    one_hot = lambda place: jax.nn.one_hot(place.astype(jnp.int32) % BINS, BINS)
    strength = jnp.hypot(dx, dy)[..., None]
    votes = strength * (one_hot(below) * (1 - share[..., None]) + one_hot(below + 1) * share[..., None])
    cells = votes.reshape(-1, CELLS, height // CELLS, CELLS, width // CELLS, BINS).mean((2, 4))
    energy = jnp.square(cells).sum(-1, keepdims=True)
    flat = (cells / jnp.sqrt(energy + NOISE_FLOOR**2)).reshape(images.shape[0], -1)
    return flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)


def _blurred(x, sigma: float = 1.0, radius: int = 4):
    """Gaussian blur of [B, H, W] with edge pixels repeated."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        pads = [(0, 0)] * 3
        pads[axis] = (radius, radius)
        padded, size = jnp.pad(x, pads, mode="edge"), x.shape[axis]
        x = sum(w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, w in enumerate(weights))
    return x


def _slope(x, axis: int):
    """Central differences, one-sided at the border."""
    size = x.shape[axis]
    cut = lambda start, stop: jax.lax.slice_in_dim(x, start, stop, axis=axis)
    inner = (cut(2, size) - cut(0, size - 2)) / 2
    return jnp.concatenate([cut(1, 2) - cut(0, 1), inner, cut(size - 1, size) - cut(size - 2, size - 1)], axis)


_apply = jax.jit(lambda images, embed_fn: embed_fn(images))


def embed(
    images: Float[AnyArray, "N H W 3"], embed_fn: EmbedFn = oriented_gradients, batch_size: int = BATCH
) -> np.ndarray:
    """Features [N, D] of any number of pictures, in batches of one size: one compilation for all sets of equal pictures.

    Raises:
        ValueError: on pictures that are not [N, H, W, 3] in [-1, 1], or not finite.
    """
    images = np.asarray(images, np.float32)
    image_batch("images", images)
    embed_fn = embed_fn if isinstance(embed_fn, Partial) else Partial(embed_fn)
    features = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
        features.append(np.asarray(_apply(filled, embed_fn))[: len(part)])
    return np.concatenate(features)


def centred(features: Float[AnyArray, "N D"], mean: Float[AnyArray, "D"]) -> np.ndarray:
    """Features minus a style's mean, scaled back to unit length [N, D]; a feature equal to the mean has no direction.

    Raises:
        ValueError: if a feature equals the mean, as with a single picture centred on itself.
    """
    moved = np.asarray(features, np.float64) - np.asarray(mean, np.float64)
    length = np.linalg.norm(moved, axis=-1, keepdims=True)
    distinct = bool((length > 1e-9).all())
    require(distinct, "features", "different from the style's mean", "one that equals it", "centre on more pictures")
    return moved / length


class Threshold(NamedTuple):
    """`value` and the share of `pairs` pairs of different pictures that reach it, with the 95 % interval of that share."""

    value: float
    rate: float
    pairs: int
    low: float
    high: float


def calibrate(first: np.ndarray, second: np.ndarray | None = None, *, rate: float = 0.01) -> Threshold:
    """The lowest similarity that at most a share `rate` of pairs of different pictures reaches.

    With fewer than 1 / `rate` pairs it lies just above the most similar pair. The interval (Clopper-Pearson) takes pairs as independent,
    which pairs that share a picture are not: read it as a lower limit of the doubt. For features that were centred on a mean in which they
    have a part, use `calibrate_style`.

    Args:
        first: [N, D] features of pictures that are all different; their pairs are taken.
        second: [M, D]; if given, the pairs are (one of `first`, one of `second`).
        rate: in (0, 1).

    Raises:
        ValueError: on a rate outside (0, 1), or no pair.
    """
    if second is None:
        return _threshold((first @ first.T)[np.triu_indices(len(first), 1)], rate)
    return _threshold((first @ second.T).ravel(), rate)


def calibrate_style(first: np.ndarray, second: np.ndarray | None = None, *, rate: float = 0.01) -> Threshold:
    """`calibrate` for features that will be centred on the mean of `first` (and `second`), to judge pictures that have no part in that mean.

    A mean pulls its own pictures apart: of N of them, two have a cosine of about -1 / (N - 1) where a stranger has 0, so a threshold from
    such pairs is too low (with 10 paintings half of all strangers reached one meant for 1 %; benchmarks/LOG.md). Here one picture of each
    pair plays the stranger and is left out of the mean; of the two ways round the larger similarity counts.

    Args:
        first: [N, D] features before centring, of pictures that are all different.
        second: [M, D]; if given, they play the strangers.
        rate: in (0, 1).

    Raises:
        ValueError: on a rate outside (0, 1), no pair, or a mean that is left with nothing.
    """
    strangers = first if second is None else second
    count = len(first) + (0 if second is None else len(second))
    require(count > 2, "features", "of at least three pictures", count, "add pictures of the style")
    total = first.sum(0) + (0 if second is None else second.sum(0))
    columns = []
    for stranger in np.asarray(strangers, np.float64):
        mean = (total - stranger) / (count - 1)
        columns.append(centred(first, mean) @ centred(stranger[None], mean)[0])
    similarity = np.stack(columns, axis=1)  # [N, strangers]
    if second is None:
        similarity = np.maximum(similarity, similarity.T)[np.triu_indices(len(first), 1)]
    return _threshold(similarity.ravel(), rate)


def _threshold(similarity: np.ndarray, rate: float) -> Threshold:
    require(0 < rate < 1, "rate", "in (0, 1)", rate, "use for example 0.01")
    pairs = len(similarity)
    require(pairs > 0, "features", "of at least two different pictures", "no pair", "add pictures")
    allowed = int(rate * pairs)  # pairs that may reach the threshold
    ordered = np.sort(similarity)[::-1]
    value = min(float(np.ceil(1e4 * (ordered[allowed] + 1e-6)) / 1e4), 1.0)
    reached = int((similarity >= value).sum())
    bounds = stats.binomtest(reached, pairs).proportion_ci(0.95)
    return Threshold(value, reached / pairs, pairs, float(bounds.low), float(bounds.high))
