"""Building blocks shared by the networks: convolution, normalisation, time embedding, residual block, re-sampling.

All arrays are NHWC. Parameters are float32; `dtype` is the compute dtype of products, statistics stay float32.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmsec_jax.core.checks import require

Padding = tuple[tuple[int, int], tuple[int, int]]


def _plain_conv(x, kernel, stride: int, padding: Padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x, kernel, stride: int = 1, padding: Padding = ((1, 1), (1, 1))):
    """Two-dimensional convolution whose gradients stay fast inside `scan`, `fori_loop` and `cond` on CPU.

    XLA:CPU lowers the stock gradient convolutions of called computations to a naive loop (up to 20 times slower). Here the input
    gradient is a plain forward convolution with the flipped kernel, and on CPU the kernel gradient is one matrix product per tap.

    Args:
        x: [B, H, W, C].
        kernel: [kh, kw, C, D].
        stride: the same for both axes.
        padding: ((top, bottom), (left, right)), zeros.

    Returns:
        [B, H', W', D].
    """
    return _plain_conv(x, kernel, stride, padding)


def _conv_fwd(x, kernel, stride, padding):
    return _plain_conv(x, kernel, stride, padding), (x, kernel)


CACHE_FLOATS = 2**17
LARGE_MAP = 2**15
"""The kernel gradient of large maps (floats per image) goes over chunks of images whose activations stay in a core's cache."""


def _kernel_grad_taps(x, kernel, g, *, stride, padding):
    """dW[i, j] = x[shifted by (i, j)]^T g: one matrix product per kernel tap, over chunks of images that fit the cache."""
    batch, per_image = x.shape[0], x.shape[1] * x.shape[2] * max(x.shape[3], g.shape[3])
    chunk = max((m for m in range(1, batch + 1) if batch % m == 0 and m * per_image <= CACHE_FLOATS), default=1)
    taps = partial(_taps, size=kernel.shape[:2], stride=stride, padding=padding)
    if chunk == batch or per_image < LARGE_MAP:  # small maps: the loop costs more than it saves
        return taps(x, g).astype(kernel.dtype)
    split = lambda a: a.reshape(batch // chunk, chunk, *a.shape[1:])
    add = lambda total, part: (total + taps(*part), None)
    total, _ = jax.lax.scan(add, jnp.zeros(kernel.shape, jnp.float32), (split(x), split(g)))
    return total.astype(kernel.dtype)


def _taps(x, g, *, size, stride, padding):
    (kh, kw), c = size, x.shape[-1]
    _, h, w, d = g.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    flat = g.reshape(-1, d)
    taps = []
    for i in range(kh):
        for j in range(kw):
            window = padded[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
            taps.append(jnp.dot(window.reshape(-1, c).T, flat, preferred_element_type=jnp.float32))
    return jnp.stack(taps).reshape(kh, kw, c, d)


def _kernel_grad_native(x, kernel, g, *, stride, padding):
    return jax.vjp(lambda k: _plain_conv(x, k, stride, padding), kernel)[1](g)[0]


def _conv_bwd(stride, padding, residuals, g):
    x, kernel = residuals
    kh, kw = kernel.shape[:2]
    spread = g  # with stride s, the output gradient with s - 1 zeros between neighbours
    if stride > 1:
        zero = jnp.zeros((), g.dtype)
        spread = jax.lax.pad(g, zero, ((0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0)))
    pads = []
    for axis, k in ((1, kh), (2, kw)):
        low = k - 1 - padding[axis - 1][0]
        pads.append((low, x.shape[axis] + k - 1 - low - spread.shape[axis]))
    dx = _plain_conv(spread, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), 1, tuple(pads))
    dk = jax.lax.platform_dependent(
        x,
        kernel,
        g,
        cpu=partial(_kernel_grad_taps, stride=stride, padding=padding),
        default=partial(_kernel_grad_native, stride=stride, padding=padding),
    )
    return dx, dk


conv.defvjp(_conv_fwd, _conv_bwd)


class Conv(nn.Module):
    """Convolution with square kernel; a 1x1 kernel is a matrix product. Parameters `kernel` [k, k, C, D] and `bias` [D]."""

    features: int
    size: int = 3
    stride: int = 1
    padding: Padding | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        k = self.size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (k, k, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if k == 1 and self.stride == 1:
            return x @ kernel[0, 0] + bias.astype(self.dtype)
        padding = self.padding or ((k // 2, k // 2), (k // 2, k // 2))
        return conv(x, kernel, self.stride, padding) + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation over (H, W, C / groups) of [B, ..., C] with float32 statistics. Parameters `scale`, `bias` [C]."""

    groups: int = 32
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"channels must be a multiple of the number of norm groups {self.groups}, got {channels}; "
                "change block_out_channels or norm_num_groups"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        batch = x.shape[0]
        flat = x.astype(jnp.float32).reshape(batch, -1, channels)

        def group_mean(per_position):  # [B, P, C] -> [B, 1, C], equal within a group
            mean = per_position.mean(1).reshape(batch, self.groups, -1).mean(-1, keepdims=True)
            return jnp.broadcast_to(mean, (batch, self.groups, channels // self.groups)).reshape(batch, 1, channels)

        mean = group_mean(flat)
        variance = group_mean(jnp.square(flat - mean))
        weight = scale * jax.lax.rsqrt(variance + self.epsilon)
        return ((flat - mean) * weight + bias).reshape(x.shape).astype(self.dtype)


def timestep_features(t, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0, max_period: float = 1e4):
    """Sinusoidal features of the time step: [B] -> [B, width] float32 (Vaswani et al. 2017, with diffusers' options)."""
    half = width // 2
    exponent = -jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    features = jnp.concatenate(parts, -1)
    return jnp.pad(features, ((0, 0), (0, width % 2)))


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the time features: `linear_1`, SiLU, `linear_2`."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features):
        hidden = nn.silu(nn.Dense(self.width, dtype=self.dtype, name="linear_1")(features))
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(hidden)


class ResnetBlock(nn.Module):
    """norm-SiLU-conv twice, with the time embedding added in between and a 1x1 shortcut where the width changes."""

    features: int
    groups: int = 32
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time=None):  # x: [B, H, W, C], time: [B, D] or None
        norm = partial(GroupNorm, self.groups, self.epsilon, self.dtype)
        hidden = Conv(self.features, dtype=self.dtype, name="conv1")(nn.silu(norm(name="norm1")(x)))
        if time is not None:
            hidden += nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None]
        hidden = Conv(self.features, dtype=self.dtype, name="conv2")(nn.silu(norm(name="norm2")(hidden)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, name="conv_shortcut")(x)
        return x.astype(self.dtype) + hidden


class Downsample(nn.Module):
    """Stride-2 convolution `conv`; the UNet pads one on each side, the autoencoder only below and to the right."""

    features: int
    padding: Padding = ((1, 1), (1, 1))
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return Conv(self.features, stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then convolution `conv`."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return Conv(self.features, dtype=self.dtype, name="conv")(x)


def rematerialised(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """The class under a config's `remat`: "block" recomputes it in the backward pass, "none" stores its activations.

    Name its instances, since remat changes automatic names.

    Raises:
        ValueError: on another policy.
    """
    require(remat in ("none", "block"), "remat", "'none' or 'block'", repr(remat), "choose one of them")
    return nn.remat(module) if remat == "block" else module
