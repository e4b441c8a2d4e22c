"""How independent is each pair? Partial correlations of order 0, 1, 2 and of all others, summarised per pair: what the skeleton network sees.

A partial correlation r given m variables is tested by Fisher's z = sqrt(n - m - 3) atanh r; features are log(1 + |z|), which carry over numbers
of rows and of variables. For a pair (i, j), in this order:

    z given nothing; z given all others
    over all single k: mean, deviation, quantiles 0, 0.1, 0.25, 0.5, 0.75, 1
    over sets {k, l} of the `top` likeliest neighbours of i, and of those of j: the same eight
    the strongest link of i to another than j, and of j to another than i: the larger, the smaller
    log n, log V

Likely neighbours are those whose link no single variable explains: min(z, min_k z given k). (The public code conditions on those that its test
found independent, by a flipped sign.) Numbers are finite for any correlation matrix: 1 - r^2 is kept from 0, and the precision matrix is that of
(1 - s) R + s I, s = min(1/2, V / (20 n)), as duplicated columns and n < V need.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import AnyArray

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
COUNT = 2 + 2 * (2 + len(QUANTILES)) + 2 + 2
"""Features of a pair."""


def correlation(data: Float[np.ndarray, "N V"], names: list[str] | None = None) -> Float[np.ndarray, "V V"]:
    """Correlation matrix in float32, computed in float64.

    Raises:
        ValueError: on fewer than 3 columns or 5 rows, NaN or infinity, and constant columns; columns are named.
    """
    data = np.asarray(data, np.float64)
    shaped = data.ndim == 2 and data.shape[0] >= 5 and data.shape[1] >= 3
    require(shaped, "data", "[N >= 5, V >= 3]", f"shape {data.shape}", "one row per observation")
    names = names or [str(i) for i in range(data.shape[1])]
    called = lambda where: ", ".join(names[i] for i in np.flatnonzero(where))
    broken = ~np.isfinite(data).all(axis=0)
    require(not broken.any(), "data", "finite", f"NaN or infinity in {called(broken)}", "drop or fill missing values")
    constant = np.ptp(data, axis=0) <= 1e-12 * np.abs(data).max(axis=0)
    require(not constant.any(), "data", "varying in every column", f"constant {called(constant)}", "leave them out")
    return np.corrcoef(data, rowvar=False).astype(np.float32)


def of_covariance(covariance: Float[AnyArray, "V V"]) -> Float[Array, "V V"]:
    """Correlation matrix of a covariance matrix."""
    deviation = jnp.sqrt(jnp.diagonal(covariance))
    return covariance / deviation[:, None] / deviation[None]


def pair_features(
    corr: Float[AnyArray, "V V"], num_rows: float | Int[AnyArray, ""], *, top: int = 6
) -> Float[Array, "V V F"]:
    """Features [i, j], symmetric; those of the diagonal mean nothing.

    Some variables i at a time, so that memory is O(V^2). Work is O(V^3 log^2 V); `vmap` over data sets.
    """
    size = corr.shape[0]
    corr = _clipped(jnp.asarray(corr, jnp.float32))
    rows = jnp.asarray(num_rows, jnp.float32)
    order_0 = _strength(corr, rows, 0)
    others = ~jnp.eye(size, dtype=bool)

    def given_one(i):  # [t] -> [8, t, j] over k, in front
        partial = _partial(corr[i], corr[:, i, None], corr[:, None])
        return _summary(_strength(partial, rows, 1), others[:, i, None] & others[:, None])

    order_1 = _some_at_a_time(given_one, size)
    link = jnp.where(others, jnp.minimum(order_0, order_1[2]), -jnp.inf)
    count = min(top, size - 1)
    ranked, neighbours = jax.lax.top_k(link, count)  # [V, K]
    strength, usable = _given_neighbours(corr, rows, neighbours.T)

    def given_two(i):  # sets of neighbours of j, then of i
        both = lambda x: jnp.concatenate([x[:, :, i].swapaxes(1, 2), x[:, i]])
        return _summary(both(strength), both(usable))

    order_2 = _some_at_a_time(given_two, size)
    rival = jnp.where(ranked[:, :1] > link, ranked[:, :1], ranked[:, 1:2])  # [i, j]: best link of i but for j
    rivals = jnp.stack([jnp.maximum(rival, rival.T), jnp.minimum(rival, rival.T)])
    single = jnp.stack([order_0, _strength(_given_all(corr, rows), rows, size - 2)])
    scale = jnp.broadcast_to(jnp.stack([jnp.log(rows), jnp.float32(math.log(size))])[:, None, None], (2, size, size))
    return jnp.moveaxis(jnp.concatenate([single, order_1, order_2, rivals, scale]), 0, -1)


def _some_at_a_time(run, size):
    """[8, V, V] of `run`, (variables [t]) -> [8, t, V]; some 1000 pairs at once stay in the fast cache of a CPU."""
    parts = -(-size // max(1, 1024 // size))
    together = -(-size // parts)
    index = jnp.minimum(jnp.arange(parts * together), size - 1).reshape(parts, together)
    found = jax.lax.map(run, index)  # [parts, 8, t, V]
    return found.swapaxes(0, 1).reshape(found.shape[1], -1, size)[:, :size]


def _given_neighbours(corr, rows, neighbours):
    """Strength of each pair given sets {k, m} of neighbours [K, j] of the first of them, [sets, j, i], and whether i is in none.

    A row of correlations is read whole for each neighbour: single numbers are slow to gather.
    """
    first, second = np.triu_indices(len(neighbours), 1)
    each = jnp.arange(len(corr))
    k, m = neighbours[first], neighbours[second]  # [sets, j]
    own, to = corr[neighbours, each], corr[neighbours]  # [K, j], [K, j, i]
    r_jk, r_jm, r_km = (r[..., None] for r in (own[first], own[second], corr[k, m]))
    parts = to[first], to[second], _partial(r_jm, r_jk, r_km)
    r_ik, r_im, r_jm_k = jax.lax.optimization_barrier(parts)  # or they are made anew for every pair
    partial = _partial(_partial(corr, r_ik, r_jk), _partial(r_im, r_ik, r_km), r_jm_k)
    return _strength(partial, rows, 2), (k[..., None] != each) & (m[..., None] != each)


def _clipped(r):
    return jnp.clip(r, -1 + 1e-6, 1 - 1e-6)


def _partial(r_ij, r_ik, r_jk):
    """r_ij.k by the recursion; r_jk is 1 where j is k, which is masked later."""
    left = (1 - jnp.square(r_ik)) * (1 - jnp.square(r_jk))
    return _clipped((r_ij - r_ik * r_jk) / jnp.sqrt(jnp.maximum(left, 1e-12)))


def _strength(r, rows, given):
    """log(1 + |z|); with hardly more rows than variables given, as if one degree were left."""
    return jnp.log1p(jnp.sqrt(jnp.maximum(rows - given - 3, 1.0)) * jnp.abs(jnp.arctanh(_clipped(r))))


def _given_all(corr, rows):
    size = corr.shape[0]
    shrink = jnp.minimum(0.5, size / (20 * rows))
    precision = jnp.linalg.inv((1 - shrink) * corr + shrink * jnp.eye(size))
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(precision), 1e-12))
    return -precision / scale[:, None] / scale[None]


def _summary(values, usable):
    """[S, ...] -> [8, ...] over the usable ones; zeros where there is none."""
    values = jax.lax.optimization_barrier(values)  # or logarithms are computed anew for each statistic
    count = usable.sum(axis=0)
    some = jnp.maximum(count, 1)
    mean = jnp.where(usable, values, 0.0).sum(axis=0) / some
    deviation = jnp.sqrt(jnp.where(usable, jnp.square(values - mean), 0.0).sum(axis=0) / some)
    ordered = _sorted(jnp.where(usable, values, jnp.inf))
    places = [jnp.round(q * (some - 1)).astype(jnp.int32) for q in QUANTILES]
    place = jnp.arange(len(ordered)).reshape(-1, *[1] * count.ndim)
    quantiles = [jnp.where(place == wanted, ordered, 0.0).sum(axis=0) for wanted in places]
    return jnp.where(count > 0, jnp.stack([mean, deviation, *quantiles]), 0.0)


def _sorted(values):
    """[S, ...] in ascending order along the first axis by Batcher's bitonic network (1968), whose steps are minima and maxima of whole slices.

    On a CPU many times as fast as XLA's sort: benchmarks/LOG.md.
    """
    count, *shape = values.shape
    size = 1 << (count - 1).bit_length()
    values = jnp.concatenate([values, jnp.full((size - count, *shape), jnp.inf)])

    def compared(values, distance, *, mirrored):
        pairs = values.reshape(-1, 2, distance, *shape)
        low, high = pairs[:, 0], pairs[:, 1, ::-1] if mirrored else pairs[:, 1]
        low, high = jnp.minimum(low, high), jnp.maximum(low, high)
        return jnp.stack([low, high[:, ::-1] if mirrored else high], axis=1).reshape(size, *shape)

    sides = [2**n for n in range((size - 1).bit_length())]
    for n, half in enumerate(sides):  # sorted runs of `half` become runs of twice that
        values = compared(values, half, mirrored=True)
        for distance in reversed(sides[:n]):
            values = compared(values, distance, mirrored=False)
    return values[:count]
