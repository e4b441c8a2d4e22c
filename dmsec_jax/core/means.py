"""Means over draws or microbatches that do not fit, or need not fit, in one evaluation."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dmsec_jax.core.checks import require

Tree = TypeVar("Tree", bound=PyTree)


def mean_over(fn: Callable[[PyTree], Tree], items: PyTree) -> Tree:
    """Mean of `fn`'s trees over the leading axis of `items`, one item at a time, so that only one evaluation is held.

    Of a single item this is `fn` alone: a sum that starts at zero would read and write every leaf once more, which for the gradient of a whole
    network takes as long as its optimiser.

    Args:
        fn: from one item to a tree of floating-point arrays.
        items: arrays [K, ...], K at least 1.

    Raises:
        ValueError: if `items` is empty or its leading axes differ.
    """
    counts = sorted({leaf.shape[0] for leaf in jax.tree.leaves(items)})
    require(len(counts) == 1 and counts[0] > 0, "items", "of one leading axis of 1 or more", counts, "stack them")
    first = jax.tree.map(lambda leaf: leaf[0], items)
    if counts[0] == 1:
        return fn(first)
    fn = jax.jit(fn, inline=True)  # traced once for both uses
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn, first))
    total, _ = jax.lax.scan(lambda total, item: (jax.tree.map(jnp.add, total, fn(item)), None), zeros, items)
    return jax.tree.map(lambda leaf: leaf / counts[0], total)
