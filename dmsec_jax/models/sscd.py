"""SSCD, the self-supervised descriptor for copy detection (Pizzi et al. 2022): ResNet or ResNeXt trunk, GeM pooling, one linear layer.

The weights are not ours to ship (CC BY-NC): read the user's own file with `checkpoints.torch_archive` and pass its tensors to `convert`.

    cfg, params = sscd.convert(torch_archive.read("sscd_disc_mixup.torchscript.pt"))
    features = sscd.embed(cfg, params, images, preprocessing="sscd-288-imagenet")

Batch normalisation is folded into the convolutions, so parameters are `kernel` and `bias` only: `conv1`, `layer<s>_<i>/conv1` ... `conv3`,
`layer<s>_<i>/downsample`, `fc`.
"""

import dataclasses
import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.trees import flatten, unflatten
from dmsec_jax.models import preprocessing as pictures
from dmsec_jax.models.layers import unit
from dmsec_jax.models.preprocessing import HALF, IMAGENET, Preprocessing

BATCH_NORM_EPSILON = 1e-5
PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class Config:
    """Residual blocks per stage, width of the first stage, groups and channels per group of the 3x3 convolutions, output width."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    groups: int = 1
    group_width: int = 64
    dims: int = 512
    pool: float = 3.0
    dtype: str = "float32"

    def inner(self, stage: int) -> int:
        """Channels of the 3x3 convolutions of a stage."""
        return self.width * 2**stage * self.group_width // 64 * self.groups

    def outer(self, stage: int) -> int:
        """Channels that leave a stage."""
        return 4 * self.width * 2**stage


DISC_MIXUP = Config()
"""ResNet-50, 512 dimensions: `sscd_disc_mixup` and the other ResNet-50 files."""
DISC_LARGE = Config(blocks=(3, 4, 23, 3), groups=32, group_width=4, dims=1024)
"""ResNeXt-101 32x4, 1024 dimensions: `sscd_disc_large`."""


PREPROCESSINGS = {
    "sscd-288-imagenet": Preprocessing(288, 0, *IMAGENET),  # what SSCD's authors recommend
    "dcr-256-224-half": Preprocessing(
        256, 224, *HALF
    ),  # what DCR's and FineXtract's public code does; it shifts all scores
}
"""Named, because a similarity means nothing without the preprocessing that produced it."""


class _Conv(nn.Module):
    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        pad = self.size // 2
        out = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return out + bias


class _Bottleneck(nn.Module):
    inner: int
    outer: int
    stride: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(_Conv(self.inner, dtype=self.dtype, name="conv1")(x))
        hidden = nn.relu(_Conv(self.inner, 3, self.stride, self.groups, self.dtype, name="conv2")(hidden))
        hidden = _Conv(self.outer, dtype=self.dtype, name="conv3")(hidden)
        if self.stride > 1 or x.shape[-1] != self.outer:
            x = _Conv(self.outer, 1, self.stride, dtype=self.dtype, name="downsample")(x)
        return nn.relu(x + hidden)


class _SSCD(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x = nn.relu(_Conv(cfg.width, 7, 2, dtype=dtype, name="conv1")(x.astype(dtype)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(cfg.blocks):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                x = _Bottleneck(cfg.inner(stage), cfg.outer(stage), stride, cfg.groups, dtype, name=name)(x)
        x = jnp.maximum(x.astype(jnp.float32), 1e-6)  # generalised mean over positions
        x = jnp.mean(x**cfg.pool, axis=(1, 2)) ** (1 / cfg.pool)
        return unit(nn.Dense(cfg.dims, name="fc")(x))


def init(key, cfg: Config) -> dict:
    """Random parameters as a nested dict of float32 arrays."""
    return _SSCD(cfg).init(key, jnp.zeros((1, 32, 32, 3)))["params"]


def apply(cfg: Config, params, x):
    """Descriptors of unit length, [B, dims] float32, of already normalised input x [B, H, W, 3]; `embed` takes pictures."""
    return _SSCD(cfg).apply({"params": params}, x)


def embed(cfg: Config, params, image, *, preprocessing: str = "sscd-288-imagenet"):
    """Descriptors of unit length, [B, dims] float32, of pictures [B, H, W, 3] in [-1, 1].

    Raises:
        ValueError: on an unknown preprocessing.
    """
    return apply(cfg, params, preprocess(image, preprocessing))


def preprocess(image, name: str):
    """Pictures [B, H, W, 3] in [-1, 1] as the network expects them, [B, h, w, 3].

    Raises:
        ValueError: on an unknown name.
    """
    require(
        name in PREPROCESSINGS, "preprocessing", f"one of {', '.join(PREPROCESSINGS)}", repr(name), "choose one of them"
    )
    return pictures.preprocess(image, PREPROCESSINGS[name])


def convert(state: Mapping[str, np.ndarray]) -> tuple[Config, dict]:
    """Configuration and parameters from the tensors of an SSCD file, in torchvision's or Classy Vision's names.

    Args:
        state: key -> array in PyTorch layout; the configuration follows from the keys and shapes.

    Raises:
        ValueError: one error that lists every missing, unused or mis-shaped tensor.
    """
    state = {_torchvision_name(key): value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    cfg = _config_of(state)
    target = {path: leaf.shape for path, leaf in flatten(jax.eval_shape(lambda: init(jax.random.key(0), cfg))).items()}
    flat, problems, used = {}, [], set()
    for path in sorted({path.rpartition("/")[0] for path in target}):
        keys = _keys(path)
        missing = [key for key in keys if key not in state]
        problems += [f"missing: {key}" for key in missing]
        used.update(keys)
        if missing:
            continue
        tensors = [np.asarray(state[key], np.float32) for key in keys]
        rank = 2 if path == "fc" else 4
        if tensors[0].ndim != rank or any(tensor.shape != tensors[0].shape[:1] for tensor in tensors[1:]):
            problems.append(f"mis-shaped: {keys[0]} and its companions, {[list(tensor.shape) for tensor in tensors]}")
            continue
        kernel, bias = _fold(tensors)
        for name, value in ((f"{path}/kernel", kernel), (f"{path}/bias", bias)):
            if value.shape != target[name]:
                problems.append(
                    f"mis-shaped: {keys[0]} gives {name} {list(value.shape)}, expected {list(target[name])}"
                )
            flat[name] = value
    problems += [f"unused: {key} {list(state[key].shape)}" for key in sorted(state.keys() - used)]
    if problems:
        lines = "".join(f"\n  {line}" for line in problems)
        raise fail(
            "SSCD weights",
            "exactly the tensors of an SSCD network",
            f"{len(problems)} problems",
            f"check the file:{lines}",
        )
    return cfg, unflatten(flat)


def _torchvision_name(key: str) -> str:
    """`backbone.blocks.0.block0-1.convolutional_block.3.weight` (Classy Vision) -> `layer1.1.conv2.weight`; torchvision's lose `backbone.`."""
    key = key.removeprefix("backbone.").replace("._module.", ".")
    if match := re.fullmatch(r"initial_block\.([01])\.(\w+)", key):
        return f"{('conv1', 'bn1')[int(match[1])]}.{match[2]}"
    if match := re.fullmatch(r"embeddings\.1\.(weight|bias)", key):
        return f"fc.{match[1]}"
    if match := re.fullmatch(r"blocks\.(\d+)\.(?:block\d+-)?(\d+)\.(.+)", key):
        stage, index, rest = int(match[1]) + 1, match[2], match[3]
        inner = {"convolutional_block.0": "conv1", "convolutional_block.1": "bn1", "convolutional_block.3": "conv2"}
        inner |= {"convolutional_block.4": "bn2", "convolutional_block.6": "conv3", "bn": "bn3"}
        branch, _, leaf = rest.rpartition(".")
        return f"layer{stage}.{index}.{inner.get(branch, branch)}.{leaf}"
    return key


def _config_of(state: Mapping[str, np.ndarray]) -> Config:
    first, grouped, fc = "conv1.weight", "layer1.0.conv2.weight", "fc.weight"
    absent = [
        key for key in (first, grouped, fc) if key not in state or np.ndim(state[key]) < 2 or not np.size(state[key])
    ]
    if absent:
        found = ", ".join(list(state)[:3]) or "nothing"
        raise fail("SSCD weights", f"a state dict with {', '.join(absent)}", found, "use one of SSCD's released files")
    width, inner, per_group = len(state[first]), *state[grouped].shape[:2]
    groups = max(1, inner // per_group)
    indices = [match.groups() for key in state if (match := re.match(r"layer(\d)\.(\d+)\.", key))]
    stages = sorted({stage for stage, _ in indices})
    blocks = tuple(len({i for s, i in indices if s == stage}) for stage in stages)
    return Config(
        blocks=blocks,
        width=width,
        groups=groups,
        group_width=inner * 64 // (width * groups),
        dims=len(state[fc]),
    )


def _keys(path: str) -> list[str]:
    """The tensors of one layer: weight, then the four of its batch norm, or weight and bias of the linear layer."""
    if path == "fc":
        return ["fc.weight", "fc.bias"]
    name = re.sub(r"_(\d+)", r".\1", path).replace("/", ".")
    conv, norm = (f"{name}.0", f"{name}.1") if name.endswith("downsample") else (name, name.replace("conv", "bn"))
    return [f"{conv}.weight", *(f"{norm}.{part}" for part in PARTS)]


def _fold(tensors: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias in our layout, the batch norm folded in."""
    if len(tensors) == 2:
        return np.ascontiguousarray(tensors[0].T), tensors[1]
    weight, scale, shift, mean, variance = tensors
    scale = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0) * scale), shift - mean * scale
