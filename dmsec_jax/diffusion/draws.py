"""Random timesteps and noise, one key per example, so that no draw depends on how examples are batched or sharded.

A *draw* is a function `(key, k, num_draws, shape, window) -> (t, noise)` for ONE example: `key` is the example's own,
`k` in 0..num_draws-1 says which of its draws this is, `window` = (low, high) means low <= t < high. Two models judged
with the same key see the same draws.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmsec_jax.core.checks import require

Window = tuple[int, int]
Draw = Callable[[Array, Array, int, tuple[int, ...], Window], tuple[Array, Array]]


def window(low: int, high: int | None, total: int) -> Window:
    """The range low <= t < high of a schedule of `total` steps; None: to its end.

    Raises:
        ValueError: if it is empty or leaves the schedule.
    """
    high = total if high is None else high
    inside = 0 <= low < high <= total
    require(inside, "t_min, t_max", f"a range within [0, {total}]", f"[{low}, {high})", "widen it")
    return low, high


def example_keys(key: Array, index: Int[Array, "B"]) -> Array:
    """One key per example: fold_in(key, global index)."""
    return jax.vmap(lambda j: jax.random.fold_in(key, j))(index)


def standard_normal(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`jax.random.normal(key, shape)`, the same numbers, drawn along one flat axis: under vmap XLA:CPU compiles random arrays of three
    axes 3-8 times slower."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def example_noise(key: Array, index: Int[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Standard normal noise [B, *shape] float32; row j depends on `key` and `index[j]` alone."""
    return jax.vmap(lambda k: standard_normal(k, shape))(example_keys(key, index))


def uniform_draw(key: Array, k: Array, num_draws: int, shape: tuple[int, ...], window: Window) -> tuple[Array, Array]:
    """t uniform over the window, noise standard normal, draws independent."""
    key_t, key_noise = jax.random.split(jax.random.fold_in(key, k))
    return jax.random.randint(key_t, (), *window), standard_normal(key_noise, shape)


def stratified_draw(
    key: Array, k: Array, num_draws: int, shape: tuple[int, ...], window: Window
) -> tuple[Array, Array]:
    """Draw k takes t from the k-th of `num_draws` equal parts of the window: an unbiased mean, and a steadier one."""
    key_t, key_noise = jax.random.split(jax.random.fold_in(key, k))
    return _stratum(key_t, k, num_draws, window), standard_normal(key_noise, shape)


def antithetic_draw(
    key: Array, k: Array, num_draws: int, shape: tuple[int, ...], window: Window
) -> tuple[Array, Array]:
    """Draws 2m and 2m+1 share one stratified t and take +noise and -noise.

    Raises:
        ValueError: if `num_draws` is odd.
    """
    require(num_draws % 2 == 0, "num_draws", "even for antithetic pairs", num_draws, "add one draw")
    key_t, key_noise = jax.random.split(jax.random.fold_in(key, k // 2))
    sign = 1.0 - 2.0 * (k % 2)
    return _stratum(key_t, k // 2, num_draws // 2, window), sign * standard_normal(key_noise, shape)


def listed_draw(timesteps: Int[Array | np.ndarray, "M"]) -> Draw:
    """A draw whose t is uniform over the given timesteps (the window is not used)."""
    choices = jnp.asarray(timesteps, jnp.int32)

    def draw(key, k, num_draws, shape, window):
        key_t, key_noise = jax.random.split(jax.random.fold_in(key, k))
        return choices[jax.random.randint(key_t, (), 0, choices.size)], standard_normal(key_noise, shape)

    return draw


def many(key: Array, index: Int[Array, "B"], num_draws: int, drawn_fn: Callable[[Array, Array], Any]) -> Any:
    """`drawn_fn(own key, k)`, a tree of arrays, for draws k = 0..K-1 of each example: leaves [B K, ...], an example's draws one after another."""
    each = jax.vmap(lambda own: jax.vmap(lambda k: drawn_fn(own, k))(jnp.arange(num_draws)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each(example_keys(key, index)))


def batch_stratified_t(key: Array, index: Int[Array, "B"], total: int, *, window: Window) -> Int[Array, "B"]:
    """Timesteps stratified over the `total` examples of a step: each gets its own part of the window, in random order.

    `index` are positions in 0..total-1 within the whole step: micro-batches that share `key` share the strata.
    """
    key_order, key_t = jax.random.split(key)
    part = jax.random.permutation(key_order, total)[index]
    return jax.vmap(lambda k, p: _stratum(k, p, total, window))(example_keys(key_t, index), part)


def _stratum(key: Array, part: Array, parts: int, window: Window) -> Array:
    low, high = window
    position = (part + jax.random.uniform(key)) / parts  # in [0, 1)
    t = low + jnp.floor(position * (high - low)).astype(jnp.int32)
    return jnp.minimum(t, high - 1)  # float32 may round position up to 1
