"""Low-rank adaptation on the parameter tree (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022,
section 4.1).

    W = W_0 + scale * (alpha / rank) * down @ up          down [in, rank], up [rank, out]

A convolution kernel HWIO gets `down` [height, width, in, rank] and a 1x1 `up` [rank, out] (the LoCon form that Stable
Diffusion trainers write). The trainable tree mirrors the targets: `.../to_q/kernel` becomes `.../to_q/down` and
`.../to_q/up`.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmsec_jax.core import trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.types import Key, Params
from dmsec_jax.finetune.adapters import Adapter, Scale

InitStyle = Literal["peft", "diffusers-old"]

ATTENTION = (r"attn\d/to_(q|k|v|out_0)/kernel$",)
FEED_FORWARD = (r"/ff/net_(0/proj|2)/kernel$",)
CONVOLUTION = (
    r"resnets_\d+/(conv1|conv2|conv_shortcut)/kernel$",
    r"(downsamplers|upsamplers)_0/conv/kernel$",
    r"attentions_\d+/proj_(in|out)/kernel$",
)
TEXT_ATTENTION = (r"self_attn/(q|k|v|out)_proj/kernel$",)

TARGETS = {
    "attention": ATTENTION,
    "attention+ff+conv": ATTENTION + FEED_FORWARD + CONVOLUTION,
    "text-attention": TEXT_ATTENTION,
}
"""Named lists of targets; the first two for a UNet, the third for a CLIP text encoder."""


def lora(
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = "attention",
    init_style: InitStyle = "peft",
) -> Adapter:
    """Trains a rank-`rank` change of every target kernel; `alpha` None means `rank` (a scale of 1).

    Args:
        rank: at least 1, and at most the smaller side of every target seen as a matrix [height * width * in, out].
        alpha: numerator of the scale `alpha / rank`.
        targets: a name in `TARGETS`, or regular expressions over the paths of Dense [in, out] and convolution HWIO
            kernels.
        init_style: how `down` starts; `up` starts at zero, so training starts at the base model. "peft": uniform in
            +-1/sqrt(height * width * in) (Kaiming uniform with a = sqrt 5). "diffusers-old" (before 0.22): normal with
            standard deviation 1/rank.

    Raises:
        ValueError: here, on an unknown name, style, or rank below 1; from `init`, if a pattern finds nothing or
            something that is no kernel, or if the rank is larger than a target allows.
    """
    if isinstance(targets, str):
        require(targets in TARGETS, "targets", f"one of {', '.join(TARGETS)}", repr(targets), "or a list of patterns")
        targets = TARGETS[targets]
    patterns = tuple(targets)
    styles = {"peft": _kaiming_uniform, "diffusers-old": _normal}
    require(len(patterns) > 0, "targets", "at least one pattern", "none", f"for example {ATTENTION[0]!r}")
    require(init_style in styles, "init_style", f"one of {', '.join(styles)}", repr(init_style), "choose one of them")
    require(rank >= 1, "rank", "at least 1", rank, "choose for example 4")
    require(alpha is None or 0 < alpha < math.inf, "alpha", "positive", alpha, "leave it out for a scale of 1")
    ratio = (rank if alpha is None else alpha) / rank
    draw = styles[init_style]

    def init(key: Key, base: Params) -> Params:
        kernels = _targets(base, patterns, rank)
        factors = {}
        for path, kernel in kernels.items():
            layer = path.removesuffix("/kernel")
            # the layer's own name makes its key, so the other targets do not change how it starts
            key_layer = jax.random.fold_in(key, zlib.crc32(layer.encode()))
            factors[f"{layer}/down"] = draw(key_layer, (*kernel.shape[:-1], rank))
            factors[f"{layer}/up"] = jnp.zeros((rank, kernel.shape[-1]), jnp.float32)
        return trees.unflatten(factors)

    def merge(base: Params, trainable: Params, scale: Scale = None) -> Params:
        flat = trees.flatten(base)
        factors = trees.flatten(trainable)
        total = ratio if scale is None else ratio * scale
        for path in factors:
            layer, _, name = path.rpartition("/")
            require(f"{layer}/kernel" in flat, "trainable", "made of layers of the base tree", path, "check the base")
            if name == "down":
                kernel = flat[f"{layer}/kernel"]
                flat[f"{layer}/kernel"] = kernel + total * (factors[path] @ factors[f"{layer}/up"])
        return trees.unflatten(flat)

    return Adapter(init, merge)


def _targets(base: Params, patterns: tuple[str, ...], rank: int) -> dict[str, Array]:
    """{path: kernel} of the chosen kernels, all checked."""
    flat = trees.flatten(base)
    chosen = {path: flat[path] for path in trees.match(flat, patterns)}
    others = [path for path, leaf in chosen.items() if not (path.endswith("/kernel") and leaf.ndim in (2, 4))]
    require(not others, "targets", "kernels [in, out] or HWIO", f"{others[:3]}", "end the patterns with /kernel$")
    limits = {path: min(math.prod(kernel.shape[:-1]), kernel.shape[-1]) for path, kernel in chosen.items()}
    least = min(limits, key=limits.get)
    contract, cure = f"at most {limits[least]}, the smaller side of {least}", "lower it or drop that target"
    require(rank <= limits[least], "rank", contract, rank, cure)
    return chosen


def _kaiming_uniform(key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _normal(key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.normal(key, shape, jnp.float32) / shape[-1]
