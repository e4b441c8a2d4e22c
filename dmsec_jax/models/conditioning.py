"""What the UNet of Stable Diffusion XL is told besides the tokens of the text, carried in the same array.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", 2023, section 2.2: a pooled embedding of the text, and
six numbers (height and width of the original picture, top and left of the crop, height and width asked for). They stand in further rows below the
tokens, so that a context is one array [B, L, D] for every model, and nothing that passes contexts around needs to know.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

SIZES = 6
"""Numbers that describe size and crop."""


def rows(pooled_width: int, width: int) -> int:
    """How many rows of `width` hold the pooled embedding and the sizes."""
    return -(-(pooled_width + SIZES) // width)


def pack(
    tokens: Float[Array, "B L D"], pooled: Float[Array, "B P"], sizes: Float[Array, "B 6"]
) -> Float[Array, "B M D"]:
    """Tokens [B, L, D] with `rows(P, D)` further rows, zeros behind the last number."""
    batch, _, width = tokens.shape
    besides = jnp.concatenate([pooled, sizes], -1).astype(tokens.dtype)
    besides = jnp.pad(besides, ((0, 0), (0, rows(pooled.shape[-1], width) * width - besides.shape[-1])))
    return jnp.concatenate([tokens, besides.reshape(batch, -1, width)], 1)


def unpack(
    context: Float[Array, "B M D"], pooled_width: int
) -> tuple[Float[Array, "B L D"], Float[Array, "B P"], Float[Array, "B 6"]]:
    """(tokens, pooled, sizes): the inverse of `pack`."""
    batch, _, width = context.shape
    count = rows(pooled_width, width)
    besides = context[:, -count:].reshape(batch, -1)
    return context[:, :-count], besides[:, :pooled_width], besides[:, pooled_width : pooled_width + SIZES]
