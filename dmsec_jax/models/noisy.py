"""Dense layers whose weights are Gaussian, sampled through their outputs: the local reparameterisation.

Kingma, Salimans and Welling, "Variational Dropout and the Local Reparameterization Trick", NeurIPS 2015, Eq. 6: for y = x W + b with independent
weights, y is Gaussian too,

    mean x mu_W + mu_b        variance x^2 sigma_W^2 + sigma_b^2

so each row draws its own noise, of the size of y and not of W: less variance of the gradient, and nothing as large as the weights is drawn. Rows
are tokens here, so unlike weights that are drawn once, the tokens of a picture do not share their noise.
"""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmsec_jax.core import trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.types import Key, Params


def with_noise(call: Callable[[], Any], sigma: Params, key: Key) -> Any:
    """`call()`, which applies a Flax module at mu, with noise added to the Dense layers that `sigma` names.

    Args:
        call: the module is the outermost one in it, so that paths are those of its parameters.
        sigma: deviations of Dense kernels and biases, a part of the module's parameter tree; zero leaves a layer as it is, bit for bit.
        key: a layer's noise depends on it and on the layer's path.

    Raises:
        ValueError: if it names something that is no Dense layer which was called.
    """
    flat, met = trees.flatten(sigma), set()

    def interceptor(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        names = [name for name in (f"{path}/kernel", f"{path}/bias") if name in flat]
        if not names or not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
            return out
        met.update(names)
        variance = jnp.zeros((), jnp.float32)
        for name in names:
            square = jnp.square(flat[name])
            x = jnp.square(args[0].astype(jnp.float32))
            variance = variance + (x @ square if name.endswith("kernel") else square)
        variance = jnp.broadcast_to(variance, out.shape)
        positive = variance > 0  # the root has no gradient at 0
        deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
        noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), out.shape)
        return out + (deviation * noise).astype(out.dtype)

    with nn.intercept_methods(interceptor):
        result = call()
    missed = sorted(flat.keys() - met)
    cure = 'choose other layers, or noise="weights"'
    require(not missed, "selection", "made of Dense layers for noise of activations", ", ".join(missed[:3]), cure)
    return result
