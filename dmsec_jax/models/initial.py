"""Random starting values of a whole parameter tree from a single draw.

A generator per leaf, as `Module.init` makes them, means hundreds of copies of it for XLA: the smallest UNet compiled
for 46 s, against 4 s here.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmsec_jax.core import trees
from dmsec_jax.core.types import Key, Params

StdFn = Callable[[str, tuple[int, ...]], float]
"""(path, shape) -> standard deviation of a `kernel` or `embedding`."""


def fan_in(path: str, shape: tuple[int, ...]) -> float:
    """1 / sqrt(inputs of a unit), which keeps the variance (LeCun et al., "Efficient BackProp", 1998)."""
    return math.prod(shape[:-1]) ** -0.5


def init(key: Key, module: nn.Module, *inputs: jax.ShapeDtypeStruct, std: StdFn = fan_in) -> Params:
    """Float32 parameters of `module`, which is never run: `kernel` and `embedding` normal, `scale` one, `bias` zero.

    Args:
        inputs: shapes and dtypes of the module's arguments.
        std: standard deviation per path.
    """
    shapes = trees.flatten(jax.eval_shape(module.init, key, *inputs)["params"])
    return trees.unflatten(
        _draw(key, tuple((path, leaf.shape, std(path, leaf.shape)) for path, leaf in shapes.items()))
    )


@partial(jax.jit, static_argnums=1)
def _draw(key, leaves: tuple[tuple[str, tuple[int, ...], float], ...]) -> dict[str, jax.Array]:
    random = [leaf for leaf in leaves if leaf[0].endswith(("kernel", "embedding"))]
    noise = jax.random.normal(key, (sum(math.prod(shape) for _, shape, _ in random),), jnp.float32)
    flat = {path: jnp.full(shape, float(path.endswith("scale")), jnp.float32) for path, shape, _ in leaves}
    start = 0
    for path, shape, std in random:
        end = start + math.prod(shape)
        flat[path] = std * noise[start:end].reshape(shape)
        start = end
    return flat
