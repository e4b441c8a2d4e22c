"""Attention on NVIDIA GPUs that holds no matrix of logits: cuDNN's fused kernel.

Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmsec_jax.core import spread

DTYPES = (jnp.float16, jnp.bfloat16)
WIDEST = 128
"""Largest head size that all GPUs with the kernel take; sizes are multiples of `MULTIPLE`."""
MULTIPLE = 8
CAPABILITY = 8.0
"""CUDA compute capability from which on GPUs have the kernel (Ampere)."""


def suits(dtype: jnp.dtype, width: int) -> bool:
    """Whether the kernel takes heads of that size and type, and a GPU that has it is in use."""
    return dtype in DTYPES and width <= WIDEST and width % MULTIPLE == 0 and available()


def available() -> bool:
    """Whether the default backend has the kernel. Asked before tracing, which looks for cuDNN and fails without, whatever it is traced for."""
    if jax.default_backend() != "gpu":
        return False
    capability = jax.local_devices()[0].compute_capability
    return capability[:1].isdecimal() and float(capability) >= CAPABILITY  # AMD's are names


def attention(
    q: Float[Array, "B N heads D"], k: Float[Array, "B M heads D"], v: Float[Array, "B M heads D"]
) -> Float[Array, "B N heads D"]:
    """Scaled dot-product attention with float32 softmax and accumulators; with a mesh in force each device takes its own rows."""
    return spread.apart(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), q, k, v)
