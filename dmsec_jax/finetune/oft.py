"""Orthogonal fine-tuning: kernels are rotated, not shifted (Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
NeurIPS 2023).

A target kernel W [in, out] becomes Q W, where Q is block-diagonal with `blocks` orthogonal blocks of side in / blocks, each made from a free
matrix R by Cayley's map of its skew part S = (R - R^T) / 2. The angles between the neurons (columns of W) stay as they are.

    "reference"  Q = (I - S) (I + S)^-1      as the public code of Bayesian few-shot fine-tuning
    "peft"       Q = (I + S) (I - S)^-1      its transpose: the same family of models, R of the other sign

Constrained OFT keeps every block's R within `radius` of zero, so within a known distance of the base model.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmsec_jax.core import trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.types import AnyArray, Key, Params
from dmsec_jax.finetune.adapters import Adapter, Scale
from dmsec_jax.finetune.lora import TARGETS

Cayley = Literal["reference", "peft"]


def oft(
    blocks: int = 4,
    targets: str | Sequence[str] = "attention",
    cayley: Cayley = "reference",
    radius: float | None = None,
) -> Adapter:
    """Trains a rotation of every target kernel; the trainable tree holds `.../generator` [blocks, side, side], zero at the start.

    `merge` with a scale multiplies the generators: 0 gives the base model, and every scale a rotation.

    Args:
        blocks: of each rotation, a divisor of the input width of every target; fewer blocks are freer.
        targets: a name in `lora.TARGETS` whose kernels are Dense, or regular expressions over their paths.
        cayley: the convention, see above.
        radius: of constrained OFT, on the Frobenius norm of each block's generator; None: not constrained.

    Raises:
        ValueError: here, on an unknown name or convention, fewer than one block, or a radius that is not positive; from `init`, if a pattern
            finds nothing or something else than a Dense kernel, or if the blocks do not divide its width.
    """
    if isinstance(targets, str):
        require(targets in TARGETS, "targets", f"one of {', '.join(TARGETS)}", repr(targets), "or a list of patterns")
        targets = TARGETS[targets]
    patterns = tuple(targets)
    require(len(patterns) > 0, "targets", "at least one pattern", "none", "for example 'to_q/kernel$'")
    require(cayley in ("reference", "peft"), "cayley", "reference or peft", repr(cayley), "choose one of them")
    require(blocks >= 1, "blocks", "at least 1", blocks, "choose for example 4")
    free = radius is None or 0 < radius < math.inf
    require(free, "radius", "positive, or null", radius, "leave it out to train without a constraint")

    def init(key: Key, base: Params) -> Params:
        del key  # nothing random: training starts at the base model
        flat = trees.flatten(base)
        generators = {}
        for path in trees.match(flat, patterns):
            shape = flat[path].shape
            dense = path.endswith("/kernel") and len(shape) == 2
            require(dense, "targets", "Dense kernels [in, out]", f"{path} of shape {shape}", "correct the patterns")
            cure = "choose a divisor of the input width of every target"
            require(shape[0] % blocks == 0, "blocks", f"a divisor of {shape[0]}, the width of {path}", blocks, cure)
            side = shape[0] // blocks
            generators[f"{path.removesuffix('/kernel')}/generator"] = jnp.zeros((blocks, side, side), jnp.float32)
        return trees.unflatten(generators)

    def merge(base: Params, trainable: Params, scale: Scale = None) -> Params:
        flat = trees.flatten(base)
        for path, generator in trees.flatten(trainable).items():
            kernel_path = f"{path.removesuffix('/generator')}/kernel"
            known = kernel_path in flat
            require(known, "trainable", "made of layers of the base tree", path, "check the base")
            kernel = flat[kernel_path]
            if radius is not None:
                generator = constrained(generator, radius)
            if scale is not None:
                generator = scale * generator
            parts = kernel.reshape(*generator.shape[:2], kernel.shape[1])  # [blocks, side, out]
            # at a lower precision weights would be rounded even where nothing turns
            turned = jnp.matmul(rotation(generator, cayley), parts, precision="highest")
            flat[kernel_path] = turned.reshape(kernel.shape)
        return trees.unflatten(flat)

    return Adapter(init, merge)


def rotation(generator: Float[Array, "b n n"], cayley: Cayley = "reference") -> Float[Array, "b n n"]:
    """Orthogonal blocks from free matrices; zero gives the identity."""
    skew = (generator - generator.mT) / 2
    skew = -skew if cayley == "peft" else skew
    eye = jnp.eye(generator.shape[-1], dtype=generator.dtype)
    return jnp.linalg.solve(eye + skew, eye - skew)  # the two factors commute


def constrained(generator: Float[AnyArray, "b n n"], radius: float | Float[Array, ""]) -> Float[Array, "b n n"]:
    """The nearest generators whose blocks have a Frobenius norm of at most `radius` (COFT)."""
    size = jnp.sqrt(jnp.square(generator).sum(axis=(1, 2), keepdims=True) + jnp.finfo(generator.dtype).tiny)
    return generator * jnp.minimum(1.0, radius / size)
