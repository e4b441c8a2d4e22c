"""Distance between two sets of pictures, from their features: Frechet distance, kernel distance, precision and recall.

All take features [N, D] and [M, D] of any embedding and compute in float64 on the host. Which embedding and preprocessing made the
features changes every value: record it beside the number.
"""

from typing import NamedTuple

import numpy as np
from scipy import linalg

from dmsec_jax.core.checks import require

ROWS = 1024
"""Rows of a distance matrix that are held at a time."""


class KernelDistance(NamedTuple):
    """Mean over blocks of the unbiased estimate (it may be negative), its standard error over blocks, their number and size."""

    value: float
    standard_error: float
    blocks: int
    block_size: int


class PrecisionRecall(NamedTuple):
    """Share of generated features inside the manifold of the real ones, and the other way round."""

    precision: float
    recall: float


def frechet_distance(real, generated) -> float:
    """Squared Frechet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, Eq. 6).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). The last trace is the sum of singular values of A B^T, where A and B are the
    centred features over sqrt(n - 1): exact for singular covariances too, so fewer pictures than features need no regularisation.
    The estimate is biased upwards for few pictures: compare only equal counts, or use `kernel_distance`.

    Args:
        real: [N, D]; generated: [M, D]; at least two rows each.

    Raises:
        ValueError: on other shapes or non-finite values.
    """
    real, generated = _checked(real, generated, 2)
    gap = real.mean(0) - generated.mean(0)
    factors = [_factor(x) for x in (real, generated)]
    cross = linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(float(np.square(factor).sum()) for factor in factors)
    return float(max(gap @ gap + traces - 2 * cross, 0.0))


def kernel_distance(real, generated, *, block_size: int = 100, seed: int = 0) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased (Binkowski et al. 2018, KID).

    Both sets are shuffled and cut into disjoint blocks; the value is the mean of the blocks' unbiased estimates, the standard error
    their spread over sqrt(blocks).

    Args:
        real: [N, D]; generated: [M, D].
        block_size: pictures of each set per block, at least 2; made smaller where it would leave fewer than two blocks.

    Raises:
        ValueError: on other shapes, non-finite values or fewer than four rows.
    """
    real, generated = _checked(real, generated, 4)
    least = min(len(real), len(generated))
    require(block_size >= 2, "block_size", "at least 2", block_size, "use 100")
    size = min(block_size, least // 2)
    blocks = least // size
    rng = np.random.default_rng(seed)
    order_real, order_generated = rng.permutation(len(real)), rng.permutation(len(generated))
    values = []
    for b in range(blocks):
        rows = slice(b * size, (b + 1) * size)
        values.append(_unbiased_mmd2(real[order_real[rows]], generated[order_generated[rows]]))
    return KernelDistance(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(blocks)), blocks, size)


def precision_recall(real, generated, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1-2).

    A set's manifold is the union of balls around its features, each reaching to the `neighbours`-th nearest other one.

    Raises:
        ValueError: on other shapes, non-finite values or not more rows than `neighbours` in either set.
    """
    require(neighbours >= 1, "neighbours", "at least 1", neighbours, "use 3")
    real, generated = _checked(real, generated, neighbours + 1)
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real, neighbours)),
        recall=_share_inside(real, generated, _radii(generated, neighbours)),
    )


def _factor(x: np.ndarray) -> np.ndarray:
    """R with R^T R = covariance of x [N, D]; at most D rows."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return linalg.qr(centred, mode="r")[0][: x.shape[1]] if len(x) > x.shape[1] else centred


def _unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T, 0.0)


def _radii(x: np.ndarray, neighbours: int) -> np.ndarray:
    """[N] squared distance of each row to its `neighbours`-th nearest other row."""
    radii = []
    for start in range(0, len(x), ROWS):
        squared = _squared_distances(x[start : start + ROWS], x)
        squared[np.arange(len(squared)), start + np.arange(len(squared))] = (
            0.0  # itself, exactly, and always the nearest
        )
        radii.append(np.partition(squared, neighbours, axis=1)[:, neighbours])
    return np.concatenate(radii)


def _share_inside(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    # rounding of the squared distances must not push a point off a ball that it lies on
    slack = 1e-12 * float(np.square(centres).sum(1).max() + np.square(points).sum(1).max())
    inside = [
        (_squared_distances(points[start : start + ROWS], centres) <= radii + slack).any(1)
        for start in range(0, len(points), ROWS)
    ]
    return float(np.concatenate(inside).mean())


def _checked(real, generated, least: int) -> tuple[np.ndarray, np.ndarray]:
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    for name, x in (("real", real), ("generated", generated)):
        ok = x.ndim == 2 and len(x) >= least and x.shape[1] >= 1
        require(ok, name, f"[N, D] with at least {least} rows", f"shape {x.shape}", "use more pictures")
        finite = np.isfinite(x).all(1)
        require(
            bool(finite.all()),
            name,
            "finite",
            f"{(~finite).sum()} of {len(x)} rows not",
            "leave out what is not finite and say so",
        )
    same = real.shape[1] == generated.shape[1]
    require(
        same, "generated", f"[M, {real.shape[1]}]", f"shape {generated.shape}", "embed both sets with the same network"
    )
    return real, generated
