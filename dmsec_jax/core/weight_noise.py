"""Noise of weights: of a posterior, and Mixout's; a leaf's depends on the key and on its path alone."""

import collections
import zlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmsec_jax.core import trees
from dmsec_jax.core.types import Key, Params

FEW = 2**14
"""Leaves of fewer entries are drawn together with others of their shape: hundreds of generators would take a compiler minutes and gigabytes."""


@jax.jit
def perturbed(key: Key, trainable: Params, sigma: Params, any_noise: bool | Bool[Array, ""] = True) -> Params:
    """mu + sigma * noise on the leaves that `sigma` holds; a leaf's noise depends on the key and on its path alone.

    Args:
        key: of any generator.
        any_noise: False where sigma is zero everywhere, so that nothing has to be drawn.
    """
    flat, scales = trees.flatten(trainable), trees.flatten(sigma)
    # keys of rbg, drawn from together, would not give what each gives alone
    apart = str(jax.random.key_impl(key)) != "threefry2x32"
    alike = collections.defaultdict(list)
    for path, scale in scales.items():
        alike[path if apart or scale.size >= FEW else scale.shape].append(path)
    for paths in alike.values():
        draw = partial(_normal, key, paths, scales[paths[0]].shape)
        # a branch, which is not fused: else XLA:CPU keeps several arrays of a draw's making for the backward pass, not the noise itself
        noise = jax.lax.cond(any_noise, draw, lambda draw=draw: jnp.zeros(jax.eval_shape(draw).shape))
        flat |= {path: flat[path] + scales[path] * part for path, part in zip(paths, noise, strict=True)}
    return trees.unflatten(flat)


def _normal(key: Key, paths: Sequence[str], shape: tuple[int, ...]) -> Float[Array, "N ..."]:
    """Noise of leaves of one shape, each by a key of its path."""
    numbers = [zlib.crc32(path.encode()) for path in paths]
    if len(numbers) == 1:
        return jax.random.normal(jax.random.fold_in(key, numbers[0]), shape)[None]
    own = jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(numbers, jnp.uint32))
    return jax.vmap(lambda one: jax.random.normal(one, shape))(own)


def dropped(key: Key, trainable: Params, prior: Params, rate: float | Float[Array, ""]) -> Params:
    """Mixout on the leaves that `prior` holds, which is their centre; a leaf's mask depends on the key and on its path alone."""
    flat = trees.flatten(trainable)
    for path, centre in trees.flatten(prior).items():
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        keep = jax.random.bernoulli(own, 1 - rate, centre.shape)
        flat[path] = centre + jnp.where(keep, flat[path] - centre, 0.0) / (1 - rate)
    return trees.unflatten(flat)
