"""Shift-tolerant AlexNet: features for the distances between sets of pictures, and the perceptual distance between two of them.

Ghildyal and Liu, "Shift-tolerant perceptual similarity metric", ECCV 2022: AlexNet's five convolutions with blur-pooling in place of strides,
so that features move with the picture, and LPIPS (Zhang et al., CVPR 2018) on top. The weights in `assets/features` are theirs (BSD-2, see the
licence beside them); `python -m benchmarks.convert_features` rebuilds the file.

Parameter paths: `conv1` ... `conv5` (`kernel` HWIO, `bias`) and `lin1` ... `lin5` (`scale` [C], how much a channel counts in LPIPS).
"""

import dataclasses
import functools
from collections.abc import Mapping
from importlib import resources

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32
from safetensors.numpy import load as load_safetensors

from dmsec_jax.core.checks import require
from dmsec_jax.core.trees import unflatten
from dmsec_jax.core.types import AnyArray, Image, Key, Params
from dmsec_jax.models import initial
from dmsec_jax.models.layers import Conv

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and standard deviation of ImageNet in [-1, 1], as LPIPS rounds them."""
KERNELS = (11, 5, 3, 3, 3)
PADDING = (2, 2, 1, 1, 1)
MIN_SIDE = 32
ASSET = "assets/features/alexnet_shift_tolerant.safetensors"
NAME = "shift-tolerant AlexNet, fourth convolution, mean over positions"
"""What `pooled` computes; record it beside a distance."""


Pictures = Float[AnyArray, "_ _ _ _"]  # shapes that differ are named by our own error


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """`widths`: channels of the five convolutions; `dtype`: compute dtype."""

    widths: tuple[int, ...] = (64, 192, 384, 256, 256)
    dtype: str = "float32"


def blur_pool(x: Float[jax.Array, "B H W C"]) -> Float[jax.Array, "B h w C"]:
    """Binomial low-pass [1, 2, 1] / 4 along both axes, then every second pixel; two pixels of reflection on each side (Zhang, ICML 2019)."""
    x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    for axis in (1, 2):
        last = x.shape[axis] - 3
        taps = [jax.lax.slice_in_dim(x, i, last + i + 1, stride=2, axis=axis) for i in range(3)]
        x = (taps[0] + 2 * taps[1] + taps[2]) / 4
    return x


def _max_pool(x):
    return nn.max_pool(x, (3, 3), (1, 1), "VALID")


class _AlexNet(nn.Module):
    cfg: FeaturesConfig

    @nn.compact
    def __call__(self, image):
        dtype = jnp.dtype(self.cfg.dtype)
        x = ((image - jnp.asarray(SHIFT, image.dtype)) / jnp.asarray(SCALE, image.dtype)).astype(dtype)
        stages = []
        for i, (width, size, pad) in enumerate(zip(self.cfg.widths, KERNELS, PADDING, strict=True)):
            if i in (1, 2):
                x = blur_pool(_max_pool(x))
            x = Conv(width, size=size, padding=((pad, pad), (pad, pad)), dtype=dtype, name=f"conv{i + 1}")(x)
            x = nn.relu(blur_pool(x) if i == 0 else x)
            stages.append((x.astype(jnp.float32), _Weights(name=f"lin{i + 1}")(x)))
        return tuple(stages)


class _Weights(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)


def init(key: Key, cfg: FeaturesConfig) -> Params:
    """Random parameters; `load` gives the trained ones."""
    return initial.init(key, _AlexNet(cfg), jax.ShapeDtypeStruct((1, MIN_SIDE, MIN_SIDE, 3), jnp.float32))


def apply(cfg: FeaturesConfig, params: Params, image: Image) -> tuple[Float32[jax.Array, "B _ _ _"], ...]:
    """The five rectified convolution outputs.

    Args:
        image: [B, H, W, 3] in [-1, 1]. One of 64 pixels gives 30, 15, 8, 8 and 8 pixels of 64, 192, 384, 256 and 256 channels.

    Raises:
        ValueError: if a side is shorter than 32 pixels.
    """
    return tuple(stage for stage, _ in _stages(cfg, params, image))


def pooled(cfg: FeaturesConfig, params: Params, image: Image) -> Float32[jax.Array, "B D"]:
    """The fourth output averaged over positions: features [B, 256] for `metrics.distribution`. Raises like `apply`."""
    return apply(cfg, params, image)[3].mean((1, 2))


def distance(cfg: FeaturesConfig, params: Params, a: Pictures, b: Pictures) -> Float32[jax.Array, "_"]:
    """LPIPS of two batches of pictures, one value per pair (Zhang et al., Eq. 1).

    0 for equal ones; unrelated ones of one style lie at 0.3 (OpenMoji) to 0.5 (paintings) at 64 pixels, a strong blur as high.

    Raises:
        ValueError: if shapes differ or a side is shorter than 32 pixels.
    """
    require(a.shape == b.shape, "b", f"of the shape of a, {a.shape}", b.shape, "resize one of the two")
    total = jnp.zeros(a.shape[0])
    for (f, weights), (g, _) in zip(_stages(cfg, params, a), _stages(cfg, params, b), strict=True):
        total += (jnp.square(_unit(f) - _unit(g)) @ weights).mean((1, 2))
    return total


def perceptual(cfg: FeaturesConfig, params: Params, image: Image) -> Float32[jax.Array, "B D"]:
    """Vectors whose squared Euclidean distances are LPIPS, so that N pictures are encoded N times for all their pairs. Raises like `apply`."""
    parts = []
    for f, weights in _stages(cfg, params, image):
        scaled = _unit(f) * jnp.sqrt(weights / (f.shape[1] * f.shape[2]))  # Eq. 1 averages over positions
        parts.append(scaled.reshape(f.shape[0], -1))
    return jnp.concatenate(parts, axis=1)


@functools.cache
def load() -> tuple[FeaturesConfig, Params]:
    """The shipped weights, as float32; read once, so leave the arrays as they are."""
    data = resources.files("dmsec_jax").joinpath(ASSET).read_bytes()
    return FeaturesConfig(), unflatten({path: leaf.astype(np.float32) for path, leaf in load_safetensors(data).items()})


def convert(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Path -> array, from the tensors of `alex_shift_tolerant.pth` in PyTorch layout.

    Raises:
        KeyError: if one is missing.
    """
    flat = {}
    for i, layer in enumerate(("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")):
        flat[f"conv{i + 1}/kernel"] = np.ascontiguousarray(state[f"net.{layer}.weight"].transpose(2, 3, 1, 0))
        flat[f"conv{i + 1}/bias"] = state[f"net.{layer}.bias"]
        flat[f"lin{i + 1}/scale"] = state[f"lin{i}.model.1.weight"].reshape(-1)
    return flat


def _stages(cfg, params, image):
    short = min(image.shape[1:3])
    require(
        short >= MIN_SIDE, "image", f"at least {MIN_SIDE} pixels high and wide", f"shape {image.shape}", "enlarge it"
    )
    return _AlexNet(cfg).apply({"params": params}, image)


def _unit(x):
    # the epsilon inside the root keeps the gradient of an all-zero position finite
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-20)
