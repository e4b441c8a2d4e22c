"""Array aliases and the glossary of axis letters.

`B` batch, `H W C` image, `h w c` latent, `T` schedule length, `L` tokens, `D` width, `S` Monte-Carlo draws,
`N` rows of data, `V` variables. Images are NHWC float32 in [-1, 1]; latents NHWC float32, scaled by the autoencoder's
scaling factor; `t` int32 index into the schedule. Inputs may be NumPy's: `jit` takes those too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

Params = Mapping[str, Any]
Key = jax.Array
AnyArray = jax.Array | np.ndarray
Image = Float[AnyArray, "B H W C"]
Latent = Float[AnyArray, "B h w c"]
Context = Float[AnyArray, "B L D"]
Timestep = Int[AnyArray, "B"]
PerExample = Float[AnyArray, "B"]

EpsFn = Callable[[Params, Latent, Timestep, Context], Latent]
"""(params, z_t, t, context) -> the network's prediction of the noise (or of v, as the schedule says)."""

ModelFn = Callable[[Latent, Timestep], Latent]
"""(z_t, t) -> prediction: an `EpsFn` with parameters and context bound; what samplers and losses consume."""
